"""Figures along any other swept number: the block size with its waste, and figures of merit for the rest."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import axis_label, axis_name, listed, lowered, number, wrapped
from experiments.plots.lines import (
    BATCH,
    LATENCY,
    LIVE,
    OPTIONAL,
    THROUGHPUT,
    TOKENS,
    TPOT,
    TTFT,
    Merit,
    merit_lines,
    points,
)
from experiments.plots.results import BLOCK_SIZE, Case, Experiment, bursts, spread
from experiments.plots.series import alike
from experiments.plots.shares import bars, shares
from experiments.plots.style import PAGE, is_power_of_two, new_figure, state_handles, upper_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WASTE_PANELS = 3


def block_size(experiment: Experiment) -> Drawing | None:
    """Waste shares, throughput and latency against the block size."""
    if BLOCK_SIZE not in experiment.axes:
        return None
    series = experiment.series(BLOCK_SIZE)
    shown = spread(series, _WASTE_PANELS)
    one_row = len(shown) == 1
    figure = new_figure(PAGE, 2.7 if one_row else 4.7)
    grid = figure.add_gridspec(
        1 if one_row else 2, 6, width_ratios=(1.2, 1.2, 1, 1, 1, 1) if one_row else None
    )
    across = 6 // (3 if one_row else len(shown))
    waste = [figure.add_subplot(grid[0, i * across : (i + 1) * across]) for i in range(len(shown))]
    row, first = (0, 2) if one_row else (1, 0)
    half = (6 - first) // 2
    left = figure.add_subplot(grid[row, first : first + half])
    right = figure.add_subplot(grid[row, first + half : 6])
    for axes, case in zip(waste, shown, strict=True):
        _waste_bars(axes, case)
        axes.set_title("Waste" if one_row else wrapped(case.label, PAGE / len(shown) - 0.4))
    waste[0].set_ylabel("Share of KV memory (%)")
    for axes in waste[1:]:
        axes.tick_params(labelleft=False)
    lines = merit_lines(left, experiment, BLOCK_SIZE, TOKENS)
    merit_lines(right, experiment, BLOCK_SIZE, LATENCY)
    upper_legend(figure, [*state_handles(), *(lines if len(series) > 1 else [])], PAGE)
    return Drawing(figure, "Block size", _block_caption(experiment, series))


def _waste_bars(axes: Axes, case: Case) -> None:
    sizes = sorted({run.at[BLOCK_SIZE] for run in case.runs})
    each = [Case(number(size), [run for run in case.runs if run.at[BLOCK_SIZE] == size], 0) for size in sizes]
    doubled = all(is_power_of_two(size) for size in sizes)
    at = [math.log2(size) if doubled else float(i) for i, size in enumerate(sizes)]
    gap = min((b - a for a, b in pairwise(at)), default=1.0)
    bars(axes, each, at, 0.72 * gap, labels=False)
    step = 2 if len(sizes) > 6 else 1
    axes.set_xticks(at[::step], [number(size) for size in sizes[::step]])
    axes.set_xlabel(axis_label(BLOCK_SIZE))


def _block_caption(experiment: Experiment, series: list[Case]) -> str:
    case = series[-1]  # of several request rates the highest, where memory is scarce
    sizes = sorted({run.at[BLOCK_SIZE] for run in case.runs})
    empty = []
    for size in (sizes[0], sizes[-1]):
        share = shares([run for run in case.runs if run.at[BLOCK_SIZE] == size])
        if math.isnan(share["reserved"].value):
            continue
        empty.append(f"{number(share['reserved'].value + share['internal'].value)} % at {number(size)}")
    found = points(case, BLOCK_SIZE, TOKENS)
    best, value = max(found, key=lambda point: point[1].value)
    where = f"({case.label}) " if len(series) > 1 else ""
    return sentence(
        f"Waste, throughput and normalised latency against the block size {_held(experiment, series)}".rstrip(),
        f"slots allocated but still empty {where}take {' and '.join(empty)} slots a block" if empty else "",
        f"output throughput is highest at {number(best)} ({number(value.value)} tokens/s)",
        bursts(series),
        "intervals hold 95 %, over replications" if experiment.replicated else "",
    )


def _held(experiment: Experiment, series: list[Case]) -> str:
    """What other axes are held at; nothing where the lines run over their values."""
    return experiment.held(BLOCK_SIZE) if series[0].of is None else ""


def sweep(experiment: Experiment, axis: str) -> Drawing | None:
    """The main figures of merit against a swept number."""
    series = experiment.series(axis)
    merits: list[Merit] = [THROUGHPUT, LATENCY, TTFT, BATCH, LIVE]
    merits += [
        merit
        for merit in OPTIONAL
        if any(value.value for case in series for _, value in points(case, axis, merit))
    ] + [TPOT]
    merits = [merit for merit in merits if any(points(case, axis, merit) for case in series)]
    merits.sort(key=lambda merit: _constant(series, axis, merit))  # what nothing moves comes last
    merits = merits[:6]
    if not merits:
        return None
    rows = -(-len(merits) // 3)
    figure = new_figure(PAGE, 0.4 + 1.85 * rows)
    panels = figure.subplots(rows, 3, squeeze=False)
    handles = []
    for axes, merit in zip(panels.flat, merits, strict=False):
        handles = merit_lines(axes, experiment, axis, merit)
    for axes in panels.flat[len(merits) :]:
        axes.set_axis_off()
    if len(series) > 1:
        upper_legend(figure, handles, PAGE)
    name, _ = axis_name(axis)
    free = [axis] + (
        [other for other in experiment.axes if other != axis][:1] if len(experiment.policies) == 1 else []
    )
    along = [lowered(axis_name(path)[0]) for path in experiment.tied.get(axis, [])]
    return Drawing(
        figure,
        f"{name} sweep",
        sentence(
            f"Main figures of merit against {lowered(name)} {experiment.held(*free)}".rstrip(),
            f"{listed(along)} changed with it" if along else "",
            *(_range(case, axis) for case in series[:1]),
            bursts(series),
            "intervals hold 95 %, over replications" if experiment.replicated else "",
        ),
    )


def _constant(series: list[Case], axis: str, merit: Merit) -> bool:
    """Whether a figure of merit is the same within a hundredth at all points."""
    values = [value.value for case in series for _, value in points(case, axis, merit)]
    return alike(min(values), max(values))


def _range(case: Case, axis: str) -> str:
    found = points(case, axis, THROUGHPUT)
    if len(found) < 2:
        return ""
    _, unit = axis_name(axis)
    (low, at_low), (high, at_high) = found[0], found[-1]
    if alike(at_low.value, at_high.value):
        return ""
    return (
        f"{case.label}: {number(at_low.value)} requests/s at {number(low)} {unit}".rstrip()
        + f", {number(at_high.value)} at {number(high)} {unit}".rstrip()
    )
