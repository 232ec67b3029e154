"""What a quantised KV cache saves beside the error that it makes: bars by precision."""

from __future__ import annotations

import math

from experiments.plots.bars import Panel, bar_panels
from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import number
from experiments.plots.results import Experiment, bursts
from experiments.plots.series import mean

BYTES = Panel("K and V of a token", "KiB", lambda run: run.figure("kv_bytes_per_token", 1 / 1024))
BATCH = Panel("Mean batch", "requests", lambda run: run.figure("mean_running"))
THROUGHPUT = Panel("Throughput", "requests/s", lambda run: run.figure("request_throughput"))


def precision(experiment: Experiment) -> Drawing | None:
    """Bytes of a token, error of attention, batch and throughput; where caches of several precisions are compared."""
    cases = experiment.cases(8)
    worst = _largest_errors(experiment)
    error_of = Panel("Error of attention", "absolute", lambda run: worst.get(run.policy, math.nan))
    quantized = [(cases[at], error) for at, error in error_of.known(cases)]
    if not quantized or len({value.value for _, value in BYTES.known(cases)}) < 2:
        return None
    figure = bar_panels(cases, (BYTES, error_of, BATCH, THROUGHPUT))
    if experiment.held():
        figure.supxlabel(experiment.held(), fontsize="small")
    told = []
    for case, error in quantized:
        saved = mean([run.figure("kv_bytes_saved_share", 100.0) for run in case.runs]).value
        told.append(f"{case.label} saves {number(saved)} %, attention is off by {number(error.value)}")
    return Drawing(
        figure,
        "Precision of the KV cache",
        sentence(
            f"What a token takes, scales included, and what that does {experiment.held()}".rstrip(),
            *told,
            "the error is the largest in all runs of a precision, against attention over what was not quantised, of "
            "values of unit variance",
            bursts(cases),
            "intervals hold 95 %, over replications" if experiment.replicated else "",
        ),
    )


def _largest_errors(experiment: Experiment) -> dict[str, float]:
    """The largest error of attention in any run of each policy, at whatever load."""
    found: dict[str, float] = {}
    for run in experiment.runs:
        error = run.figure("quantization_max_error")
        if not math.isnan(error):
            found[run.policy] = max(error, found.get(run.policy, error))
    return found
