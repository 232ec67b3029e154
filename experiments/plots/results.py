"""What figures are drawn from: the runs of one experiment, sorted into policies, axes and replications."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.plots.labels import listed, setting

RATES = ("workload.arrivals.rate", "workload.rate")
SESSION_RATE = "workload.arrivals.session_rate"
"""What the request rate is called where each arrival begins a session, of as many requests as there are answers."""
BLOCK_SIZE = "allocator.block_size"
BURST = 0.01
"""Share of a run below which a loaded period says nothing of the run."""
_STATES = ("token_states", "reserved", "internal", "external", "free")
LOADED = {
    *("mean_running", "mean_table_length", "decode_attention_ms"),
    *(f"{state}_share" for state in _STATES),
    *(f"allocated_{state}_share" for state in _STATES[:3]),
}
"""Figures that are means over the loaded period."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its policy, where it lies on each swept axis, and its summary."""

    run_id: str
    folder: Path
    replication: int
    policy: str
    at: Mapping[str, float]
    summary: Mapping[str, Any]

    @property
    def burst(self) -> bool:
        """Whether memory was short for so little of the run that its means over that time say nothing of the run."""
        loaded, whole = self.summary.get("loaded_s"), self.summary.get("duration_s")
        return loaded is not None and whole is not None and 0 < loaded < BURST * whole

    def figure(self, key: str, scale: float = 1.0) -> float:
        """A figure of the summary, not-a-number where the run has none, or one over a burst only."""
        value = self.summary.get(key)
        if value is None or (self.burst and key in LOADED):
            return math.nan
        return float(value) * scale


@dataclass(frozen=True, slots=True)
class Case:
    """What gets one panel, bar or line: runs, with a label and a place in the palette."""

    label: str
    runs: list[Run]
    rank: int
    of: int | None = None  # number of ranks on a scale; None: a policy, not a value on an axis
    value: float = 0.0  # the value on that axis

    @property
    def first(self) -> Run:
        """The replication that stands for all where a figure shows a single run."""
        return self.runs[0]


@dataclass(frozen=True)
class Experiment:
    """Runs of one experiment; `axes` are the swept numbers that vary within a policy, in rising order."""

    directory: Path
    policies: list[str]
    axes: dict[str, list[float]]
    tied: dict[str, list[str]]  # axis -> other swept numbers that move with it
    runs: list[Run]

    @cached_property
    def rate(self) -> str | None:
        """The request-rate axis, or None if no rate was swept."""
        return next((axis for axis in RATES if axis in self.axes), None)

    @property
    def replicated(self) -> bool:
        """True if points were run several times."""
        return any(run.replication for run in self.runs)

    @cached_property
    def reference(self) -> dict[str, float]:
        """The point at which figures with room for one value per axis look.

        The highest rate, where memory is scarce; block size 16 where present; else the middle value.
        """
        return {
            axis: values[-1]
            if axis in (self.rate, SESSION_RATE)
            else 16.0
            if axis == BLOCK_SIZE and 16.0 in values
            else values[len(values) // 2]
            for axis, values in self.axes.items()
        }

    def runs_at(self, policy: str, at: Mapping[str, float]) -> list[Run]:
        """Replications of a policy at the given values of axes."""
        return [
            run
            for run in self.runs
            if run.policy == policy and all(run.at.get(axis) == value for axis, value in at.items())
        ]

    def cases(self, limit: int) -> list[Case]:
        """One case per policy at the reference point; of a single policy, one per value of its first axis."""
        if len(self.policies) > 1 or not self.axes:
            found = [
                Case(policy, self.runs_at(policy, self.reference), rank)
                for rank, policy in enumerate(self.policies)
            ]
        else:
            axis = self._leading_axis
            values = self.axes[axis]
            found = [
                Case(
                    setting(axis, value),
                    self.runs_at(self.policies[0], {**self.reference, axis: value}),
                    rank,
                    len(values),
                    value,
                )
                for rank, value in enumerate(values)
            ]
        return spread([case for case in found if case.runs], limit)

    def series(self, axis: str, limit: int = 6) -> list[Case]:
        """Lines along an axis: one per policy, or of one policy one per value of a second axis.

        Along the request rate several policies are drawn at every value of a second axis, if there is room.
        """
        held = {name: value for name, value in self.reference.items() if name != axis}
        if beside := self.beside(axis, limit):
            pairs = [(policy, value) for policy in self.policies for value in self.axes[beside]]
            found = [
                Case(
                    f"{policy}, {setting(beside, value)}",
                    self.runs_at(policy, {**held, beside: value}),
                    rank,
                )
                for rank, (policy, value) in enumerate(pairs)
            ]
            return [case for case in found if case.runs]
        if len(self.policies) == 1 and held:
            other, values = next(iter(held)), self.axes[next(iter(held))]
            found = [
                Case(
                    setting(other, value),
                    self.runs_at(self.policies[0], {**held, other: value}),
                    rank,
                    len(values),
                    value,
                )
                for rank, value in enumerate(values)
            ]
            return spread([case for case in found if case.runs], limit)
        found = [Case(policy, self.runs_at(policy, held), rank) for rank, policy in enumerate(self.policies)]
        return [case for case in found if case.runs]

    def beside(self, axis: str, limit: int = 6) -> str | None:
        """The second axis whose values all stand in a figure along the request rate."""
        others = [name for name in self.axes if name != axis]
        if axis != self.rate or len(self.policies) == 1 or not others:
            return None
        return others[0] if len(self.policies) * len(self.axes[others[0]]) <= limit else None

    def held(self, *free: str | None) -> str:
        """`at 2 requests/s`: the reference values of all axes but `free`; empty if there are none."""
        told = [setting(axis, value) for axis, value in self.reference.items() if axis not in free]
        return f"at {listed(told)}" if told else ""

    def left_out(self, shown: int) -> list[str]:
        """What a figure of `shown` cases says about those it has no room for."""
        axis = self.shown_axis
        there = len(self.axes[axis]) if axis else len(self.policies)
        return [f"{shown} of {there} {'values' if axis else 'policies'} shown"] if shown < there else []

    @property
    def one_of_several(self) -> str:
        """What a figure of single runs says where points were run several times."""
        return "first of several replications" if self.replicated else ""

    @property
    def shown_axis(self) -> str | None:
        """The axis along which `cases` run, None if they are policies."""
        return self._leading_axis if len(self.policies) == 1 and self.axes else None

    @property
    def _leading_axis(self) -> str:
        return next((axis for axis in self.axes if axis != self.rate), next(iter(self.axes)))


def bursts(cases: list[Case]) -> str:
    """What the caption of a figure says of runs whose means over the loaded period it leaves out."""
    runs = [run for case in cases for run in case.runs]
    number = sum(run.burst for run in runs)
    what = f"whose memory was short for less than {100 * BURST:g} % of their time"
    return f"left out: {number} of {len(runs)} runs, {what}" if number else ""


def spread(cases: list[Case], limit: int) -> list[Case]:
    """At most `limit` cases, the first and the last among them, the others evenly between."""
    if len(cases) <= limit:
        return cases
    last = len(cases) - 1
    steps = next((n for n in range(limit - 1, limit // 2, -1) if last % n == 0), limit - 1)
    return [cases[round(i * last / steps)] for i in range(steps + 1)]
