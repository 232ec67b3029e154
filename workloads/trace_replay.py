"""Replayed traces: requests recorded on a real system."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np

from sim.errors import UserError
from sim.registry import NonNegativeFloat, PositiveFloat, PositiveInt
from sim.request import Request
from sim.units import FOREVER, to_ns
from workloads.csv_traces import Csv
from workloads.sampling import Make, Sampling
from workloads.streams import Streams
from workloads.tenants import Senders
from workloads.traces import TraceFormat, TraceRows, trace_format
from workloads.workload import ONE_BRANCH, Workload, beam_draws, workload

_CSV = Csv()


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
        priorities: Shares of the requests of each priority (see synthetic).
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
        sampling: Sampling = ONE_BRANCH,
        tenants: list[PositiveFloat] | None = None,
        priorities: list[PositiveFloat] | None = None,
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
        self.beams = beam_draws(streams, sampling)
        self.streams = streams
        self.senders = Senders(streams, tenants, priorities)
        if rate is None:
            self.factor = time_scale
            next(self.format.read(path), None)  # a file that cannot be read is told of before anything runs
        else:
            self.num_requests, self.factor = self._scaled_to(rate)

    def requests(self) -> Iterator[Request]:
        """The requests. Raises UserError for a wrong row, with `file:line`, and for an empty window."""
        return self.senders.deal(chain.from_iterable(self._chunks()))

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


def _made(make: Make, first: int, rows: TraceRows, grain: int) -> Iterator[Request]:
    columns = (rows.arrival_time.tolist(), rows.prompt_tokens.tolist(), rows.output_tokens.tolist())
    ids = range(first, first + len(rows))
    if rows.content is None:
        return map(make, ids, *columns)
    return (
        make(id_, time, prompt, output, content=content, content_grain=grain)
        for id_, time, prompt, output, content in zip(ids, *columns, rows.content, strict=True)
    )
