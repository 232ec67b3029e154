"""Forks: branches of a request, and the turnover of beams in a beam search."""

from __future__ import annotations

import heapq

import numpy as np

from sim.allocators.base import Allocator
from sim.allocators.countable import CountableAllocator
from sim.allocators.counted_beams import CountedBeams
from sim.allocators.counted_group import CountedGroup
from sim.decode_set import DecodeSet
from sim.genealogy import Ints, Turnover, draw_parents
from sim.request import Lineage, Request, Sequence
from sim.schedulers.base import Scheduler
from sim.units import FOREVER


def fork(allocator: Allocator, parent: Sequence) -> Sequence:
    """A new branch of the parent's request that shares all that the parent holds."""
    request = parent.request
    child = Sequence(request, request.next_branch, parent.num_tokens, parent.final_tokens)
    child.order = parent.order >> 32 << 32 | child.branch
    child.lineage = Lineage(parent.num_tokens, child.branch, parent.lineage)
    request.next_branch += 1
    if allocator.probe is not None:
        allocator.probe.write(parent)
        allocator.probe.fork(parent, child)
    allocator.fork(parent, child)
    return child


class BeamSearch:
    """Which beams die, and whose copies take their places.

    In every step each beam dies with a chance (`turnover`), independently, and a surviving beam picked at
    random is forked in its place; one beam always survives. The draws depend on the seed, the request and the
    number of generated tokens only, never on the schedule (`sim/genealogy.py`). They are made when a group begins to
    decode, so that steps without a turnover cost nothing; and where an allocator can, all steps of a group are
    summed up then (`sim/allocators/counted_beams.py`).
    """

    def __init__(self, turnover: Turnover | float, seed: int) -> None:
        self.turnover = turnover
        self.seed = seed
        self._parents: dict[Request, Ints] = {}  # of groups that are followed beam by beam
        self._listed: dict[Request, CountedGroup] = {}  # those of them that were counted before
        self._lengths: dict[Request, list[int]] = {}  # tokens at which they turn over, the next one last
        self._due: dict[int, list[Request]] = {}
        self._ticks: list[int] = []
        self._away: list[Request] = []
        self._counted: CountedBeams | None = None

    @property
    def next_turnover(self) -> int:
        """The next decode tick at which a group that is followed beam by beam turns over; FOREVER if none does."""
        return self._ticks[0] if self._ticks else FOREVER

    def _draw(self, request: Request, tokens: int, final: int) -> Ints:
        return draw_parents(self.turnover, request.width, final - tokens - 1, self.seed, request.id)

    def count(self, parent: Sequence, scheduler: Scheduler) -> bool:
        """Let a group whose prompt is computed decode, if its allocator can count its blocks; whether it does."""
        allocator = scheduler.allocator
        if not allocator.counts_beams or allocator.tiers is not None:
            return False
        if allocator.probe is not None and allocator.probe.follows(parent.request):
            return False
        if self._counted is None:
            assert isinstance(allocator, CountableAllocator)
            self._counted = allocator.counted = CountedBeams(allocator, scheduler.decodes, self.follow)
        parents = self._draw(parent.request, parent.origin, parent.final_tokens)
        self._counted.start(parent, parents)
        return True

    def start(self, request: Request, decodes: DecodeSet) -> None:
        """Follow a group that begins to decode, beam by beam."""
        first = request.sequences[0]
        tokens = first.num_tokens
        self.follow(request, self._draw(request, tokens, first.final_tokens), tokens)

    def follow(self, request: Request, parents: Ints, tokens: int, group: CountedGroup | None = None) -> None:
        """Turn a group over beam by beam from so many tokens on; until it is counted again, if it was before."""
        first = request.prompt_tokens + 1
        turning = (parents != np.arange(parents.shape[1])).any(axis=1).nonzero()[0] + first
        lengths = turning[turning >= tokens][::-1].tolist()
        if lengths:
            self._parents[request], self._lengths[request] = parents, lengths
            if group is not None:
                self._listed[request] = group
            self._schedule(request)

    def _schedule(self, request: Request) -> None:
        tick = self._lengths[request][-1] - request.sequences[0].origin
        if tick not in self._due:
            self._due[tick] = []
            heapq.heappush(self._ticks, tick)
        self._due[tick].append(request)

    def turn_over(self, scheduler: Scheduler) -> None:
        """Turn over the groups that are due at the tick that was just computed."""
        decodes = scheduler.decodes
        if self._counted is not None:
            self._counted.turn()
        due = self._away
        self._away = []
        while self._ticks and self._ticks[0] <= decodes.clock:
            due += self._due.pop(heapq.heappop(self._ticks))
        for request in due:
            lengths = self._lengths[request]
            if request.status in ("finished", "rejected"):
                lengths.clear()
            elif request.status != "running" or request.sequences[0].decodes is None:
                self._away.append(request)
                continue
            while lengths and lengths[-1] <= request.sequences[0].num_tokens:
                self._turn_over(request, lengths.pop(), scheduler)
            if lengths and not self._gather(request):
                self._schedule(request)
            else:
                del self._lengths[request], self._parents[request]
                self._listed.pop(request, None)

    def _gather(self, request: Request) -> bool:
        group = self._listed.get(request)
        return group is not None and self._counted is not None and self._counted.gather(group)

    def _turn_over(self, request: Request, tokens: int, scheduler: Scheduler) -> None:
        decodes, allocator, beams = scheduler.decodes, scheduler.allocator, request.sequences
        parents = self._parents[request][tokens - request.prompt_tokens - 1].tolist()
        before, lives = list(beams), 1
        while parents[lives] > parents[lives - 1]:
            lives += 1
        living = parents[:lives]
        for sequence in [each for beam, each in enumerate(before) if beam not in living]:
            decodes.leave(sequence)
            scheduler.release(sequence)
            beams.remove(sequence)
        pending = dict.fromkeys(decodes.copy_pending)
        for beam in parents[lives:]:
            parent = before[beam]
            child = fork(allocator, parent)
            beams.append(child)
            decodes.join(child)
            pending[parent] = pending[child] = None
        decodes.copy_pending = list(pending)
