"""Runs of real servers: the times of every request, and the figures that a simulation of them is compared by."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.mistakes import near_file
from experiments.text import table
from sim.errors import UserError

Floats = NDArray[np.float64]

TOKENS = ("input_toks", "output_toks")
STAMPS = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
"""Instants on the engine's clock, in the order in which they come."""


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Times of the requests of a run in seconds since its first arrival, in order of arrival; all of one shape."""

    arrival: Floats
    scheduled: Floats
    first_token: Floats
    last_token: Floats
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    @property
    def ttft(self) -> Floats:
        """From the arrival to the first token."""
        return self.first_token - self.arrival

    @property
    def e2e(self) -> Floats:
        """From the arrival to the last token."""
        return self.last_token - self.arrival

    @property
    def tpot(self) -> Floats:
        """Between two tokens, of requests with more than one."""
        more = self.output_tokens > 1
        return (self.last_token - self.first_token)[more] / (self.output_tokens - 1)[more]

    @property
    def makespan(self) -> float:
        """From the first arrival to the last token."""
        return float(self.last_token.max())

    def figures(self) -> dict[str, float]:
        """The figures of a run; a request runs from its first scheduling to its last token."""
        makespan = self.makespan
        told: dict[str, float] = {
            "makespan s": makespan,
            "output tokens/s": float(self.output_tokens.sum()) / makespan,
            "mean running": float((self.last_token - self.scheduled).sum()) / makespan,
        }
        for name, times, unit in (("TTFT", self.ttft, 1), ("E2E", self.e2e, 1), ("TPOT", self.tpot, 1e3)):
            if len(times):
                label = f"{name} {{}} {'ms' if unit == 1e3 else 's'}"
                told[label.format("mean")] = float(times.mean()) * unit
                for share in (10, 50, 90, 99):
                    told[label.format(f"p{share}")] = float(np.quantile(times, share / 100)) * unit
        return told


def read_measured(path: Path) -> tuple[RequestTimes, list[int]]:
    """The requests of a file, a JSON object a line, and the line of each.

    Members: `arrival_time` on the client's clock, `queued_ts`, `scheduled_ts`, `first_token_ts`, `last_token_ts`
    on the engine's, all in seconds; `input_toks`, `output_toks`. The shortest time from an arrival to the queue
    is taken as none, which sets the two clocks against each other. Raises UserError with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        near = near_file(path) if isinstance(error, FileNotFoundError) else None
        hint = f", did you mean {near!r}?" if near else ""
        raise UserError(f"{path}: cannot be read: {reason}{hint}") from error
    rows = [(number, _row(f"{path}:{number}", line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: got no requests, expected a JSON object a line")
    rows.sort(key=lambda pair: pair[1]["arrival_time"])
    column = {name: np.array([row[name] for _, row in rows]) for name in ("arrival_time", *TOKENS, *STAMPS)}
    start = column["arrival_time"][0]
    offset = (column["queued_ts"] - column["arrival_time"]).min() + start
    times = RequestTimes(
        column["arrival_time"] - start,
        column["scheduled_ts"] - offset,
        column["first_token_ts"] - offset,
        column["last_token_ts"] - offset,
        column["input_toks"],
        column["output_toks"],
    )
    return times, [number for number, _ in rows]


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: got no JSON: {error.msg}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: got {line[:40]}, expected a JSON object")
    for name in ("arrival_time", *STAMPS):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{where}: {name}: got {value!r}, expected a time in seconds")
    for name in TOKENS:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: {name}: got {value!r}, expected a whole number >= 1")
    for earlier, later in pairwise(STAMPS):
        if row[earlier] > row[later]:
            raise UserError(f"{where}: {later}: got {row[later]}, before {earlier}, {row[earlier]}")
    return row


def comparison(title: str, measured: RequestTimes, predicted: RequestTimes) -> str:
    """Predicted against measured, a figure a line."""
    theirs, ours = measured.figures(), predicted.figures()
    rows = [
        [name, f"{value:,.4g}", f"{ours[name]:,.4g}", f"{100 * (ours[name] / value - 1):+.1f} %"]
        for name, value in theirs.items()
    ]
    return table(title, ["", "measured", "predicted", "error"], rows)
