"""Workloads: the requests of a run, made one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from sim.errors import UserError
from sim.registry import NonNegativeFloat, PositiveFloat, PositiveInt, Registry
from sim.request import Request
from sim.units import FOREVER, to_ns
from workloads.arrivals import CHUNK, ArrivalProcess, Instants, arrivals
from workloads.csv_traces import Csv
from workloads.lengths import LengthSampler, lengths
from workloads.sampling import Make, Sampling
from workloads.sessions import SessionKind, session
from workloads.shared_prefixes import FewShot, Lead, Leads, SharedPrefix, SystemPrompts
from workloads.streams import Streams
from workloads.traces import TraceFormat, TraceRows, trace_format
from workloads.visits import Visit

workload: Registry[type[Workload]] = Registry("workload")

SESSIONS = 64
"""Sessions drawn at once; always so many, so that num_requests does not change what is drawn."""


_ONE_BRANCH = Sampling()
_CSV = Csv()


class Workload(ABC):
    """Where requests come from, as the simulator sees it.

    Its first parameters are the random streams and the longest sequence that the engine serves; the
    keyword-only ones are its YAML fields.
    """

    num_requests: int | None = None
    """Requests in all; None if nobody has counted them."""
    clients: int | None = None
    """Clients of a closed loop, whose requests carry no arrival time; None in an open one."""
    think_time: int = 0
    """Time (ns) between a client's answer and its next request."""
    sampling: Sampling = _ONE_BRANCH
    beams: tuple[float, int] | None = None
    """Turnover of beams and the seed of its draws; None without beam search."""
    content_grain: int = 0
    """Tokens that a recorded name of content stands for: blocks that divide it are found less often than they could
    be; 0 where content is known to the token, or not at all."""

    @abstractmethod
    def requests(self) -> Iterator[Request]:
        """The requests in order of arrival, ids from 0, made as they are asked for; the same every time."""

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(field, complaint) for options of a configuration that have no meaning beside the others."""
        sampling = config["workload"].get("sampling") or {}
        if sampling.get("beam_width", 1) == 1:
            yield "workload.sampling.beam_turnover", "has no meaning without beams, beam_width above 1"


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
        sampling: Sampling = _ONE_BRANCH,
        tenants: list[PositiveFloat] | None = None,
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
        self.beams = _beams(streams, sampling)
        self.tenants = _shares(tenants)
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
        return _dealt(chain.from_iterable(made), self.tenants, self.streams)

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


@workload("trace")
class Trace(Workload):
    """Requests recorded on a real system, replayed from a file that is never all in memory.

    Times count from the trace's own zero; in formats whose clock shows a date or the time of day, from the
    first request. With `start_s` they count from there.

    Fields:
        path: File of the trace, plain or gzipped.
        format: How the file is written.
        time_scale: Factor on all times: 2 halves the request rate.
        rate: Scale times so that the replayed requests arrive at this mean rate per second (their number less
            one, over the time from the first to the last); instead of time_scale.
        start_s: Leave out what arrives before, in the trace's time.
        window_s: Leave out what arrives this much or more after start_s, in the trace's time.
        num_requests: Stop after so many requests.
        sampling: Parallel samples or beams.
        tenants: Shares of the requests that each of several tenants sends (see synthetic).
    """

    def __init__(
        self,
        streams: Streams,
        max_model_len: int,
        *,
        path: Path,
        format: Annotated[TraceFormat, trace_format] = _CSV,  # noqa: A002
        time_scale: PositiveFloat = 1.0,
        rate: PositiveFloat | None = None,
        start_s: NonNegativeFloat = 0.0,
        window_s: PositiveFloat | None = None,
        num_requests: PositiveInt | None = None,
        sampling: Sampling = _ONE_BRANCH,
        tenants: list[PositiveFloat] | None = None,
    ) -> None:
        if rate is not None and time_scale != 1.0:
            raise UserError(f"rate and time_scale exclude each other: got {rate:g} and {time_scale:g}")
        self.path = path
        self.format = trace_format[format]() if isinstance(format, str) else format
        self.start = to_ns(start_s)
        self.window = FOREVER if window_s is None else to_ns(window_s)
        self.content_grain = self.format.content_grain
        self.limit = num_requests
        self.sampling = sampling
        self.beams = _beams(streams, sampling)
        self.streams = streams
        self.tenants = _shares(tenants)
        if rate is None:
            self.factor = time_scale
            next(self.format.read(path), None)  # a file that cannot be read is told of before anything runs
        else:
            self.num_requests, self.factor = self._scaled_to(rate)

    def requests(self) -> Iterator[Request]:
        """The requests. Raises UserError for a wrong row, with `file:line`, and for an empty window."""
        return _dealt(chain.from_iterable(self._chunks()), self.tenants, self.streams)

    def _chunks(self) -> Iterator[Iterator[Request]]:
        make = self.sampling.maker()
        first = 0
        for rows in self._window():
            times = rows.arrival_time
            if self.factor != 1.0:
                times = np.rint(times * self.factor).astype(np.int64)
            yield _made(make, first, rows.at(times), self.format.content_grain)
            first += len(rows)

    def _window(self) -> Iterator[TraceRows]:
        """The rows to replay, times since the start of the window."""
        left = FOREVER if self.limit is None else self.limit
        origin: int | None = None
        last = 0
        empty = True
        for rows in self.format.read(self.path):
            if origin is None:
                origin = self.start + (int(rows.arrival_time[0]) if self.format.absolute else 0)
            rows = rows.at(rows.arrival_time - origin)
            begin, end = np.searchsorted(rows.arrival_time, (0, self.window)).tolist()
            last = int(rows.arrival_time[-1])
            if begin < end:
                empty = False
                yield rows.part(begin, min(end, begin + left))
                left -= end - begin
            if left <= 0 or end < len(rows):
                break
        if empty:
            end_s = "" if self.window == FOREVER else f" and before {(self.start + self.window) / 1e9:g} s"
            raise UserError(
                f"{self.path}: got no request from {self.start / 1e9:g} s on{end_s}, expected start_s and "
                f"window_s to hold some; the last one looked at arrives at {(self.start + last) / 1e9:g} s"
            )

    def _scaled_to(self, rate: float) -> tuple[int, float]:
        """The number of requests to replay, and the factor on times that gives them this rate."""
        count, first, last = 0, 0, 0
        for rows in self._window():
            if not count:
                first = int(rows.arrival_time[0])
            count += len(rows)
            last = int(rows.arrival_time[-1])
        if last == first:
            raise UserError(
                f"rate: got {count} requests of {self.path} at one instant, expected some time between them"
            )
        return count, (count - 1) / rate * 1e9 / (last - first)


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


def _made(make: Make, first: int, rows: TraceRows, grain: int) -> Iterator[Request]:
    columns = (rows.arrival_time.tolist(), rows.prompt_tokens.tolist(), rows.output_tokens.tolist())
    ids = range(first, first + len(rows))
    if rows.content is None:
        return map(make, ids, *columns)
    return (
        make(id_, time, prompt, output, content=content, content_grain=grain)
        for id_, time, prompt, output, content in zip(ids, *columns, rows.content, strict=True)
    )


def _shares(tenants: list[float] | None) -> list[float] | None:
    """Where in 0 .. 1 the parts of the tenants behind the first begin. Raises UserError if there is no tenant."""
    if tenants is None:
        return None
    if not tenants:
        raise UserError("tenants: got no share, expected one for each tenant")
    ends = np.cumsum(tenants) / sum(tenants)
    return [float(end) for end in ends[:-1]]


def _dealt(requests: Iterator[Request], shares: list[float] | None, streams: Streams) -> Iterator[Request]:
    """The requests, each of a tenant; the draw of one does not depend on how many there are."""
    return requests if shares is None else _of_tenants(requests, shares, streams("tenants"))


def _of_tenants(
    requests: Iterator[Request], shares: list[float], rng: np.random.Generator
) -> Iterator[Request]:
    session = None
    tenant = 0
    for request in requests:
        if session is None or request.session is not session:  # a session is one tenant's
            session = request.session
            tenant = bisect_right(shares, rng.random())
        request.tenant = tenant
        yield request


def _beams(streams: Streams, sampling: Sampling) -> tuple[float, int] | None:
    if sampling.beam_width == 1:
        return None
    return sampling.beam_turnover, int(streams("sampling").integers(1 << 62))
