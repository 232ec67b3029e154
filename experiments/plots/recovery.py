"""What preemptions cost along a swept number: by swapping, by computing again, and where the two cross."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import log2
from typing import TYPE_CHECKING

from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import axis_name, lowered, number
from experiments.plots.lines import LATENCY, Merit, merit_lines, points
from experiments.plots.results import BLOCK_SIZE, Case, Experiment
from experiments.plots.style import PAGE, is_power_of_two, new_figure, upper_legend

if TYPE_CHECKING:
    from experiments.plots.series import Mean

COST = Merit("recovery_s", "Cost of preemption", "s", log=True)
LINK = Merit("swap_transfer_s", "Swaps on the link", "s", log=True)
ERROR = Merit("quantization_max_error", "Error of attention", "absolute", log=True)


def recovery(experiment: Experiment) -> Drawing | None:
    """Seconds that preemptions cost, seconds on the link, and latency, or the error where swaps are quantised."""
    axis = BLOCK_SIZE if BLOCK_SIZE in experiment.axes else next(iter(experiment.axes), None)
    if axis is None or len(experiment.policies) < 2:
        return None
    series = experiment.series(axis)
    if not any(run.figure("swap_transfer_s") > 0 for case in series for run in case.runs):
        return None
    figure = new_figure(PAGE, 2.4)
    panels = figure.subplots(1, 3)
    quantized = any(points(case, axis, ERROR) for case in series)
    handles = merit_lines(panels[0], experiment, axis, COST)
    merit_lines(panels[1], experiment, axis, LINK)
    merit_lines(panels[2], experiment, axis, ERROR if quantized else LATENCY)
    upper_legend(figure, handles, PAGE)
    name, _ = axis_name(axis)
    return Drawing(
        figure,
        "Cost of preemption",
        sentence(
            f"Seconds that swaps held computing up and that computing again added, against {lowered(name)} "
            f"{experiment.held(axis)}".rstrip(),
            *_crossings(experiment, series, axis),
            "the error is the largest against attention over what was not quantised, of values of unit variance"
            if quantized
            else "",
            "intervals hold 95 %, over replications" if experiment.replicated else "",
        ),
    )


def _crossings(experiment: Experiment, series: list[Case], axis: str) -> list[str]:
    """Of each two policies that differ everywhere and cross once, where."""
    told = []
    for one, other in combinations(series, 2):
        first, second = (dict(points(case, axis, COST)) for case in (one, other))
        places = crossings(first, second, all(is_power_of_two(place) for place in experiment.axes[axis]))
        same = any(first[place].value == second[place].value for place in first.keys() & second.keys())
        if len(places) == 1 and not same:
            cheaper = one if first[min(first)].value < second[min(second)].value else other
            dearer = other if cheaper is one else one
            told.append(
                f"{cheaper.label} costs less than {dearer.label} below {number(places[0])}, more above"
            )
    return told


def crossings(first: dict[float, Mean], second: dict[float, Mean], doubled: bool) -> list[float]:
    """Where one line cuts the other, between the places at which both are known.

    Straight lines are drawn between them, over the logarithm of the place if places double.
    """
    found = []
    for low, high in pairwise(sorted(first.keys() & second.keys())):
        before, after = (first[place].value - second[place].value for place in (low, high))
        if before * after < 0:
            share = before / (before - after)
            found.append(low * 2 ** (share * log2(high / low)) if doubled else low + share * (high - low))
    return found
