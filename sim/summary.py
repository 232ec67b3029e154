"""Tallies behind a run's summary: latencies of requests, and memory weighted by time."""

from __future__ import annotations

import math
from array import array

import numpy as np
from numpy.typing import NDArray

from sim.request import NEVER

Ints = NDArray[np.int64]

THRASHING = 3
"""Prefills of one request from which on it counts as thrashed: it was preempted, and preempted again."""

PARTS = ("token_states", "reserved", "internal", "external", "free")


class LatencyTally:
    """Latencies of all finished requests, eight bytes each, so that percentiles are exact."""

    def __init__(self) -> None:
        self.finished = 0
        self.rejected = 0
        self.output_tokens = 0
        self.hit_tokens = 0
        self.admitted_prompt_tokens = 0
        self.most_prefills = 0
        self.thrashed = 0  # requests with so many
        self.first_admission: int | None = None
        self._samples = {name: array("d") for name in ("ttft", "tpot", "e2e", "normalized")}

    def add(
        self,
        times: dict[str, Ints],
        outputs: Ints,
        widths: Ints,
        prompts: Ints,
        cached: Ints,
        prefills: Ints,
    ) -> None:
        """Add requests that are over; times in ns, `NEVER` where they did not come."""
        admitted = times["first_scheduled_time"] != NEVER
        if admitted.any():
            first = int(times["first_scheduled_time"][admitted].min())
            self.first_admission = first if self.first_admission is None else min(first, self.first_admission)
        self.hit_tokens += int(cached.sum())
        self.most_prefills = max(self.most_prefills, int(prefills.max()))
        self.thrashed += int((prefills >= THRASHING).sum())
        self.admitted_prompt_tokens += int(prompts[admitted].sum())
        done = times["finish_time"] != NEVER
        count = int(done.sum())
        self.finished += count
        self.rejected += len(done) - count
        arrival, first_token, finish = (
            times[name][done] for name in ("arrival_time", "first_token_time", "finish_time")
        )
        output = outputs[done]
        self.output_tokens += int((output * widths[done]).sum())
        end_to_end = (finish - arrival) / 1e9
        several = output > 1
        self._extend("ttft", (first_token - arrival) / 1e9)
        self._extend("tpot", ((finish - first_token)[several] / (output[several] - 1)) / 1e9)
        self._extend("e2e", end_to_end)
        self._extend("normalized", end_to_end / output)

    def _extend(self, name: str, values: NDArray[np.float64]) -> None:
        self._samples[name].frombytes(np.ascontiguousarray(values).tobytes())

    def statistics(self) -> dict[str, float]:
        """Means and percentiles in seconds; NaN where no request finished."""
        figures: dict[str, float] = {}
        for name in ("ttft", "tpot", "e2e"):
            values = np.frombuffer(self._samples[name]) if self._samples[name] else np.array([np.nan])
            figures[f"{name}_mean_s"] = float(values.mean())
            for percent, value in zip((50, 90, 99), np.percentile(values, (50, 90, 99)), strict=True):
                figures[f"{name}_p{percent}_s"] = float(value)
        normalized = self._samples["normalized"]
        figures["normalized_latency_mean_s"] = (
            float(np.frombuffer(normalized).mean()) if normalized else math.nan
        )
        return figures


class MemoryTally:
    """Integrals over time of the memory's parts and of the batch, in whole slot-nanoseconds.

    The loaded period runs from the first instant at which a request waits after a refused admission to the
    last such instant. Where none is ever refused it runs from the first admission to the last arrival, or
    over the whole run where that has no length.
    """

    def __init__(self) -> None:
        self.max_running = 0
        self.max_waiting = 0
        self.saved = 0
        self.held = 0
        self.end = 0
        self._refused = _Period()
        self._arriving = _Period()

    def add(
        self,
        starts: Ints,
        durations: Ints,
        parts: dict[str, Ints],
        running: Ints,
        waiting: Ints,
        saved_blocks: Ints,
        joined_blocks: Ints,
        held: Ints,
        last_arrival: int,
    ) -> None:
        """Add rows in order of time; `last_arrival` is the latest arrival so far (ns)."""
        self.max_running = max(self.max_running, int(running.max()))
        self.max_waiting = max(self.max_waiting, int(waiting.max()))
        self.end = int(starts[-1] + durations[-1])
        self.held += exact_dot(held, durations)
        if saved_blocks.any():
            self.saved += exact_dot(saved_blocks, durations)
        ends = starts + durations
        listed = saved_blocks - joined_blocks
        columns = [*(parts[name] for name in PARTS), listed, running, np.ones_like(durations)]
        refused = np.flatnonzero(waiting)
        if len(refused):
            self._refused.begin_at(int(starts[refused[0]]))
            self._refused.until = int(ends[refused[-1]])
        self._refused.add(columns, starts, ends)
        if self._refused.begin is None:
            active = np.flatnonzero(running)
            if len(active):
                self._arriving.begin_at(int(starts[active[0]]))
            self._arriving.until = last_arrival
            self._arriving.add(columns, starts, ends)

    def averages(self, block_size: int = 0) -> dict[str, float]:
        """Over the loaded period: its length, the mean batch, shares of the capacity and of what is held.

        And the length of a running request's block tables, NaN where there are none (`block_size` 0).
        """
        period = self._arriving if self._refused.begin is None else self._refused
        sums = period.closed if period.closed[-1] else period.pending
        *parts, listed, running, time = sums
        total = sum(parts)
        held = sum(parts[:3])
        return {
            "loaded_s": time / 1e9,
            "mean_running": running / time if time else math.nan,
            "mean_table_length": (held / block_size + listed) / running
            if block_size and running
            else math.nan,
            "max_running": self.max_running,
            "max_waiting": self.max_waiting,
            **{
                f"{name}_share": part / total if total else math.nan
                for name, part in zip(PARTS, parts, strict=True)
            },
            **{
                f"allocated_{name}_share": part / held if held else math.nan
                for name, part in zip(PARTS[:3], parts, strict=False)
            },
        }


class _Period:
    """Sums from `begin` to `until`, the last instant known to belong to it, and of what may yet belong."""

    def __init__(self) -> None:
        self.begin: int | None = None
        self.until = 0
        self.closed = [0] * (len(PARTS) + 3)
        self.pending = [0] * (len(PARTS) + 3)

    def begin_at(self, instant: int) -> None:
        """Begin, unless it has begun."""
        if self.begin is None:
            self.begin = instant

    def add(self, columns: list[Ints], starts: Ints, ends: Ints) -> None:
        """Add rows that follow those added before."""
        if self.begin is None:
            return
        starts = np.maximum(starts, self.begin)
        inside = np.maximum(np.minimum(ends, self.until) - starts, 0)
        after = np.maximum(ends - np.maximum(starts, self.until), 0)
        if self.until >= starts[0]:  # what was pending belongs too, even if nothing of these rows does
            for index, column in enumerate(columns):
                self.closed[index] += self.pending[index] + exact_dot(column, inside)
                self.pending[index] = 0
        if after.any():
            for index, column in enumerate(columns):
                self.pending[index] += exact_dot(column, after)


def exact_dot(values: Ints, weights: Ints) -> int:
    """Sum of products in whole numbers, without overflow while a value is below 2**32."""
    total = 0
    for shift in (0, 31):
        half = (weights >> shift) & 0x7FFFFFFF
        if half.any():
            products = values * half
            total += (int((products >> 32).sum()) << 32 + shift) + (
                int((products & 0xFFFFFFFF).sum()) << shift
            )
    return total
