"""Figures over time: where the KV memory goes, and how many requests run and wait."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import listed, number, wrapped
from experiments.plots.results import Case, Experiment, bursts
from experiments.plots.series import Binned, mean, memory_over_time, recorded_until, steps_over_time
from experiments.plots.style import (
    GREY,
    PAGE,
    STATES,
    grid_shape,
    line_style,
    new_figure,
    percent_axis,
    plain_ticks,
    state_handles,
    upper_legend,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

_PANELS = 12
_LINES = 6
_BINS = 420  # over a page's width: finer would be noise at the size of print


def waste_over_time(experiment: Experiment) -> Drawing | None:
    """Stacked states of the KV memory over time, one panel per policy. None if no memory was recorded."""
    cases, end = _recorded(experiment.cases(6 if experiment.shown_axis else _PANELS), "memory")
    if not cases:
        return None
    rows, wide = grid_shape(len(cases))
    width = end * wide / _BINS
    unit, seconds = time_unit(end)
    figure = new_figure(PAGE, 0.45 + (1.55 if rows > 1 else 1.9) * rows)
    panels = figure.subplots(rows, wide, sharex=True, sharey=True, squeeze=False)
    slots = set()
    for axes, case in zip(panels.flat, cases, strict=False):
        binned = memory_over_time(case.first.folder, [state.column for state in STATES], width)
        slots.add(float(_total(binned).max()))
        _stack(axes, binned, seconds)
        _mark_end(axes, binned.edges[-1] / seconds, end / seconds)
        axes.set_title(wrapped(case.label, PAGE / wide - 0.3))
        axes.set_xlim(0, end / seconds)
        percent_axis(axes)
        plain_ticks(axes.xaxis)
    for axes in panels.flat[len(cases) :]:
        axes.set_axis_off()
    for axes in panels.flat[max(len(cases) - wide, 0) : len(cases)]:
        axes.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel(f"Time ({unit})", fontsize=8)
    figure.supylabel("Share of KV memory (%)", fontsize=8)
    upper_legend(figure, state_handles(), PAGE)
    caption = sentence(
        f"KV memory by state over the whole run {_where(experiment)}".rstrip()
        + (f" (100 % = {number(max(slots))} slots)" if len(slots) == 1 else ""),
        f"each value is the exact mean over {number(width, 2)} s, weighted by time",
        *experiment.left_out(len(cases)),
        experiment.one_of_several,
    )
    return Drawing(figure, "Waste over time", caption)


def running_batch(experiment: Experiment) -> Drawing | None:
    """Running and waiting requests over time, a line per policy. None if no steps were recorded."""
    cases, end = _recorded(experiment.cases(_LINES), "steps")
    if not cases:
        return None
    width = end / _BINS * 2
    unit, seconds = time_unit(end)
    figure = new_figure(PAGE, 3.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for case in cases:
        binned = steps_over_time(case.first.folder, ("running", "waiting"), width)
        middle = (binned.edges[:-1] + binned.edges[1:]) / 2 / seconds
        # Lines as restless as these are told apart by their markers; dashes would break up.
        look = line_style(case) | {"linestyle": "-", "markevery": (4 + 5 * case.rank, 27)}
        upper.plot(middle, binned.means["running"], label=case.label, **look)
        lower.plot(middle, binned.means["waiting"], **look)
    for axes, name in ((upper, "Running (requests)"), (lower, "Waiting (requests)")):
        axes.set_ylim(bottom=0)
        axes.set_ylabel(name)
        axes.grid(axis="y")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
    if lower.get_ylim()[1] < 1:
        lower.set_ylim(0, 1)
    lower.set_xlabel(f"Time ({unit})")
    lower.set_xlim(0, end / seconds)
    figure.align_ylabels((upper, lower))
    if len(cases) > 1:
        upper_legend(figure, upper.get_legend_handles_labels()[0], PAGE)
    means = [(case.label, mean([run.figure("mean_running") for run in case.runs]).value) for case in cases]
    told = [f"{number(value, zeros=True)} ({label})" for label, value in means if not math.isnan(value)]
    caption = sentence(
        f"Requests in the running batch and in the queue {_where(experiment)}".rstrip()
        + f", means over {number(width, 2)} s",
        f"mean batch over the loaded period: {listed(told)}" if told else "",
        *experiment.left_out(len(cases)),
        bursts(cases),
        experiment.one_of_several,
    )
    return Drawing(figure, "Running batch over time", caption)


def _recorded(cases: list[Case], table: str) -> tuple[list[Case], float]:
    """The cases whose first run has a table, and when the longest of those runs ends."""
    ends = {case.label: recorded_until(case.first.folder, table) for case in cases}
    return [case for case in cases if ends[case.label]], max(ends.values(), default=0.0)


def _stack(axes: Axes, binned: Binned, seconds: float) -> None:
    import numpy as np

    slots = _total(binned)
    time = np.repeat(binned.edges / seconds, 2)[1:-1]
    low = np.zeros_like(time)
    for state in STATES:
        high = low + np.repeat(100 * binned.means[state.column] / slots, 2)
        area = axes.fill_between(time, low, high, facecolor=state.face, linewidth=0, hatch=state.hatch)
        area.set_edgecolor(state.hatch_colour)
        low = high


def _total(binned: Binned) -> np.ndarray:
    """Slots of the device in every bin."""
    import numpy as np

    total: np.ndarray = np.sum([binned.means[state.column] for state in STATES], axis=0)
    return total


def _mark_end(axes: Axes, run: float, longest: float) -> None:
    """Where a run ends before the longest one, say so: what follows is not free memory."""
    axes.axvline(run, color="black", linewidth=0.6, clip_on=False)
    if run < 0.999 * longest:
        axes.axvspan(run, longest, facecolor="#EEEEEE", linewidth=0)
    if run < 0.8 * longest:
        axes.text((run + longest) / 2, 50, "finished", ha="center", va="center", color=GREY)


def _where(experiment: Experiment) -> str:
    return experiment.held(experiment.shown_axis or "")


def time_unit(seconds: float) -> tuple[str, float]:
    """A unit in which a span reads well, and its length in seconds."""
    return ("h", 3600.0) if seconds > 3 * 3600 else ("min", 60.0) if seconds > 1200 else ("s", 1.0)
