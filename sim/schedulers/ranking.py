"""Rankings: orders of the queue that follow what is served, and may send running requests back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from typing import TYPE_CHECKING, Any

from sim.decode_set import DecodeSet
from sim.request import Request
from sim.step import Step
from sim.units import FOREVER

if TYPE_CHECKING:
    from sim.schedulers.base import Scheduler
    from sim.schedulers.queues import Queues


class Ranking(ABC):
    """An order with a memory: a request's rank changes while it waits.

    Like any order it is called with a request and gives its rank, the least first. It is asked before every plan
    (`begin`) and after every admission (`admitted`), and then leaves the queue sorted. New arrivals stand at the
    end of the queue, `arrivals` of them, until the next plan begins. What it decides may depend on the clock of the
    decode set and on the time, as long as it says when that could matter next (`quiet_for`, `wakes_at`).
    """

    def __init__(self) -> None:
        self.arrivals = 0  # at the end of the queue, not ranked yet

    @abstractmethod
    def __call__(self, request: Request) -> Any:
        """The rank of a request that waits."""

    @abstractmethod
    def begin(self, scheduler: Scheduler, now: int, step: Step) -> None:
        """Bring the queue into order; running requests may give way, which is noted in the step."""

    def admitted(self, queues: Queues, request: Request) -> None:  # noqa: B027 - most need not know
        """A request has left the queue and runs."""

    def requeued(self, request: Request) -> None:  # noqa: B027
        """A preempted request waits again."""

    def quiet_for(self, scheduler: Scheduler) -> int:
        """Decode steps for which `begin` would change nothing that matters, counted as a scheduler's."""
        return FOREVER

    @property
    def wakes_at(self) -> int:
        """The time (ns) from which on `begin` may change something whoever is served."""
        return FOREVER

    def decode_set(self) -> DecodeSet:
        """The decode set that counts what the order wants to know."""
        return DecodeSet()

    def take_arrivals(self, queues: Queues) -> list[Request]:
        """Take the new ones off the end of the queue, in order of arrival."""
        waiting = queues.waiting
        arrived = [waiting.pop() for _ in range(self.arrivals)]
        self.arrivals = 0
        return arrived[::-1]

    def insert(self, queues: Queues, request: Request) -> None:
        """Put a request where its rank has it."""
        insort(queues.waiting, request, key=self)
