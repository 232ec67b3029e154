"""Figures of shares: stacked bars of what the KV memory holds, with value labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import LETTER, axis_label, number, wrapped
from experiments.plots.results import Case, Experiment, Run, bursts
from experiments.plots.series import Mean, mean
from experiments.plots.style import (
    COLUMN,
    PAGE,
    STATES,
    new_figure,
    percent_axis,
    state_handles,
    upper_legend,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BARS = 18
_LABELLED = 6  # bars in a row that have room for a policy's name
_INSIDE = 5.5  # a segment of at least this share carries its label inside
_APART = 5.5  # least distance of two labels beside a bar


def shares(runs: list[Run]) -> dict[str, Mean]:
    """Share of each state over the loaded period in per cent, over replications."""
    return {
        state.column: mean([run.figure(f"{state.column}_share", 100) for run in runs]) for state in STATES
    }


def waste_shares(experiment: Experiment) -> Drawing | None:
    """One stacked bar per policy, as in Fig. 2 of the PagedAttention paper (Kwon et al., SOSP 2023)."""
    cases = [case for case in experiment.cases(_BARS) if not math.isnan(shares(case.runs)["free"].value)]
    if not cases:
        return None
    axis = experiment.shown_axis
    width = COLUMN if len(cases) <= 4 and (axis or _fits(cases, COLUMN)) else PAGE
    rows = 1 if axis else -(-len(cases) // _LABELLED)
    across = -(-len(cases) // rows)
    figure = new_figure(width, 2.9 if rows == 1 else 0.4 + 2.4 * rows)
    margin = 0.5 + max(3 - across, 0) / 2  # a bar that is alone does not fill the figure
    for row, axes in enumerate(figure.subplots(rows, 1, squeeze=False).flat):
        shown = cases[row * across : (row + 1) * across]
        bars(axes, shown, [float(i) for i in range(len(shown))], 0.58)
        axes.set_xlim(-margin, across - 1 + margin + 0.12)
        names = [number(case.value) if axis else wrapped(case.label, _room(width, across)) for case in shown]
        axes.set_xticks(range(len(shown)), names)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("Share of KV memory (%)")
        if axis:
            axes.set_xlabel(axis_label(axis))
    upper_legend(figure, state_handles(), width)
    return Drawing(figure, "Waste shares", _caption(experiment, cases))


def _room(width: float, across: int) -> float:
    """Inches for the label of a bar."""
    return (width - 0.5) / (across + 0.12) - 0.05


def _fits(cases: list[Case], width: float) -> bool:
    """Whether no word of a label is wider than there is room for it."""
    words = " ".join(case.label.replace(",", " ") for case in cases).split()
    return LETTER * max(map(len, words)) <= _room(width, len(cases))


def bars(axes: Axes, cases: list[Case], at: list[float], width: float, labels: bool = True) -> None:
    """Stacked bars of all states at the given places, labelled inside or, where too thin, at the right."""
    percent_axis(axes)
    for case, place in zip(cases, at, strict=True):
        low = 0.0
        beside: list[tuple[float, str]] = []
        for state in STATES:
            share = shares(case.runs)[state.column]
            axes.bar(
                place,
                share.value,
                width,
                low,
                facecolor=state.face,
                edgecolor=state.hatch_colour,
                hatch=state.hatch,
                linewidth=0,
            )
            text = f"{share.value:.1f}"
            if labels and share.value >= _INSIDE:
                box = None if state.ink == "white" or not state.hatch else _plate(state.face)
                axes.text(
                    place, low + share.value / 2, text, ha="center", va="center", color=state.ink, bbox=box
                )
            elif labels and share.value >= 0.05:
                beside.append((low + share.value / 2, text))
            low += share.value
        axes.bar(place, low, width, facecolor="none", edgecolor="black", linewidth=0.6, clip_on=False)
        for height, (middle, text) in zip(apart([y for y, _ in beside]), beside, strict=True):
            edge = place + width / 2
            axes.plot((edge, edge + 0.05), (middle, height), color="black", linewidth=0.5, clip_on=False)
            axes.text(edge + 0.07, height, text, ha="left", va="center")


def apart(heights: list[float]) -> list[float]:
    """Rising heights moved to be at least a label apart and inside the axis, as little as needed."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + _APART) if placed else max(height, _APART / 2))
    top = 100 - _APART / 2
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], top)
        top = placed[i] - _APART
    return placed


def _plate(face: str) -> dict[str, object]:
    return {"facecolor": face, "edgecolor": "none", "boxstyle": "round,pad=0.06"}


def _caption(experiment: Experiment, cases: list[Case]) -> str:
    held = experiment.held(experiment.shown_axis or "")
    live = {case.label: shares(case.runs)["token_states"].value for case in cases}
    best, worst = max(live, key=lambda label: live[label]), min(live, key=lambda label: live[label])
    compared = (
        f"token states fill from {live[worst]:.1f} % ({worst}) to {live[best]:.1f} % ({best})"
        if live[best] - live[worst] >= 1
        else f"token states fill {live[best]:.1f} %"
    )
    busy = 100 - shares(next(case.runs for case in cases if case.label == best))["free"].value
    compared += f", {100 * live[best] / busy:.1f} % of what is not free" if busy > 0 else ""
    widest = max(share.half for case in cases for share in shares(case.runs).values())
    n = min(len(case.runs) for case in cases)
    return sentence(
        f"KV memory by state {held}".rstrip() + ", weighted by time over the loaded period",
        compared,
        *experiment.left_out(len(cases)),
        bursts(experiment.cases(_BARS)),
        f"means of {n} replications, 95 % intervals at most ± {number(widest, 2)} points" if n > 1 else "",
    )
