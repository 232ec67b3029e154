"""What a quantised KV cache saves beside the error that it makes: bars by precision."""

from __future__ import annotations

from experiments.plots.bars import Panel, bar_panels
from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import number
from experiments.plots.results import Experiment
from experiments.plots.series import mean

BYTES = Panel("K and V of a token", "KiB", lambda run: run.figure("kv_bytes_per_token", 1 / 1024))
ERROR = Panel("Error of attention", "absolute", lambda run: run.figure("quantization_max_error"))
BATCH = Panel("Mean batch", "requests", lambda run: run.figure("mean_running"))
LATENCY = Panel("Normalised latency", "s/token", lambda run: run.figure("normalized_latency_mean_s"))


def precision(experiment: Experiment) -> Drawing | None:
    """Bytes of a token, error of attention, batch and latency; where caches of several precisions are compared."""
    cases = experiment.cases(8)
    quantized = [(cases[at], error) for at, error in ERROR.known(cases)]
    if not quantized or len({value.value for _, value in BYTES.known(cases)}) < 2:
        return None
    figure = bar_panels(cases, (BYTES, ERROR, BATCH, LATENCY))
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
            "the error is the largest against attention over what was not quantised, of values of unit variance",
            "intervals hold 95 %, over replications" if experiment.replicated else "",
        ),
    )
