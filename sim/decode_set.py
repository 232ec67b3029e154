"""The decode set: all sequences that gain one token a step, moved as one group.

A decode step adds a token to every member, so the set keeps a clock instead of walking its members: a
member's length is derived from the clock, the total context is a counter, and what will happen to a member
(its last token, the token for which it holds no slot) stands in a calendar by clock tick. A step costs what
changes in it, whatever the size of the set.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Collection, Iterable
from operator import attrgetter
from typing import Protocol

from sim.request import NEVER, Sequence, TokenwiseSequence, Window
from sim.units import FOREVER

arrival_order = attrgetter("order")


def _turn_order(window: Window) -> tuple[int, int]:
    return window.sequence.order, window.group


class Growing(Protocol):
    """What members ask for slots: an allocator, as far as a decode set knows it."""

    slides: bool
    stride: int | None
    growth: int | None

    @property
    def headroom(self) -> int:
        """Members that can each outgrow their slots once more without a refusal."""

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """Give members their slots, tick by tick."""

    def grow_steadily(self, count: int, first: int, ticks: int) -> list[tuple[int, int, int]]:
        """Give so many members a slot at each of so many ticks."""

    def turn(
        self, batches: Collection[tuple[int, list[Sequence], list[Window]]]
    ) -> list[tuple[int, int, int]]:
        """`grow` where windows slide."""

    def gives_back(self, turning: Iterable[Window], awaited: bool) -> bool:
        """Whether these windows give slots back, or change more than a growth may."""


class DecodeSet:
    """Sequences that decode together, with a calendar of their finishes and of their growth.

    `clock` counts decode steps; `size` members hold `context` tokens in all. Tick t is the step after which
    the clock reads t: a member grows at the tick whose token exceeds its slots and finishes at the tick of
    its last token. A window of a member turns at the tick with which it leaves another page. Members that grow
    with every tick stand in no calendar either: `steady` of them have their slots up to the tick `grown`.
    """

    __slots__ = (
        "_finish_ticks",
        "clock",
        "context",
        "copy_pending",
        "finishes",
        "grown",
        "growths",
        "size",
        "sliding",
        "steady",
        "turns",
    )

    def __init__(self) -> None:
        self.clock = 0
        self.size = 0
        self.context = 0
        self.sliding = 0  # slots whose tokens leave a window with every tick
        self.steady = 0
        self.grown = 0
        self.finishes: dict[int, list[Sequence]] = {}
        self.growths: dict[int, list[Sequence]] = {}  # each in order of arrival
        self.turns: dict[int, list[Window]] = {}  # likewise, and in order of the groups
        self.copy_pending: list[Sequence] = []  # forked: the last block may be shared
        self._finish_ticks: list[int] = []  # heap of the keys of `finishes`

    def join(self, sequence: Sequence) -> None:
        """Let a sequence whose prompt is computed take part from the next tick on."""
        clock = self.clock
        tokens = sequence.origin
        self.size += 1
        self.sliding += sequence.sliding
        self.context += tokens
        sequence.origin = origin = tokens - clock
        sequence.decodes = self
        sequence.finish_tick = tick = sequence.final_tokens - origin
        finishing = self.finishes.get(tick)
        if finishing is None:
            self.finishes[tick] = [sequence]
            heapq.heappush(self._finish_ticks, tick)
        else:
            finishing.append(sequence)
        if sequence.capacity < sequence.final_tokens:
            if isinstance(sequence, TokenwiseSequence) and sequence.capacity == tokens and not self.growths:
                self._join_steady(sequence)
            else:
                self.await_growth(sequence)
        for window in sequence.edges:
            self.await_turn(window)

    def leave(self, sequence: Sequence) -> None:
        """Take a member out before it is done."""
        if sequence.request.counted is not None:
            sequence.request.counted.list_blocks()
        tokens = sequence.origin + self.clock
        self.finishes[sequence.finish_tick].remove(sequence)
        if not sequence.steady and sequence.capacity < sequence.final_tokens:
            self.forget_growth(sequence)
        self._forget(sequence, tokens)

    def _forget(self, sequence: Sequence, tokens: int) -> None:
        if isinstance(sequence, TokenwiseSequence) and sequence.steady:
            self._count_out(sequence)
        if self.copy_pending and sequence in self.copy_pending:
            self.copy_pending.remove(sequence)
        for window in sequence.edges:
            self._forget_turn(window)
        self.size -= 1
        self.sliding -= sequence.sliding
        self.context -= tokens
        sequence.origin = tokens
        sequence.decodes = None
        sequence.finish_tick = NEVER

    def _join_steady(self, sequence: TokenwiseSequence) -> None:
        if not self.steady:
            self.grown = self.clock
        if self.grown == self.clock:
            self.steady += 1
            sequence.steady = True
        else:
            self.await_growth(sequence)

    def _count_out(self, sequence: TokenwiseSequence) -> None:
        slots = sequence.capacity
        sequence.steady = False
        sequence.capacity = slots
        self.steady -= 1

    def list_steady(self) -> None:
        """Put the members that grow with every tick on the calendar, for who decides one by one."""
        if not self.steady:
            return
        members = [
            each
            for finishing in self.finishes.values()
            for each in finishing
            if isinstance(each, TokenwiseSequence) and each.steady
        ]
        for sequence in sorted(members, key=arrival_order):
            self._count_out(sequence)
            if sequence.capacity < sequence.final_tokens:
                self.await_growth(sequence)

    def await_growth(self, sequence: Sequence) -> None:
        """Note the tick at which a member needs a slot that it does not hold."""
        tick = sequence.capacity + 1 - sequence.origin
        growing = self.growths.get(tick)
        if not growing:
            self.growths[tick] = [sequence]
        elif growing[-1].order < sequence.order:
            growing.append(sequence)
        else:
            insort(growing, sequence, key=arrival_order)

    def forget_growth(self, sequence: Sequence) -> None:
        """A member needs no further slot."""
        self.growths[sequence.capacity + 1 - sequence.origin].remove(sequence)

    def await_turn(self, window: Window) -> None:
        """Note the tick at which a window of a member turns next."""
        tick = window.turn - window.sequence.origin
        turning = self.turns.get(tick)
        if turning is None:
            self.turns[tick] = [window]
        elif turning[-1].sequence.order < window.sequence.order:
            turning.append(window)
        else:
            insort(turning, window, key=_turn_order)

    def _forget_turn(self, window: Window) -> None:
        """Take the window of a member that leaves off the calendar; it may have turned with the coming tick already."""
        turns = self.turns
        tick = window.turn - window.sequence.origin
        if window not in turns.get(tick, ()):
            tick = self.clock + 1
        turns[tick].remove(window)
        if not turns[tick]:
            del turns[tick]

    def grow_next(self, allocator: Growing) -> None:
        """Give the members that need a slot at the next tick theirs, in order of arrival; let their windows turn."""
        tick = self.clock + 1
        growing = self.growths.pop(tick, [])
        if allocator.slides:
            turning = self.turns.pop(tick, [])
            allocator.turn([(tick, growing, turning)])
            if growing:
                self.note_grown(tick, growing, allocator.stride)
            if turning:
                self.note_turned(tick, turning, allocator.stride)
        else:
            if self.steady:
                allocator.grow_steadily(self.steady, tick, 1)
                self.grown = tick
            if growing:
                allocator.grow([(tick, growing)])
                self.note_grown(tick, growing, allocator.growth or allocator.stride)

    def grow(
        self, allocator: Growing, ticks: int, spare: int, awaited: bool = False
    ) -> tuple[int, list[tuple[int, int, int]]]:
        """Give members the slots that they need in the next ticks, in order of arrival within a tick.

        Stops before the first tick that would leave fewer than `spare` members' worth of headroom, or at which a
        member gives slots back, where free ones are `awaited` or it changes more than a growth may. Returns the
        number of ticks served, and (tick, slots held, internal waste) after each that grew any.
        """
        if allocator.slides:
            return self._slide(allocator, ticks, spare, awaited)
        growths = self.growths
        spare = allocator.headroom - spare
        tick = first = self.clock + 1
        if self.steady and any(growths.values()):
            self.list_steady()
        if self.steady:
            ticks = min(ticks, max(0, spare // self.steady))
            self.grown += ticks
            return ticks, allocator.grow_steadily(self.steady, first, ticks)
        stop = first + ticks
        books: list[tuple[int, int, int]] = []
        step = allocator.growth or allocator.stride
        while tick < stop:
            batches = []
            for tick in range(tick, min(stop, tick + (step or 1))):  # noqa: B020
                growing = growths.get(tick)
                if growing is None:
                    continue
                if growing:  # not all have left since
                    spare -= len(growing)
                    if spare < 0:
                        stop = tick
                        break
                    batches.append((tick, growing))
                del growths[tick]
            tick += 1
            if batches:
                books += allocator.grow(batches)  # who grows in it does not grow in it again
                for grown_at, grown in batches:
                    self.note_grown(grown_at, grown, step)
        return stop - first, books

    def _slide(
        self, allocator: Growing, ticks: int, spare: int, awaited: bool
    ) -> tuple[int, list[tuple[int, int, int]]]:
        """`grow` with windows that turn."""
        growths, turns = self.growths, self.turns
        spare = allocator.headroom - spare
        tick = first = self.clock + 1
        stop = first + ticks
        books: list[tuple[int, int, int]] = []
        stride = allocator.stride or 1
        while tick < stop:
            batches: list[tuple[int, list[Sequence], list[Window]]] = []
            for tick in range(tick, min(stop, tick + stride)):  # noqa: B020
                growing, turning = growths.get(tick), turns.get(tick)
                if growing:
                    spare -= len(growing)
                if spare < 0 or (turning is not None and allocator.gives_back(turning, awaited)):
                    stop = tick
                    break
                if growing is not None:
                    del growths[tick]
                if turning is not None:
                    del turns[tick]
                if growing or turning:
                    batches.append((tick, growing or [], turning or []))
            tick += 1
            if batches:
                books += allocator.turn(batches)
                for grown_at, grown, turned in batches:
                    self.note_grown(grown_at, grown, stride)
                    self.note_turned(grown_at, turned, stride)
        return stop - first, books

    def note_grown(self, tick: int, grown: list[Sequence], step: int | None) -> None:
        """Put members that grew at this tick back on the calendar, those that need no more slots excepted.

        `step` is the number of slots that each of them gained, None if they differ.
        """
        if step is None:
            growths = self.growths
            for sequence in grown:
                if sequence.capacity < sequence.final_tokens:
                    tick = sequence.capacity + 1 - sequence.origin
                    growing = growths.get(tick)
                    if not growing:
                        growths[tick] = [sequence]
                    elif growing[-1].order < sequence.order:
                        growing.append(sequence)
                    else:
                        insort(growing, sequence, key=arrival_order)
            return
        if grown:
            later = self.growths.get(tick + step)
            self.growths[tick + step] = grown
            if later:  # have joined since
                in_order = grown[-1].order < later[0].order
                grown += later
                if not in_order:
                    grown.sort(key=arrival_order)

    def note_turned(self, tick: int, turned: list[Window], step: int | None) -> None:
        """Put windows that turned at this tick back on the calendar, all a `step` later; None if that differs."""
        if step is None:
            for window in turned:
                self.await_turn(window)
        elif turned:
            later = self.turns.get(tick + step)
            self.turns[tick + step] = turned
            if later:
                in_order = turned[-1].sequence.order < later[0].sequence.order
                turned += later
                if not in_order:
                    turned.sort(key=_turn_order)

    def advance(self, steps: int = 1) -> None:
        """Give every member `steps` more tokens."""
        self.clock += steps
        self.context += steps * self.size

    @property
    def next_finish(self) -> int:
        """The next tick at which a member may be done; FOREVER if the set is empty."""
        return self._finish_ticks[0] if self._finish_ticks else FOREVER

    @property
    def next_growth(self) -> int:
        """The next tick at which a member needs a slot that it does not hold; FOREVER if none does."""
        if self.steady:
            return self.grown + 1
        growths = self.growths
        while growths:
            tick = min(growths)
            if growths[tick]:
                return tick
            del growths[tick]
        return FOREVER

    def take_finished(self) -> list[Sequence]:
        """Members whose last token came with this tick, in order of arrival; they are out of the set."""
        if not self._finish_ticks or self._finish_ticks[0] != self.clock:
            return []
        heapq.heappop(self._finish_ticks)
        finished = self.finishes.pop(self.clock)
        if len(finished) > 1:
            finished.sort(key=arrival_order)
        for sequence in finished:
            self._forget(sequence, sequence.final_tokens)
        return finished
