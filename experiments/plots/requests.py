"""What single requests saw: distributions of latency over the requests of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import listed, number
from experiments.plots.lines import log_x
from experiments.plots.results import Case, Experiment
from experiments.plots.series import column
from experiments.plots.style import PAGE, line_style, new_figure, upper_legend

if TYPE_CHECKING:
    import numpy as np

_LINES = 6
_PANELS = {"first_token_time": "Time to first token (s)", "finish_time": "End-to-end latency (s)"}


def latency(experiment: Experiment) -> Drawing | None:
    """Share of requests that got their first and their last token within a time."""
    import numpy as np

    found = [(case, _waits(case)) for case in experiment.cases(_LINES)]
    series = [(case, waits) for case, waits in found if waits]
    if not series:
        return None
    figure = new_figure(PAGE, 2.6)
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    share = np.linspace(0, 100, 401)
    for axes, (name, title) in zip(panels, _PANELS.items(), strict=True):
        for case, waits in series:
            look = line_style(case) | {"markevery": (20 + 9 * case.rank, 80)}
            axes.plot(np.percentile(waits[name], share), share, label=case.label, **look)
        log_x(axes)
        axes.set_xlabel(title)
        axes.grid(axis="both")
    panels[0].set_ylim(0, 100)
    panels[0].set_ylabel("Requests (%)")
    if len(series) > 1:
        upper_legend(figure, panels[0].get_legend_handles_labels()[0], PAGE)
    medians = [
        f"{number(float(np.median(waits['first_token_time'])))} s ({case.label})" for case, waits in series
    ]
    held = experiment.held(experiment.shown_axis or "")
    caption = sentence(
        f"Share of finished requests with at most this latency {held}".rstrip(),
        f"median time to first token: {listed(medians)}",
        *experiment.left_out(len(series)),
        experiment.one_of_several,
    )
    return Drawing(figure, "Latency of requests", caption)


def _waits(case: Case) -> dict[str, np.ndarray] | None:
    """Seconds from arrival to each instant, of finished requests; None where no such request was recorded."""
    import numpy as np

    table = column(case.first.folder, "requests", ("arrival_time", *_PANELS))
    if table is None:
        return None
    done = np.isfinite(table["finish_time"])
    if not done.any():
        return None
    return {name: (table[name] - table["arrival_time"])[done] for name in _PANELS}
