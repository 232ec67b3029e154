"""Sources: the SimPy processes that submit requests to an engine."""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import simpy

from sim.request import Request
from sim.units import FOREVER

if TYPE_CHECKING:
    from sim.engine import Engine


def open_loop(
    env: simpy.Environment, engine: Engine, requests: Iterable[Request]
) -> Generator[simpy.Event, Any, None]:
    """Submit each request at its arrival time (ns), in the order given."""
    now = 0
    for request in requests:
        arrival = request.arrival_time
        if arrival > now:
            engine.next_arrival = arrival
            yield env.timeout(arrival - now)
            now = arrival
        engine.submit(request, now)
    engine.next_arrival = FOREVER


class ClosedLoop:
    """Clients that each send a request, wait for its answer, think, and send the next (Schroeder et al., NSDI 2006).

    All clients begin at once. `think_time` in ns.
    """

    def __init__(
        self, env: simpy.Environment, requests: Iterable[Request], *, clients: int, think_time: int
    ) -> None:
        self.env = env
        self.requests: Iterator[Request] = iter(requests)
        self.think_time = think_time
        self._due: list[int] = [0] * clients  # heap of the instants at which a client sends
        self._engine: Engine | None = None
        self._wake: simpy.Event | None = None
        self._sending = False

    def attach(self, engine: Engine) -> None:
        """Start sending to this engine."""
        self._engine = engine
        engine.next_arrival = 0
        self.env.process(self._run())

    def done(self, request: Request) -> None:
        """A request is over: its client thinks, then sends the next."""
        assert self._engine is not None
        heapq.heappush(self._due, max(self._engine.now, int(self.env.now)) + self.think_time)
        self._send_due()
        if self._wake is not None and self._due:
            self._wake.succeed()
            self._wake = None

    def _send_due(self) -> None:
        """Send for every client whose time has come; a request refused at once makes its client due again."""
        engine = self._engine
        assert engine is not None
        if self._sending:
            return
        self._sending = True
        now = max(engine.now, int(self.env.now))
        while self._due and self._due[0] <= now:
            request = next(self.requests, None)
            if request is None:
                self._due.clear()
                self.requests = iter(())
                break
            heapq.heappop(self._due)
            engine.submit(request, now)
        self._sending = False
        engine.next_arrival = self._due[0] if self._due else FOREVER

    def _run(self) -> Generator[simpy.Event, Any, None]:
        env = self.env
        while True:
            self._send_due()
            if self._due:
                yield env.timeout(self._due[0] - env.now)
            else:
                self._wake = simpy.Event(env)
                yield self._wake
