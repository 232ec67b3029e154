"""Synthetic workloads: arrivals and lengths drawn from distributions, shared prefixes and sessions around them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Annotated

import numpy as np

from sim.errors import UserError
from sim.registry import PositiveFloat, PositiveInt
from sim.request import Request
from sim.units import FOREVER
from workloads.arrivals import CHUNK, ArrivalProcess, Instants, arrivals
from workloads.lengths import LengthSampler, lengths
from workloads.sampling import Make, Sampling
from workloads.sessions import SessionKind, session
from workloads.shared_prefixes import FewShot, Lead, Leads, SharedPrefix, SystemPrompts
from workloads.streams import Streams
from workloads.tenants import Senders
from workloads.visits import Visit
from workloads.workload import ONE_BRANCH, Workload, beam_draws, workload

SESSIONS = 64
"""Sessions drawn at once; always so many, so that num_requests does not change what is drawn."""


@workload("synthetic")
class Synthetic(Workload):
    """Requests of an arrival process and a length distribution, and the sessions that some of them begin.

    The first are the same however many there are. A prompt is what its system prompt and its few-shot examples
    say, then the tokens that `lengths` tells. With a session each arrival begins one, and what answers lead to
    counts among the requests; the last session is cut short.

    Fields:
        num_requests: Requests in all.
        arrivals: When they come, or when sessions begin.
        lengths: How long prompts and outputs are.
        system_prompts: System prompts that many requests share; none by default.
        few_shot: Instructions and examples that all requests of a task share; none by default.
        session: What answers lead to; nothing by default.
        sampling: Parallel samples or beams.
        tenants: Shares of the requests that each of several tenants sends, in any unit; all are of one tenant
            by default. Who sends a request is drawn at random.
        priorities: Shares of the requests that have priority 0, 1, 2 and so on, in any unit; 0 goes first, as in
            vLLM. All have 0 by default.
    """

    def __init__(
        self,
        streams: Streams,
        max_model_len: int,
        *,
        num_requests: PositiveInt,
        arrivals: Annotated[ArrivalProcess, arrivals],
        lengths: Annotated[LengthSampler, lengths],
        system_prompts: SystemPrompts | None = None,
        few_shot: FewShot | None = None,
        session: Annotated[SessionKind, session] | None = None,
        sampling: Sampling = ONE_BRANCH,
        tenants: list[PositiveFloat] | None = None,
        priorities: list[PositiveFloat] | None = None,
    ) -> None:
        self.streams = streams
        self.max_model_len = max_model_len
        self.num_requests: int = num_requests
        self.arrivals = arrivals
        self.lengths = lengths
        self.session = session
        self.clients = arrivals.clients
        self.think_time = arrivals.think_time
        self.sampling = sampling
        self.beams = beam_draws(streams, sampling)
        self.senders = Senders(streams, tenants, priorities)
        self.pools: list[SharedPrefix] = [pool for pool in (system_prompts, few_shot) if pool is not None]
        if self.pools:
            shortest = Leads(streams, self.pools).shortest
            if shortest >= max_model_len:
                raise UserError(
                    f"shared prefixes: got {shortest} tokens at least before each prompt, expected less than the "
                    f"{max_model_len} tokens of max_model_len"
                )

    def requests(self) -> Iterator[Request]:
        """The requests, with sessions those that begin one. Raises UserError if the clock cannot tell the last one."""
        made = self._chunks() if self.session is None else self._visits(self.session)
        return self.senders.deal(chain.from_iterable(made))

    def _chunks(self) -> Iterator[Iterator[Request]]:
        make = self.sampling.maker()
        leads = Leads(self.streams, self.pools).chunks(CHUNK)
        lengths_rng = self.streams("lengths")
        for ids, instants in self._instants(CHUNK):
            # Always a whole chunk, so that num_requests does not change what is drawn.
            prompts, outputs = self.lengths.sample(lengths_rng, CHUNK, self.max_model_len)
            columns = (ids, instants, prompts.tolist(), outputs.tolist())
            if self.pools:
                yield _with_leads(make, zip(*columns, next(leads), strict=False))
            else:
                yield map(make, *columns)

    def _visits(self, kind: SessionKind) -> Iterator[list[Request]]:
        make = self.sampling.maker()
        leads = Leads(self.streams, self.pools).chunks(SESSIONS)
        lengths_rng, session_rng = self.streams("lengths"), self.streams("sessions")
        left = self.num_requests
        for ids, instants in self._instants(SESSIONS):
            scripts = kind.scripts(session_rng, SESSIONS)
            size = sum(len(wave) for script in scripts for wave in script.waves)
            lengths = self.lengths.sample(lengths_rng, size, self.max_model_len)
            prompts, outputs = (iter(tokens.tolist()) for tokens in lengths)
            begins = next(leads) if self.pools else [Lead()] * SESSIONS
            for number, instant, script, lead in zip(ids, instants, scripts, begins, strict=False):
                visit = Visit(
                    number, script, lead, prompts, outputs, longest=self.max_model_len, limit=left, make=make
                )
                yield visit.begin(instant)
                left -= visit.size
                if not left:
                    return

    def _instants(self, size: int) -> Iterator[tuple[range, list[int]]]:
        """Numbers and arrival times (ns) of what arrives, in chunks of this size, the last one cut short."""
        times = _regular(self.arrivals.times(self.streams("arrivals")), size)
        for first in range(0, self.num_requests, size):
            ids = range(first, min(first + size, self.num_requests))
            instants = next(times)[: len(ids)]
            if instants[-1] >= FOREVER:
                raise UserError(
                    f"arrivals: got request {first + int(np.argmax(instants >= FOREVER))} after more than "
                    f"{FOREVER / 365.25 / 86400e9:.0f} years, expected a higher rate"
                )
            yield ids, instants.tolist()


def _regular(chunks: Iterator[Instants], size: int) -> Iterator[Instants]:
    """The same instants in chunks of one size."""
    held: list[Instants] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += len(chunk)
        if count >= size:
            joined = np.concatenate(held)
            whole = count - count % size
            yield from np.split(joined[:whole], range(size, whole, size))
            held, count = [joined[whole:]], count - whole


def _with_leads(make: Make, rows: Iterator[tuple[int, int, int, int, Lead]]) -> Iterator[Request]:
    """Requests behind their shared prefixes."""
    return (
        make(id_, time, lead.tokens + prompt, output, content=lead.names, content_ends=lead.ends)
        for id_, time, prompt, output, lead in rows
    )
