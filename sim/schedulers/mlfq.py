"""FastServe's skip-join multi-level feedback queue."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from heapq import heappop, heappush

from sim.allocators.base import Allocator
from sim.registry import NonNegativeFloat, PositiveFloat, PositiveInt
from sim.request import Request, outputs
from sim.schedulers.orders import order
from sim.schedulers.ranking import Queue, Ranked, Ranking
from sim.step import Step
from sim.units import FOREVER, to_ns

_FEW = 1024

_Entry = tuple[int, int, int, Request]
"""A level or the tick of a fall, the request's number, how often it was preempted before, and the request."""


class _Place:
    """Where a request stands: its level, and the number of its outputs that use up the quantum there."""

    __slots__ = ("bound", "level", "since")

    def __init__(self, level: int, bound: int) -> None:
        self.level = level
        self.bound = bound
        self.since = 0  # waits since then


@order("mlfq")
class MultiLevelFeedback(Ranking):
    """Who has been served least goes first, in levels with quanta that double (FastServe: Wu et al., 2023).

    A request joins the first level whose quantum covers its prompt (skip-join), and moves down one level
    whenever it has generated its quantum's worth. Within a level the earliest arrival goes first. When the head of
    the queue cannot be admitted, running requests of lower levels give way, the lowest and latest first, until it
    can; those of its own level do not, and nobody does where all of them together would not make room for it. What
    waits too long is back in the first level with a fresh quantum.

    Service is counted in tokens, not in seconds of a profile. FastServe moves the memory of who gives way to the
    host ahead of time; here it is dropped and computed again, and groups of samples or beams never give way.

    Fields:
        quantum: Generated tokens that a request may have in the first level.
        levels: Number of levels; nobody leaves the last one.
        prompt_weight: Generated tokens that a token of the prompt counts for.
        starvation_s: Longest wait before a request is promoted to the first level; by default none is.
    """

    def __init__(
        self,
        *,
        quantum: PositiveInt = 16,
        levels: PositiveInt = 6,
        prompt_weight: NonNegativeFloat = 0.02,
        starvation_s: PositiveFloat | None = None,
    ) -> None:
        super().__init__()
        self.quantum = quantum
        self.last = levels - 1
        self.prompt_weight = prompt_weight
        self.patience = FOREVER if starvation_s is None else to_ns(starvation_s)
        self._now = 0
        self._places: dict[Request, _Place] = {}
        self._many = _FEW  # places from which on those that are not needed are dropped
        self._waits: deque[tuple[int, Request]] = deque()  # in order of time, those that are over among them
        # Those that run, as far as they can give way; who has left since is among them.
        self._joining: list[Request] = []  # they do not decode yet
        self._running: list[_Entry] = []  # sorted by level and arrival
        self._falls: list[list[_Entry]] = [
            [] for _ in range(levels - 1)
        ]  # by level, heaps of when they leave it
        self._in_vain = False

    def __call__(self, request: Request) -> tuple[int, int]:
        """Level and arrival."""
        return self._level(request), request.id

    def begin(self, scheduler: Ranked, now: int, step: Step) -> None:
        """Rank the arrivals, promote who starves, and make room for the head of the queue."""
        self._now = now
        for request in self.take_arrivals(scheduler):
            self._join(request)
            self.insert(scheduler, request)
        self._promote(scheduler)
        self._follow(scheduler)
        self._in_vain = False
        waiting = scheduler.waiting
        if waiting and scheduler.running and scheduler.open_to_arrivals:
            self._make_room(scheduler, step)

    def _join(self, request: Request) -> None:
        cost = math.ceil(request.prompt_tokens * self.prompt_weight)
        level = 0
        while level < self.last and self.quantum << level < cost:
            level += 1
        bound = max(1, (self.quantum << level) - cost)
        self._places[request] = _Place(level, bound)
        self._await(request, request.arrival_time)
        if len(self._places) > self._many:
            self._forget()

    def _await(self, request: Request, since: int) -> None:
        place = self._places[request]
        place.since = since
        if place.level and self.patience < FOREVER:
            self._waits.append((since, request))

    def _forget(self) -> None:
        """Drop what is known of requests that are over."""
        places = self._places
        for request in [each for each in places if each.status in ("finished", "rejected")]:
            del places[request]
        self._many = 2 * len(places) + _FEW

    def _level(self, request: Request) -> int:
        """The level of a request after what it has generated."""
        place = self._places[request]
        while place.level < self.last and outputs(request) >= place.bound:
            place.level += 1
            place.bound += self.quantum << place.level
        return place.level

    def requeued(self, request: Request) -> None:
        """It waits from now on, in the level that it has come to."""
        self._level(request)
        self._await(request, self._now)

    @property
    def wakes_at(self) -> int:
        """When the first of those that wait below the first level has waited too long."""
        waits = self._waits
        while waits:
            since, request = waits[0]
            if request.status == "waiting":
                place = self._places[request]
                if place.level and place.since == since:
                    return since + self.patience
            waits.popleft()
        return FOREVER

    def _promote(self, scheduler: Ranked) -> None:
        """To the first level, whoever has waited too long."""
        while self.wakes_at <= self._now:
            _, request = self._waits.popleft()
            scheduler.waiting.remove(request)
            place = self._places[request]
            place.level = 0
            place.bound = outputs(request) + self.quantum
            self.insert(scheduler, request)

    # Those that run

    def admitted(self, queue: Queue, request: Request) -> None:
        """It falls level by level once it decodes; groups of samples or beams never give way."""
        if request.width == 1:
            self._joining.append(request)

    def _follow(self, scheduler: Ranked) -> None:
        """Bring the levels of those that run up to date."""
        clock = scheduler.decodes.clock
        if self._joining:
            joining, self._joining = self._joining, []
            for request in joining:
                if request.status == "running":
                    self._enter(request)
        for level, falls in enumerate(self._falls):
            while falls and falls[0][0] <= clock:
                _, _, stint, request = heappop(falls)
                if _runs(request, stint):
                    place = self._places[request]
                    known = bisect_left(self._running, (place.level, request.id, stint))
                    if known < len(self._running) and self._running[known][3] is request:
                        del self._running[known]
                    if place.level <= level:
                        self._enter(request)
        if len(self._running) > 64 + 2 * len(scheduler.running):
            self._running = [entry for entry in self._running if _runs(entry[3], entry[2])]

    def _enter(self, request: Request) -> None:
        """Note its level, and when it falls below that and those after it."""
        sequence = request.sequences[0]
        if sequence.decodes is None:
            self._joining.append(request)
            return
        level = self._level(request)
        stint = request.preemptions
        insort(self._running, (level, request.id, stint, request))
        tick = self._places[request].bound + request.prompt_tokens - 1 - sequence.origin
        for at in range(level, self.last):
            heappush(self._falls[at], (tick, request.id, stint, request))
            tick += self.quantum << (at + 1)

    def _make_room(self, scheduler: Ranked, step: Step) -> None:
        head = scheduler.waiting[0]
        level = self._places[head].level
        if level == self.last or scheduler.could_admit(head):
            return
        running = self._running
        first = bisect_left(running, (level + 1,))
        lower = [entry[3] for entry in running[first:] if _runs(entry[3], entry[2])]
        lower = [request for request in lower if request.sequences[0].decodes is not None]
        if lower and not _would_fit(scheduler.allocator, head, lower):
            self._in_vain = True
            return
        while lower and not scheduler.could_admit(head):
            request = lower.pop()
            if request.sequences[0].decodes is not None:  # else it stood there twice
                scheduler.give_way(request, step)

    def quiet_for(self, scheduler: Ranked) -> int:
        """Until a running request falls below the level of the head of the queue."""
        if not scheduler.waiting:
            return FOREVER
        level = self._places[scheduler.waiting[0]].level
        if level == self.last:
            return FOREVER
        running = self._running
        for at in range(len(running) - 1, -1, -1):
            if running[at][0] <= level or self._in_vain:
                break
            _, _, stint, request = running[at]
            if _runs(request, stint) and request.sequences[0].decodes is not None:
                return 0
        falls = self._falls[level]
        while falls:
            tick, _, stint, request = falls[0]
            if _runs(request, stint):
                return max(0, tick - scheduler.decodes.clock)
            heappop(falls)
        return FOREVER


def _runs(request: Request, stint: int) -> bool:
    """Whether it has run without a break since it had been preempted so often."""
    return request.status == "running" and request.preemptions == stint


def _would_fit(allocator: Allocator, head: Request, others: list[Request]) -> bool:
    """Whether the head could have memory without these others; where that cannot be told, yes."""
    size = allocator.growth
    if size is None:
        return True
    tokens = head.prefill_tokens
    needed = -(-(tokens - allocator.cached_tokens(head, tokens)) // size)
    held = sum([-(-request.sequences[0].capacity // size) for request in others])
    return needed <= allocator.headroom + held
