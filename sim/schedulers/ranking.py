"""Rankings: orders of the queue that follow what is served, and may send running requests back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections import deque
from typing import Any, Protocol

from sim.allocators.base import Allocator
from sim.decode_set import DecodeSet
from sim.request import Request
from sim.step import Step
from sim.units import FOREVER


class Queue(Protocol):
    """Who waits, and who decodes: a scheduler, as far as an order always knows it."""

    waiting: deque[Request]
    decodes: DecodeSet


class Ranked(Queue, Protocol):
    """A scheduler whose plan is about to begin, as an order may ask it, and have running requests give way."""

    allocator: Allocator
    running: dict[Request, int]

    @property
    def open_to_arrivals(self) -> bool:
        """Whether a request may be admitted that is not swapped out."""

    def could_admit(self, request: Request) -> bool:
        """Whether a request could be admitted now."""

    def give_way(self, request: Request, step: Step) -> None:
        """A running request gives up its memory."""


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
    def begin(self, scheduler: Ranked, now: int, step: Step) -> None:
        """Bring the queue into order; running requests may give way, which is noted in the step."""

    def admitted(self, queue: Queue, request: Request) -> None:  # noqa: B027 - most need not know
        """A request has left the queue and runs."""

    def requeued(self, request: Request) -> None:  # noqa: B027
        """A preempted request waits again."""

    def quiet_for(self, scheduler: Ranked) -> int:
        """Decode steps for which `begin` would change nothing that matters, counted as a scheduler's."""
        return FOREVER

    @property
    def wakes_at(self) -> int:
        """The time (ns) from which on `begin` may change something whoever is served."""
        return FOREVER

    def decode_set(self) -> DecodeSet:
        """The decode set that counts what the order wants to know."""
        return DecodeSet()

    def take_arrivals(self, queue: Queue) -> list[Request]:
        """Take the new ones off the end of the queue, in order of arrival."""
        waiting = queue.waiting
        arrived = [waiting.pop() for _ in range(self.arrivals)]
        self.arrivals = 0
        return arrived[::-1]

    def insert(self, queue: Queue, request: Request) -> None:
        """Put a request where its rank has it."""
        insort(queue.waiting, request, key=self)
