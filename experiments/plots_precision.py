"""What a quantised KV cache saves beside the error that it makes: bars by precision."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from experiments.plots_drawing import Drawing, sentence
from experiments.plots_labels import number, wrapped
from experiments.plots_lines import BATCH, LATENCY, Merit
from experiments.plots_recovery import ERROR
from experiments.plots_results import Case, Experiment
from experiments.plots_series import Mean, mean
from experiments.plots_style import PAGE, colour, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BYTES = Merit("kv_bytes_per_token", "K and V of a token", "KiB", 1 / 1024)
PANELS = (BYTES, ERROR, BATCH, LATENCY)


def precision(experiment: Experiment) -> Drawing | None:
    """Bytes of a token, error of attention, batch and latency; where caches of several precisions are compared."""
    cases = experiment.cases(8)
    if len({_value(case, BYTES).value for case in cases if not math.isnan(_value(case, BYTES).value)}) < 2:
        return None
    errors = [(case, _value(case, ERROR)) for case in cases]
    quantized = [(case, error) for case, error in errors if not math.isnan(error.value)]
    if not quantized:
        return None
    figure = new_figure(PAGE, 2.2)
    for axes, merit in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _bars(axes, cases, merit)
    return Drawing(
        figure,
        "Precision of the KV cache",
        sentence(
            f"What a token takes, scales included, and what that does {experiment.held()}".rstrip(),
            *(
                f"{case.label} saves {number(_saved(case))} %, attention is off by {number(error.value)}"
                for case, error in quantized
            ),
            "the error is the largest against attention over what was not quantised, of values of unit variance",
            "intervals hold 95 %, over replications" if experiment.replicated else "",
        ),
    )


def _bars(axes: Axes, cases: list[Case], merit: Merit) -> None:
    """A bar for each precision, with its value; none where there is no figure."""
    values = [_value(case, merit) for case in cases]
    known = [(at, value) for at, value in enumerate(values) if not math.isnan(value.value)]
    axes.bar(
        [at for at, _ in known],
        [value.value for _, value in known],
        0.62,
        yerr=[value.half for _, value in known] if any(value.half for _, value in known) else None,
        color=[colour(cases[at]) for at, _ in known],
    )
    for at, value in known:
        axes.annotate(
            number(value.value, 2), (at, value.value + value.half), (0, 1.5), textcoords="offset points",
            ha="center", va="bottom",
        )  # fmt: skip
    axes.margins(y=0.12)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.set_xticks(range(len(cases)), [wrapped(case.label, 0.45) for case in cases])
    axes.set_title(merit.label)
    axes.set_ylabel(merit.unit)


def _value(case: Case, merit: Merit) -> Mean:
    return mean([run.figure(merit.key, merit.scale) for run in case.runs])


def _saved(case: Case) -> float:
    return mean([run.figure("kv_bytes_saved_share", 100.0) for run in case.runs]).value
