"""FastServe's skip-join multi-level feedback queue."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from sim.registry import NonNegativeFloat, PositiveFloat, PositiveInt
from sim.request import Request, outputs
from sim.schedulers.orders import order
from sim.schedulers.ranking import Ranking
from sim.step import Step
from sim.units import FOREVER, to_ns

if TYPE_CHECKING:
    from sim.schedulers.base import Scheduler

_FEW = 1024


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
    can; those of its own level do not. What waits too long is back in the first level with a fresh quantum.

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

    def __call__(self, request: Request) -> tuple[int, int]:
        """Level and arrival."""
        return self._level(request), request.id

    def begin(self, scheduler: Scheduler, now: int, step: Step) -> None:
        """Rank the arrivals, promote who starves, and make room for the head of the queue."""
        self._now = now
        for request in self.take_arrivals(scheduler):
            self._join(request)
            self.insert(scheduler, request)
        self._promote(scheduler)
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

    def _promote(self, scheduler: Scheduler) -> None:
        """To the first level, whoever has waited too long."""
        while self.wakes_at <= self._now:
            _, request = self._waits.popleft()
            scheduler.waiting.remove(request)
            place = self._places[request]
            place.level = 0
            place.bound = outputs(request) + self.quantum
            self.insert(scheduler, request)

    def _make_room(self, scheduler: Scheduler, step: Step) -> None:
        head = scheduler.waiting[0]
        level = self._places[head].level
        if level == self.last or scheduler.could_admit(head):
            return
        lower = [(self._level(request), request.id, request) for request in _preemptible(scheduler)]
        lower = sorted(entry for entry in lower if entry[0] > level)
        while lower and not scheduler.could_admit(head):
            scheduler.give_way(lower.pop()[2], step)

    def quiet_for(self, scheduler: Scheduler) -> int:
        """Until a running request falls below the level of the head of the queue."""
        if not scheduler.waiting:
            return FOREVER
        level = self._places[scheduler.waiting[0]].level
        steps = FOREVER
        if level < self.last:
            for request in _preemptible(scheduler):
                if self._level(request) > level:
                    return 0  # with the token that is on its way
                place = self._places[request]
                bound = place.bound + sum(self.quantum << each for each in range(place.level + 1, level + 1))
                steps = min(steps, bound - outputs(request))
        return steps


def _preemptible(scheduler: Scheduler) -> list[Request]:
    return [
        request
        for request in scheduler.running
        if len(request.sequences) == 1 and request.width == 1 and request.sequences[0].decodes is not None
    ]
