"""What an allocator is: who owns which KV slots, and what is wasted."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.allocators.books import Books
from sim.allocators.capacity import Admission
from sim.pools.block_pool import BlockPool
from sim.registry import Registry
from sim.request import Request, Sequence, Window
from sim.units import FOREVER
from sim.witness import Witness

allocator: Registry[type[Allocator]] = Registry("allocator")


class Allocator(Books):
    """Owner of the KV slots of one device.

    A policy says whether a request fits (`admission`), gives slots (`reserve`), takes them back (`release`)
    and tells where a sequence's tokens live (`slots`). The accounting is done for it, in a handful of counters that
    change only when a sequence comes, grows or leaves (`Books`).
    Its first parameter is the `Capacity`; the keyword-only ones are its YAML fields.
    """

    # What a policy decides

    @abstractmethod
    def admission(self, request: Request, num_tokens: int) -> Admission:
        """Whether the request can be given slots for its first `num_tokens` tokens; changes nothing."""

    @abstractmethod
    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Give the sequence slots for at least `num_tokens` tokens, on top of those it holds; the new total."""

    @abstractmethod
    def release(self, sequence: Sequence) -> None:
        """Take back all slots of the sequence."""

    def admission_in_chunks(
        self, request: Request, num_tokens: int, chunk: int, first: int | None = None
    ) -> Admission:
        """`admission` of a request that computes at most `chunk` tokens in a step, and gets slots for no more.

        In the coming step it computes `first` at most, if that is told.
        """
        return self.admission(request, num_tokens)

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Why the request can never be admitted, in numbers."""
        return f"{num_tokens} tokens do not fit into {self.num_slots} slots"

    @property
    def headroom(self) -> int:
        """Sequences that can each outgrow their slots once more without a refusal; unlimited by default."""
        return FOREVER

    def can_append(self, request: Request) -> bool:
        """Whether every running branch of the request may have one more token."""
        return True

    def demand(self, sequence: Sequence, num_tokens: int) -> int:
        """What the next tokens of a sequence would take of the headroom."""
        lacking = sequence.num_tokens + num_tokens - sequence.capacity
        if lacking <= 0:
            return 0
        return 1 if self.growth is None else -(-lacking // self.growth)

    def cached_tokens(self, request: Request, num_tokens: int) -> int:
        """How many leading tokens of the request an admission would find cached; at least one is not."""
        return 0

    def foresee(self, requests: Iterable[Request]) -> None:
        """Know the workload; called before the first request where `foresees` is true."""
        raise TypeError(f"{type(self).__name__} foresees nothing")

    def shared_tokens(self, request: Request, num_tokens: int) -> int:
        """How many of those are in slots that somebody holds, so that finding them takes none of the free ones."""
        return 0

    # What the engine calls

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Give a sequence that holds nothing slots for `num_tokens` tokens, all filled with this step or so many.

        Returns how many of these tokens need not be computed, since cached blocks hold them.
        """
        if filled is None:
            filled = num_tokens
        held = self.reserve(sequence, num_tokens)
        sequence.capacity = held
        sequence.origin = filled
        self.num_tokens += filled
        self.num_held += held
        if held > sequence.final_tokens:
            self.num_internal += held - sequence.final_tokens
        self.sequences.add(sequence)
        if self.keeps_freed and self.probe is not None:
            self.probe.begin(sequence)
        return 0

    def computed(self, sequence: Sequence) -> None:
        """The sequence's prompt is computed by now; told to allocators that keep freed blocks."""

    def pass_windows(self, sequence: Sequence) -> None:
        """Give back what no further token of a sequence that does not decode looks at."""

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a sequence that does not decode, after taking those that it lacks."""
        filled = sequence.origin + num_tokens
        if filled > sequence.capacity:
            self._grow_to(sequence, filled)
        sequence.origin = filled
        self.num_tokens += num_tokens

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """Give each sequence, whose slots are all filled, room for one more token; batch by batch.

        A batch is a tick and the sequences that grow at it. Those that will need no more are taken off the
        list. Returns (tick, slots held, internal waste) after each batch.
        """
        books = []
        for tick, sequences in batches:
            for sequence in sequences:
                self._grow_to(sequence, sequence.capacity + 1)
            sequences[:] = [sequence for sequence in sequences if sequence.capacity < sequence.final_tokens]
            books.append((tick, self.num_held, self.num_internal))
        return books

    def grow_steadily(self, count: int, first: int, ticks: int) -> list[tuple[int, int, int]]:
        """A slot for each of `count` sequences at each of so many ticks from `first` on; returns what `grow` does."""
        raise NotImplementedError

    def _grow_to(self, sequence: Sequence, num_tokens: int) -> None:
        before = sequence.capacity
        sequence.capacity = held = self.reserve(sequence, num_tokens)
        self.num_held += held - before
        if held > sequence.final_tokens:
            self.num_internal += held - max(before, sequence.final_tokens)

    def turn(
        self, batches: Collection[tuple[int, list[Sequence], list[Window]]]
    ) -> list[tuple[int, int, int]]:
        """`grow` where windows slide: at each tick these give slots back first, in order of arrival and group.

        Windows that do not turn again a `stride` later are put back on the calendar and taken off the list.
        """
        raise TypeError(f"{type(self).__name__} has no windows")

    def gives_back(self, turning: Iterable[Window], awaited: bool) -> bool:
        """Whether these windows give slots back where they turn next.

        If they are not `awaited`, whether that changes more than the slots held and internal waste.
        """
        return False

    def settle(self) -> None:
        """All decoding sequences have the slots of the coming tick; told to allocators that slide."""

    def look_at_windows(self) -> None:
        """A step is planned: who shares what is told; told to allocators that slide."""

    def unfill(self, sequence: Sequence, num_tokens: int) -> None:
        """Take the last tokens from a sequence that does not decode; it keeps its slots."""
        sequence.origin -= num_tokens
        self.num_tokens -= num_tokens

    def slide(self, slots: int) -> None:
        """The tokens in so many slots left their windows."""
        self.num_tokens -= slots
        self.num_internal += slots

    def append(self, sequence: Sequence) -> int:
        """Make sure that the next token of the sequence has a slot of its own; the number of blocks copied."""
        if sequence.num_tokens >= sequence.capacity:
            self._grow_to(sequence, sequence.capacity + 1)
        return 0

    def free(self, sequence: Sequence) -> None:
        """Take everything back from a sequence that does not decode."""
        self.num_tokens -= sequence.origin
        self.num_held -= sequence.capacity
        self.num_internal -= max(0, sequence.capacity - sequence.final_tokens)
        self.sequences.discard(sequence)
        self.release(sequence)
        sequence.capacity = 0

    def retire(self, request: Request) -> None:
        """Note that the branches of a request are done but keep their slots: nothing in them is used again."""
        for sequence in request.sequences:
            self.num_tokens -= sequence.num_tokens
            self.num_internal += sequence.capacity - max(0, sequence.capacity - sequence.final_tokens)
            sequence.origin = sequence.final_tokens = 0

    # What a probe asks

    @property
    def pools(self) -> list[BlockPool]:
        """The block pools among the attributes; one without any hands out slots in its own way."""
        # Not vars(self): once its __dict__ is read, CPython 3.11 finds every attribute of an object more slowly.
        values = gc.get_referents(self)
        found = dict.fromkeys(
            value for value in values + gc.get_referents(*values) if isinstance(value, BlockPool)
        )
        return list(found)

    def watch(self, probe: Witness) -> None:
        """Tell a probe of everything that happens to slots."""
        self.probe = probe
        if self.tiers is not None:
            self.tiers.probe = probe

    def held_slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Slots of all tokens that the sequence has room for, shape [capacity]."""
        room = sequence.capacity - sequence.num_tokens
        sequence.origin += room  # as if it had filled them
        try:
            return self.slots(sequence)
        finally:
            sequence.origin -= room

    def shares_tail(self, sequence: Sequence) -> bool:
        """Whether its next token needs a copy of its last block, which a cache gave to another request too."""
        return False

    # What an experiment asks before it is run

    @classmethod
    def made(cls, fields: dict[str, Any]) -> type[Allocator]:
        """The class that an allocator of this kind with these fields is of."""
        return cls

    @classmethod
    def finds_prefixes(cls, fields: dict[str, Any]) -> bool:
        """Whether an allocator of this kind with these fields finds blocks again by their content."""
        return cls.made(fields).keeps_freed and fields.get("prefix_caching") is not False

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(dotted path, complaint) for options of a whole experiment that contradict each other."""
        return ()
