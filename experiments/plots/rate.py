"""Throughput and normalised latency against the request rate, with the rate at which policies saturate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import listed, number
from experiments.plots.lines import LATENCY, THROUGHPUT, merit_lines, points
from experiments.plots.results import Case, Experiment
from experiments.plots.series import alike
from experiments.plots.style import GREY, PAGE, colour, new_figure, upper_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LATENCY_LIMIT = 0.5
"""Seconds per token of mean normalised latency beyond which a policy counts as saturated.

Slower than people read (about 0.25 s a word) and some ten times the latency of a server with a short queue,
so that only a queue that keeps growing gets there; the middle of the latency axis of Fig. 12 in Kwon et al.
(SOSP 2023). Throughput under the offered load would tell the same of an endless run; in a finite one it also
counts the tail in which the last requests finish.
"""
_RING: dict[str, Any] = {
    "marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.1, "linestyle": "none",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Saturation:
    """Where a policy saturates: at `rate`, or somewhere below the lowest or above the highest swept rate."""

    rate: float
    below: bool = False
    above: bool = False

    def __str__(self) -> str:
        return ("below " if self.below else "above " if self.above else "") + number(self.rate)


def saturation(case: Case, axis: str, limit: float = LATENCY_LIMIT) -> Saturation | None:
    """The lowest rate at which latency passes a limit; between swept rates its logarithm is a line."""
    found = [(rate, latency.value) for rate, latency in points(case, axis, LATENCY)]
    if not found:
        return None
    if found[0][1] > limit:
        return Saturation(found[0][0], below=True)
    for (rate, latency), (next_rate, next_latency) in pairwise(found):
        if next_latency > limit:
            part = math.log(limit / latency) / math.log(next_latency / latency)
            return Saturation(rate + part * (next_rate - rate))
    return Saturation(found[-1][0], above=True)


def request_rate(experiment: Experiment) -> Drawing | None:
    """Two panels against the request rate; a ring marks saturation in both. None if no rate was swept."""
    axis = experiment.rate
    if axis is None:
        return None
    series = experiment.series(axis)
    found = {case.label: where for case in series if (where := saturation(case, axis))}
    if not found:
        return None
    figure = new_figure(PAGE, 2.75)
    left, right = figure.subplots(1, 2)
    last = experiment.axes[axis][-1]
    handles = merit_lines(left, experiment, axis, THROUGHPUT)
    others = left.plot((0, last), (0, last), color=GREY, linewidth=0.8, zorder=1, label="Offered load")
    merit_lines(right, experiment, axis, LATENCY)
    left.set_ylabel("Throughput (requests/s)")
    right.set_ylabel("Normalised latency (s/token)")
    most = max((value.value for case in series for _, value in points(case, axis, THROUGHPUT)), default=last)
    left.set_ylim(0, min(1.05 * last, 1.4 * most or last))
    for axes in (left, right):
        axes.set_title("")
    limit = right.axhline(LATENCY_LIMIT, color="black", linewidth=0.8, linestyle=(0, (1, 1.5)))
    limit.set_label(f"Limit, {LATENCY_LIMIT} s/token")
    others.append(limit)
    rings = [
        _ring(left, right, case, axis, found[case.label].rate)
        for case in series
        if case.label in found and not (found[case.label].below or found[case.label].above)
    ]
    upper_legend(figure, handles, PAGE, others + rings[:1])
    caption = _caption(experiment, axis, found)
    return Drawing(figure, "Throughput and latency against request rate", caption)


def _ring(left: Axes, right: Axes, case: Case, axis: str, rate: float) -> Any:
    """Mark a rate on a policy's line in both panels; returns a handle for the legend."""
    import numpy as np
    from matplotlib.lines import Line2D

    served = points(case, axis, THROUGHPUT)
    height = np.interp(rate, [place for place, _ in served], [value.value for _, value in served])
    left.plot([rate], [height], color=colour(case), **_RING)
    right.plot([rate], [LATENCY_LIMIT], color=colour(case), **_RING)
    return Line2D([], [], color="black", label="Saturation point", **_RING)


def _caption(experiment: Experiment, axis: str, found: dict[str, Saturation]) -> str:
    alike: dict[str, list[str]] = {}
    for label, where in found.items():
        alike.setdefault(str(where), []).append(label)
    every = ["all policies"] if len(found) > 1 and len(alike) == 1 else []
    told = listed([f"{where} ({'; '.join(every or labels)})" for where, labels in alike.items()])
    held = experiment.held(axis, experiment.beside(axis))
    return sentence(
        f"Throughput and normalised latency against the offered rate {held}".rstrip(),
        f"a policy saturates (ring) where its mean normalised latency passes {LATENCY_LIMIT} s/token, "
        f"interpolated between swept rates, in requests/s: {told}",
        _ratio(found),
        "intervals hold 95 %, over replications" if experiment.replicated else "",
    )


def _ratio(found: dict[str, Saturation]) -> str:
    """How far the best policy is ahead of the worst, as far as the swept rates tell."""
    worst = min(found, key=lambda label: (not found[label].below, found[label].rate))
    best = max(reversed(found), key=lambda label: (found[label].above, found[label].rate))
    if found[worst].above or found[best].below or alike(found[worst].rate, found[best].rate):
        return ""
    least = "at least " if found[worst].below or found[best].above else ""
    return f"{best} sustains {least}{found[best].rate / found[worst].rate:.1f} times the rate of {worst}"
