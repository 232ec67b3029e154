"""Sources: what submits requests to an engine, at their arrival or as answers allow."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterable
from itertools import groupby
from typing import Any

import simpy

from sim.engine import Engine
from sim.request import Request
from sim.units import FOREVER


class Source:
    """Requests as they fall due: at their arrival time, or when a client is free; and what answers lead to.

    Without `clients` each request arrives at its own time, in the order given. A number of clients makes a closed
    loop (Schroeder et al., NSDI 2006): all of them begin at once, and each sends a request, waits for its answer,
    thinks for `think_time` ns and sends the next; where a request is of a session, the client stays for all of it.
    Requests of sessions are numbered as they are sent. Of what falls due at one instant, arrivals come first, then
    what answers lead to, in the order of the answers.
    """

    def __init__(
        self,
        env: simpy.Environment,
        requests: Iterable[Request],
        *,
        clients: int | None = None,
        think_time: int = 0,
    ) -> None:
        self.env = env
        self.clients = clients
        self.think_time = think_time
        self._coming = iter(requests)
        self._visits = groupby(self._coming, lambda request: request.session or request)  # of a closed loop
        self._next_arrival = FOREVER  # of an open loop
        # A heap of what depends on answers: instant, rank, number, request; a client that is free if it is None.
        self._due: list[tuple[int, int, int, Request | None]] = []
        self._numbered = 0
        self._sent = 0
        self._alarm = FOREVER  # the instant of the next wake-up on the calendar
        self._sending = False
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Start sending to this engine."""
        self._engine = engine
        if self.clients is None:
            self._next_arrival = 0
            self.env.process(self._arrive(engine))
            return
        for _ in range(self.clients):
            self._push(0, 0, None)
        self._wait()

    def done(self, request: Request) -> None:
        """A request is over: something may follow, and its client may be free."""
        session = request.session
        if session is None and self.clients is None:
            return
        assert self._engine is not None
        now = max(self._engine.now, int(self.env.now))
        if session is not None:
            for delay, follower in session.answered(request):
                self._push(now + delay, 1, follower)
        if self.clients is not None and (session is None or session.over):
            self._push(now + self.think_time, 0, None)
        self._send_due(now)

    def _arrive(self, engine: Engine) -> Generator[simpy.Event, Any, None]:
        """Send the requests of an open loop at their arrival times."""
        env = self.env
        now = 0
        for request in self._coming:
            arrival = request.arrival_time
            if arrival > now:
                self._next_arrival = arrival
                if self._due:
                    self._send_due(now)
                else:
                    engine.next_arrival = arrival
                yield env.timeout(arrival - now)
                now = arrival
            if request.session is not None:
                self._send(request, now)
            else:
                engine.submit(request, now)
        self._next_arrival = FOREVER
        self._send_due(now)

    def _push(self, instant: int, rank: int, request: Request | None) -> None:
        self._numbered += 1
        heapq.heappush(self._due, (instant, rank, self._numbered, request))

    def _send_due(self, now: int) -> None:
        """Send all whose time has come, after what arrives by then; one that is refused may make others due."""
        if self._sending:
            return
        self._sending = True
        due = self._due
        while due and due[0][0] <= now < self._next_arrival:
            request = heapq.heappop(due)[3]
            if request is not None:
                self._send(request, now)
                continue
            _, visit = next(self._visits, (None, ()))
            for request in visit:
                self._send(request, now)
        self._sending = False
        self._wait()

    def _send(self, request: Request, now: int) -> None:
        assert self._engine is not None
        if request.session is not None:
            request.id = self._sent
            self._sent += 1
        self._engine.submit(request, now)

    def _wait(self) -> None:
        """Tell the engine when something falls due next, and be woken then."""
        assert self._engine is not None
        instant = self._due[0][0] if self._due else FOREVER
        self._engine.next_arrival = min(instant, self._next_arrival)
        if instant < self._alarm:
            self._alarm = instant
            event = self.env.timeout(instant - int(self.env.now))
            event.callbacks.append(self._ring)

    def _ring(self, event: simpy.Event) -> None:
        now = int(self.env.now)
        if self._alarm <= now:
            self._alarm = FOREVER
        self._send_due(now)
