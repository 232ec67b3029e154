"""Panels of bars: one figure of the runs in each, a bar for each policy with its value on top."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.plots.labels import number, wrapped
from experiments.plots.results import Case, Run
from experiments.plots.series import Mean, mean
from experiments.plots.style import PAGE, colour, new_figure, plain_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Panel:
    """What one panel shows: its title, the unit, and the figure of a run, not-a-number where it has none."""

    label: str
    unit: str
    figure: Callable[[Run], float]

    def value(self, case: Case) -> Mean:
        """The mean over replications."""
        return mean([self.figure(run) for run in case.runs])

    def known(self, cases: Sequence[Case]) -> list[tuple[int, Mean]]:
        """Places and values of the cases that have one."""
        values = [self.value(case) for case in cases]
        return [(at, value) for at, value in enumerate(values) if not math.isnan(value.value)]


def bar_panels(cases: Sequence[Case], panels: Sequence[Panel], *, upright: bool = True) -> Figure:
    """A figure of panels side by side; long names stand below the last one only if they are not `upright`."""
    figure = new_figure(PAGE, 2.2 if upright else 2.0 + 0.12 * len(cases))
    grid = figure.subplots(1, len(panels), sharey=not upright, squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        if upright:
            _upright(axes, cases, panel)
        else:
            _lying(axes, cases, panel)
    return figure


def _upright(axes: Axes, cases: Sequence[Case], panel: Panel) -> None:
    known = panel.known(cases)
    halves = [value.half for _, value in known]
    axes.bar(
        [at for at, _ in known],
        [value.value for _, value in known],
        0.62,
        yerr=halves if any(halves) else None,
        color=[colour(cases[at]) for at, _ in known],
    )
    labels = [number(value.value, 2, zeros=True) for _, value in known]
    size = (
        "small" if len(known) > 3 and max(map(len, labels)) > 4 else None
    )  # else they would touch each other
    for (at, value), label in zip(known, labels, strict=True):
        axes.annotate(
            label, (at, value.value + value.half), (0, 1.5), textcoords="offset points",
            ha="center", va="bottom", fontsize=size,
        )  # fmt: skip
    axes.margins(y=0.12)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.set_xticks(range(len(cases)), [wrapped(case.label, 0.45) for case in cases])
    axes.set_title(f"{panel.label}\n({panel.unit})")


def _lying(axes: Axes, cases: Sequence[Case], panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    known = panel.known(cases)
    halves = [value.half for _, value in known]
    axes.barh(
        [at for at, _ in known],
        [value.value for _, value in known],
        0.62,
        xerr=halves if any(halves) else None,
        color=[colour(cases[at]) for at, _ in known],
    )
    for at, value in known:
        axes.annotate(
            number(value.value, 3, zeros=True), (value.value + value.half, at), (2, 0), textcoords="offset points",
            ha="left", va="center",
        )  # fmt: skip
    axes.margins(x=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    plain_ticks(axes.xaxis)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_yticks(range(len(cases)), [case.label for case in cases])
    axes.set_title(panel.label)
    axes.set_xlabel(panel.unit)
