"""Where prompts are found: hits by tier, stacked, and what they are worth in the time to the first token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import wrapped
from experiments.plots.lines import Merit, merit_lines, points
from experiments.plots.results import Case, Experiment
from experiments.plots.series import alike, mean
from experiments.plots.style import GREY, PAGE, STATES, new_figure, percent_axis, upper_legend
from experiments.summary_table import tiers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TTFT = Merit("ttft_mean_s", "Time to first token", "s")
_BARS = 6
_INSIDE = 6.0  # a segment of at least this share is labelled


def hits_by_tier(experiment: Experiment) -> Drawing | None:
    """A stacked bar for each policy, of the share of prompt tokens found in each tier, beside the TTFT."""
    cases = experiment.cases(_BARS)
    tiers = tiers_of([run.summary for run in experiment.runs])
    axis = next(iter(experiment.axes), None)
    if not tiers or not cases:
        return None
    figure = new_figure(PAGE, 2.9)
    lines = axis is not None and len(experiment.policies) > 1
    panels = figure.subplots(1, 2 if lines else 1, squeeze=False)[0]
    held = experiment.held(experiment.shown_axis or "")
    _bars(panels[0], cases, ["device", *tiers], PAGE / len(panels) / len(cases) - 0.1)
    panels[0].set_title(f"Prompt tokens found {held}".rstrip())
    handles = panels[0].get_legend_handles_labels()[0]
    if lines and axis is not None:
        upper_legend(figure, handles, PAGE, merit_lines(panels[1], experiment, axis, TTFT))
    else:
        upper_legend(figure, handles, PAGE)
    return Drawing(
        figure,
        "Hits by tier",
        sentence(
            f"Share of the prompts' tokens that was found on the device and in the tiers behind it "
            f"{held}".rstrip(),
            *_compared(cases, axis if lines else None),
            *experiment.left_out(len(cases)),
        ),
    )


def share(case: Case, tier: str) -> float:
    """Per cent of the prompts' tokens found in a tier; without tiers all hits are the device's."""
    found = [run.figure(f"{tier}_hit_rate", 100) for run in case.runs]
    if tier == "device" and any(map(math.isnan, found)):
        found = [run.figure("prefix_hit_rate", 100) for run in case.runs]
    value = mean(found).value
    return 0.0 if math.isnan(value) else value


def _bars(axes: Axes, cases: list[Case], tiers: list[str], room: float) -> None:
    percent_axis(axes)
    low = [0.0] * len(cases)
    for number, tier in enumerate(tiers):
        look = STATES[number % len(STATES)]
        shares = [share(case, tier) for case in cases]
        axes.bar(
            range(len(cases)), shares, 0.58, low, label=tier, facecolor=look.face,
            edgecolor=look.hatch_colour, hatch=look.hatch, linewidth=0,
        )  # fmt: skip
        for place, value in enumerate(shares):
            if value >= _INSIDE:
                plate = (
                    None if look.ink == "white" else {"facecolor": look.face, "edgecolor": "none", "pad": 0.6}
                )
                middle = low[place] + value / 2
                axes.text(place, middle, f"{value:.0f}", ha="center", va="center", color=look.ink, bbox=plate)
        low = [below + value for below, value in zip(low, shares, strict=True)]
    axes.bar(range(len(cases)), 100, 0.58, facecolor="none", edgecolor=GREY, linewidth=0.5)
    axes.set_xticks(range(len(cases)), [wrapped(case.label, room) for case in cases])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("% of prompt tokens")


def _compared(cases: list[Case], axis: str | None) -> list[str]:
    """The first and the best policy by the time to the first token."""
    if axis is None or len(cases) < 2:
        return []
    at = {case.label: points(case, axis, TTFT)[-1][1].value for case in cases}
    best = min(at, key=lambda label: at[label])
    first = cases[0].label
    if alike(at[best], at[first]):
        return []
    return [
        f"the mean time to the first token falls from {at[first]:.3g} s ({first}) to {at[best]:.3g} s ({best})"
    ]
