"""Witnesses: whoever is told what becomes of the slots."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import Protocol

from sim.request import Request, Sequence


class Witness(Protocol):
    """Told of everything that happens to slots, as it happens.

    Blocks are numbered per tier (`"device"`, `"host"`). The base classes tell of sequences, and an allocator of
    the copies and moves that it orders; the block pool flags what it hands out (`BlockPool.fresh`), as that
    happens too often to be told. Who holds what is nobody's word: that is read from the tables and the pools
    where they are checked.
    """

    def touch(self, tier: str, blocks: Ordered[int]) -> None:
        """Cached blocks are handed out with what they hold, to the sequence that begins next."""

    def begin(self, sequence: Sequence) -> None:
        """The sequence has its first slots; it writes none of those that were touched for it.

        Told by allocators that keep freed blocks.
        """

    def write(self, sequence: Sequence) -> None:
        """All tokens of the sequence up to `num_tokens` are written now, before something moves them."""

    def leave(self, sequence: Sequence, group: int, tokens: int) -> None:
        """The first tokens of the sequence, all written, are about to leave the window of a group of layers."""

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child starts with the parent's history, all of it written."""

    def copy(self, source: int, target: int) -> None:
        """A device block is copied before a write (copy-on-write)."""

    def cut(self, block: int, offset: int) -> None:
        """What a device block holds from this offset on is void: whoever holds the block has nothing there."""

    def swap(self, tier: str, pairs: Ordered[tuple[int, int]], sequences: Ordered[Sequence] = ()) -> None:
        """Blocks of these sequences move to `tier`; (source, target) each, the source on the other tier."""

    def offload(self, sequences: Iterable[Sequence]) -> None:
        """All tokens of these sequences are written now: blocks of theirs are about to be copied away."""

    def lift(self, block: int) -> None:
        """What a device block holds will be copied from it as "lifted", though others may write there before."""

    def transfer(self, source: str, block: int, tier: str, slot: int) -> None:
        """A block of one tier is copied to another; to the device, for the sequence that begins next."""

    def lose(self, sequence: Sequence) -> None:
        """The sequence lost its tokens from `num_tokens` on, and will write them again."""

    def follows(self, request: Request) -> bool:
        """Whether to be told of this beam group, whose blocks its allocator could count instead of listing them."""

    def hide(self, sequence: Sequence) -> None:
        """Nobody tells what the sequence writes from now on, and what its request's other branches do."""

    def show(self, sequence: Sequence) -> None:
        """A branch that was hidden is told of again: it has a block table, and its lineage says what it wrote."""

    def end(self, sequence: Sequence) -> None:
        """The sequence, written up to `num_tokens`, is over or will start again from its prompt."""
