"""Forks: branches of a request, and the turnover of beams in a beam search."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from sim.allocators.base import Allocator
from sim.decode_set import DecodeSet
from sim.identity import mixed
from sim.request import Request, Sequence
from sim.units import FOREVER

if TYPE_CHECKING:
    from sim.schedulers.base import Scheduler


_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


def fork(allocator: Allocator, parent: Sequence) -> Sequence:
    """A new branch of the parent's request that shares all that the parent holds."""
    request = parent.request
    child = Sequence(request, request.next_branch, parent.num_tokens, parent.final_tokens)
    request.next_branch += 1
    if allocator.probe is not None:
        allocator.probe.write(parent)
        allocator.probe.fork(parent, child)
    allocator.fork(parent, child)
    return child


class Draws:
    """A stream of random numbers that whole numbers name: SplitMix64, which costs nothing to begin anew."""

    __slots__ = ("_state",)

    def __init__(self, *names: int) -> None:
        state = 0
        for name in names:
            state = mixed(state + name + 1 & _MASK)
        self._state = state

    def fraction(self) -> float:
        """A number from 0 up to 1, in steps of 2**-53."""
        self._state = self._state + _STEP & _MASK
        return (mixed(self._state) >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """One of `count` whole numbers from 0 on."""
        return int(self.fraction() * count)


class BeamSearch:
    """Which beams die, and whose copies take their places.

    In every step each beam dies with probability `turnover`, independently, and a surviving beam picked at
    random is forked in its place; one beam always survives. The draws depend on the seed, the request and the
    length only, never on the schedule. A group's next turnover is drawn ahead, so that steps in between cost
    nothing.
    """

    def __init__(self, turnover: float, seed: int) -> None:
        self.turnover = turnover
        self.seed = seed
        self._lengths: dict[Request, int] = {}  # tokens at which a group turns over next
        self._due: dict[int, list[Request]] = {}
        self._ticks: list[int] = []
        self._away: list[Request] = []

    @property
    def next_turnover(self) -> int:
        """The next decode tick at which a group may turn over; FOREVER if there is none."""
        return self._ticks[0] if self._ticks else FOREVER

    def start(self, request: Request, decodes: DecodeSet) -> None:
        """Follow a group that begins to decode."""
        if self.turnover > 0:
            self._draw_next(request, decodes)

    def _draw_next(self, request: Request, decodes: DecodeSet) -> None:
        length = request.sequences[0].num_tokens
        none_dies = (1.0 - self.turnover) ** len(request.sequences)
        gap = 1
        if none_dies > 0:
            chance = 1.0 - Draws(self.seed, request.id, length, 0).fraction()
            gap += int(math.log(chance) / math.log(none_dies))
        self._lengths[request] = length + gap
        self._schedule(request, decodes)

    def _schedule(self, request: Request, decodes: DecodeSet) -> None:
        tick = self._lengths[request] - request.sequences[0].origin
        if tick not in self._due:
            self._due[tick] = []
            heapq.heappush(self._ticks, tick)
        self._due[tick].append(request)

    def turn_over(self, scheduler: Scheduler) -> None:
        """Turn over the groups that are due at the tick that was just computed."""
        decodes = scheduler.decodes
        due = self._away
        self._away = []
        while self._ticks and self._ticks[0] <= decodes.clock:
            due += self._due.pop(heapq.heappop(self._ticks))
        for request in due:
            if request.status in ("finished", "rejected"):
                del self._lengths[request]
            elif request.status != "running" or request.sequences[0].decodes is None:
                self._away.append(request)
            elif request.sequences[0].num_tokens < self._lengths[request]:
                self._schedule(request, decodes)
            else:
                self._turn_over(request, scheduler)
                self._draw_next(request, decodes)

    def _turn_over(self, request: Request, scheduler: Scheduler) -> None:
        decodes = scheduler.decodes
        draws = Draws(self.seed, request.id, request.sequences[0].num_tokens, 1)
        dying: list[Sequence] = []
        while not dying:
            dying = [sequence for sequence in request.sequences if draws.fraction() < self.turnover]
        if len(dying) == len(request.sequences):
            dying.pop(draws.below(len(dying)))
        survivors = [sequence for sequence in request.sequences if sequence not in dying]
        parents = [survivors[draws.below(len(survivors))] for _ in dying]
        for sequence in dying:
            decodes.leave(sequence)
            scheduler.release(sequence)
            request.sequences.remove(sequence)
        for parent in parents:
            child = fork(scheduler.allocator, parent)
            request.sequences.append(child)
            decodes.join(child)
            decodes.copy_pending += [
                sequence for sequence in (parent, child) if sequence not in decodes.copy_pending
            ]
