"""Policies side by side where nothing else was swept: throughput, batch and time to the first token as bars."""

from __future__ import annotations

from experiments.plots.bars import Panel, bar_panels
from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import number
from experiments.plots.results import Case, Experiment, bursts
from experiments.plots.series import alike

_BARS = 12
PANELS = (
    Panel("Throughput", "requests/s", lambda run: run.figure("request_throughput")),
    Panel("Mean batch", "requests", lambda run: run.figure("mean_running")),
    Panel("Mean time to first token", "s", lambda run: run.figure("ttft_mean_s")),
)


def merit_bars(experiment: Experiment) -> Drawing | None:
    """A bar for each policy and figure of merit. None along a swept number, where lines show them."""
    cases = experiment.cases(_BARS)
    if experiment.axes or len(cases) < 2:
        return None
    shown = [panel for panel in PANELS if panel.known(cases)]
    if not shown:
        return None
    return Drawing(
        bar_panels(cases, shown, upright=False),
        "Figures of merit",
        sentence(
            "Throughput and mean time to the first token of the whole run, mean batch over the loaded period",
            *(_extremes(cases, panel) for panel in shown[:2]),
            *experiment.left_out(len(cases)),
            bursts(cases),
            "intervals hold 95 %, over replications" if experiment.replicated else "",
        ),
    )


def _extremes(cases: list[Case], panel: Panel) -> str:
    """From which policy to which a figure goes; empty where all are alike."""
    known = panel.known(cases)
    (low, least), (high, most) = (find(known, key=lambda at: at[1].value) for find in (min, max))
    if alike(least.value, most.value):
        return ""
    return (
        f"{panel.label.lower()} goes from {number(least.value)} ({cases[low].label}) "
        f"to {number(most.value)} {panel.unit} ({cases[high].label})"
    )
