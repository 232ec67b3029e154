"""Livelock: requests that preempt each other again and again, and engines that cannot go on."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from sim.errors import Stalled
from sim.request import Request
from sim.schedulers.base import Scheduler

PATIENCE = 100
"""Preemptions without a token in between, four for each live request or so many, after which it is a livelock."""


class Livelock:
    """Counts preemptions since anybody got a token."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._progress = 0, 0  # decode steps and prefills at the last preemption
        self._fruitless = 0  # preemptions since there was progress

    def watch(self, preempted: Ordered[Request], prefills: int, live: int, now: int) -> None:
        """Note preemptions of a plan at `now` (ns), after so many prefills, with so many requests in the system.

        Raises Stalled if requests preempt each other again and again, and none of them gets a token.
        """
        scheduler = self.scheduler
        progress = scheduler.decodes.clock, prefills
        if progress != self._progress:
            self._progress = progress
            self._fruitless = 0
        self._fruitless += len(preempted)
        if self._fruitless > max(PATIENCE, 4 * live):
            raise Stalled(
                f"livelock at {now / 1e9:.6f} s: {self._fruitless} preemptions in a row without a token; "
                f"last {', '.join(map(str, preempted[:3]))}, each prefilled up to "
                f"{max(request.prefills for request in preempted)} times; running "
                f"{len(scheduler.running)}, waiting {scheduler.num_waiting}, "
                f"memory {scheduler.allocator.usage()}"
            )


def standstill(scheduler: Scheduler, now: int) -> Stalled:
    """The error of an engine with requests of which none can go on."""
    request = next(iter([*scheduler.waiting, *scheduler.swapped, *scheduler.running]))
    return Stalled(
        f"nothing can proceed at {now / 1e9:.6f} s: {request} is {request.status} and needs slots for "
        f"{request.prefill_tokens} tokens; running {len(scheduler.running)}, waiting {len(scheduler.waiting)}, "
        f"swapped {len(scheduler.swapped)}, memory {scheduler.allocator.usage()}"
    )
