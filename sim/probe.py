"""The probe: whoever watches what becomes of the slots, to prove the block tables right."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sim.allocators.base import Allocator
    from sim.request import Sequence


class Probe(Protocol):
    """Told of everything that happens to slots, by the block pool and the engine, never by a policy.

    Blocks are numbered per tier (`"device"`, `"host"`); an allocator without blocks speaks of slots as blocks
    of one. `next_sample` is the index of the next engine step that the probe wants to see.
    """

    next_sample: int

    def start(self, allocator: Allocator) -> None:
        """A run with this allocator begins; nothing is held."""

    def take(self, tier: str, blocks: Ordered[int]) -> None:
        """Blocks are handed out; what they held is gone."""

    def free(self, tier: str, blocks: Ordered[int]) -> None:
        """Blocks have no holder left."""

    def touch(self, tier: str, blocks: Ordered[int]) -> None:
        """Cached blocks are handed out again with what they hold."""

    def write(self, sequence: Sequence) -> None:
        """All tokens of the sequence up to `num_tokens` are written now, before something moves them."""

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child starts with the parent's history."""

    def copy(self, source: int, target: int) -> None:
        """A device block is copied before a write (copy-on-write)."""

    def swap(self, tier: str, pairs: Ordered[tuple[int, int]]) -> None:
        """Blocks move to `tier`; (source, target) each, the source on the other tier."""

    def end(self, sequence: Sequence) -> None:
        """The sequence is over, or starts again from its prompt; it holds nothing any more."""

    def sample(self, step: int, time: int, sequences: Ordered[Sequence]) -> None:
        """Engine step `step` runs now on these sequences. Raises if a table does not hold what it should."""
