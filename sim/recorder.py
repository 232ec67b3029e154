"""The recorder: append-only columns of requests, steps and memory, and exact sums over them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.request import NEVER, Request
from sim.summary import LatencyTally, MemoryTally

Columns = dict[str, NDArray[Any]]
Sink = Callable[[str, Columns], None]
Ints = NDArray[np.int64]

ROW = 14
"""Numbers kept of a request until they are columns."""
CHUNK = 1 << 15
"""Rows kept before they are turned into columns and handed on: what bounds the recorder's memory."""

REQUEST_COLUMNS = (
    "request_id", "arrival_time", "prompt_tokens", "output_tokens", "status", "reason",
    "first_scheduled_time", "first_token_time", "finish_time", "preemptions", "cached_tokens",
    "reused_tokens", "prefills", "tenant", "priority",
)  # fmt: skip


class Recorder:
    """Takes what happens in stretches, hands it on in columns.

    `sink(table, columns)` gets chunks of the tables `requests`, `steps` and `memory` that are switched on, in
    order of time; times in seconds, memory in slots. The sums behind the summary are kept whatever is
    switched on, in whole numbers, so that they do not depend on chunks or stretches.
    """

    def __init__(
        self, sink: Sink | None = None, *, requests: bool = True, steps: bool = True, memory: bool = True
    ) -> None:
        self._sink = sink
        self._wanted = {"requests": requests, "steps": steps, "memory": memory}
        self.latencies = LatencyTally()
        self.memory = MemoryTally()
        self.num_slots = 0
        self.num_steps = 0
        self.last_arrival = 0
        self._requests = array("q")  # thirteen figures a request
        self._others: dict[int, tuple[str, str]] = {}  # status and reason of those that did not finish
        # One row a stretch of steps: start, steps, prefill tokens, decoding sequences, running and waiting
        # requests, token states in the first step and more per step, blocks saved by sharing, blocks that tables have
        # no entry of their own for.
        self._stretches = array("q")
        self._covered = 0  # steps in them
        # One entry a step.
        self.durations = array("q")
        # Whenever it changes: entry of `durations` from which it holds, slots held, internal, external.
        self.usage = array("q")
        # Likewise, in stretches: entry after which every step moves so many slots from token states to internal.
        self.sliding = 0
        self._slides = array("q")

    def request(self, request: Request) -> None:
        """A request is over."""
        if request.status != "finished":
            self._others[len(self._requests) // ROW] = (request.status, request.reason)
        self._requests.extend(
            (
                request.id, request.arrival_time, request.prompt_tokens, request.output_tokens, request.width,
                request.first_scheduled_time, request.first_token_time, request.finish_time,
                request.preemptions, request.cached_tokens, request.reused_tokens, request.prefills, request.tenant,
                request.priority,
            )
        )  # fmt: skip
        if len(self._requests) >= ROW * CHUNK:
            self._flush_requests()

    def stretch(
        self,
        start: int,
        steps: int,
        prefill_tokens: int,
        decode_seqs: int,
        running: int,
        waiting: int,
        tokens: int,
        tokens_per_step: int,
        saved_blocks: int,
        joined_blocks: int = 0,
    ) -> None:
        """Steps that differ only in what was appended to the columns of single steps beforehand.

        A stretch that neither prefills nor decodes is a pause of the engine: it shows in the memory only.
        """
        self._stretches.extend(
            (
                start,
                steps,
                prefill_tokens,
                decode_seqs,
                running,
                waiting,
                tokens,
                tokens_per_step,
                saved_blocks,
                joined_blocks,
            )
        )
        self._covered += steps
        if self._covered >= CHUNK and self._covered == len(self.durations):
            self._flush_stretches()

    def steps(self, rows: Ints) -> None:
        """`stretch` for many steps that are stretches of one each; its arguments as rows, shape [steps, 10]."""
        self._stretches.frombytes(rows.tobytes())
        self._covered += len(rows)
        if self._covered >= CHUNK and self._covered == len(self.durations):
            self._flush_stretches()

    def slide(self, entry: int, slots: int) -> None:
        """From the step after this entry on, so many slots' tokens leave their windows in every step."""
        self.sliding = slots
        self._slides.extend((entry, slots))

    def slid(self, begin: int, end: int) -> int:
        """Slots whose tokens left their windows in the steps after entry `begin`, up to `end`."""
        total = 0
        for at in range(len(self._slides) - 2, -1, -2):
            entry, slots = self._slides[at], self._slides[at + 1]
            total += max(0, end - max(entry, begin)) * slots
            end = min(end, entry)
            if entry <= begin:
                break
        return total

    def close(self) -> None:
        """Hand on what is left."""
        self._flush_requests()
        self._flush_stretches()

    def _emit(self, table: str, columns: Columns) -> None:
        if self._sink is not None and self._wanted[table]:
            self._sink(table, columns)

    def _flush_requests(self) -> None:
        if not self._requests:
            return
        rows: Ints = np.array(self._requests).reshape(-1, ROW).T
        (
            ids, arrival, prompts, outputs, widths, scheduled, first_token, finish, preemptions, cached, reused,
            prefills, tenants, priorities,
        ) = rows  # fmt: skip
        status = np.full(len(ids), "finished", object)
        reason = np.full(len(ids), "", object)
        for index, (what, why) in self._others.items():
            status[index], reason[index] = what, why
        del self._requests[:]
        self._others.clear()
        times = {
            "arrival_time": arrival,
            "first_scheduled_time": scheduled,
            "first_token_time": first_token,
            "finish_time": finish,
        }
        self.latencies.add(times, outputs, widths, prompts, cached, prefills)
        columns: Columns = {
            "request_id": ids,
            "prompt_tokens": prompts,
            "output_tokens": outputs * widths,
            "status": status,
            "reason": reason,
            "preemptions": preemptions,
            "cached_tokens": cached,
            "reused_tokens": reused,
            "prefills": prefills,
            "tenant": tenants,
            "priority": priorities,
        }
        for name, values in times.items():
            columns[name] = np.where(values == NEVER, np.nan, values / 1e9)
        self._emit("requests", {name: columns[name] for name in REQUEST_COLUMNS})

    def _moved(self, entries: int) -> Ints:
        """Slots whose tokens left their windows up to each entry, had all steps been decode steps; starts anew."""
        rows: Ints = np.array(self._slides).reshape(-1, 2)
        begins = np.minimum(rows[:, 0] + 1, entries)
        per_step = np.zeros(entries, np.int64)
        per_step[begins[0] :] = np.repeat(rows[:, 1], np.diff(begins, append=entries))
        del self._slides[:]
        if self.sliding:
            self._slides.extend((-1, self.sliding))
        return np.cumsum(per_step)

    def _flush_stretches(self) -> None:
        if not self._stretches:
            return
        rows: Ints = np.array(self._stretches).reshape(-1, 10)
        durations: Ints = np.array(self.durations)
        usage: Ints = np.array(self.usage).reshape(-1, 4)
        lasting = np.diff(usage[:, 0], append=len(durations))
        held, internal, external = np.repeat(usage[:, 1:], lasting, axis=0).T
        moved = self._moved(len(durations)) if self._slides else None
        self._covered = 0
        for column in (self._stretches, self.durations, self.usage):
            del column[:]
        steps = rows[:, 1]
        first = np.repeat(np.cumsum(steps) - steps, steps)  # index of each step's first in its stretch
        starts, _, prefill, decodes, running, waiting, tokens, slope, saved, joined = np.repeat(
            rows, steps, axis=0
        ).T
        elapsed = np.cumsum(durations) - durations
        starts = starts + (elapsed - elapsed[first])
        tokens = tokens + (np.arange(len(first)) - first) * slope
        if moved is not None:
            tokens -= moved - moved[first]
            internal = internal + moved - moved[np.repeat(usage[:, 0], lasting)]
        parts = {
            "token_states": tokens,
            "reserved": held - tokens - internal,
            "internal": internal,
            "external": external,
            "free": self.num_slots - held - external,
        }
        self.memory.add(starts, durations, parts, running, waiting, saved, joined, held, self.last_arrival)
        busy = (prefill > 0) | (decodes > 0)
        self.num_steps += int(busy.sum())
        times = starts / 1e9
        if busy.all():
            busy = slice(None)
        self._emit(
            "steps",
            {
                "time": times[busy],
                "duration": durations[busy] / 1e9,
                "prefill_tokens": prefill[busy],
                "decode_seqs": decodes[busy],
                "running": running[busy],
                "waiting": waiting[busy],
            },
        )
        self._emit("memory", {"time": times, **parts})
