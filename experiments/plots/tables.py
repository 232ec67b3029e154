"""What block sizes cost: slots that stand empty, entries of block tables, and what attention takes of both."""

from __future__ import annotations

from experiments.plots.bars import Panel, bar_panels
from experiments.plots.drawing import Drawing, sentence
from experiments.plots.labels import number
from experiments.plots.results import Experiment, Run


def _empty(run: Run) -> float:
    return 100 - run.figure("allocated_token_states_share", 100.0)


EMPTY = Panel("Held and empty", "% of what is held", _empty)
ENTRIES = Panel("Block table", "entries a request", lambda run: run.figure("mean_table_length"))
KERNEL = Panel("Attention of a token", "ms", lambda run: run.figure("decode_attention_ms"))


def block_tables(experiment: Experiment) -> Drawing | None:
    """Waste, table length and kernel time by policy, where a profile tells the time and tables differ in length."""
    cases = experiment.cases(10)
    timed, entries = KERNEL.known(cases), ENTRIES.known(cases)
    if len(timed) < 2 or len({value.value for _, value in entries}) < 2:
        return None
    best = min(timed, key=lambda found: found[1].value)
    worst = max(timed, key=lambda found: found[1].value)
    return Drawing(
        bar_panels(cases, (EMPTY, ENTRIES, KERNEL), upright=False),
        "Block tables",
        sentence(
            "Slots that are held and empty, entries of a block table, and what attention of one decoded token takes by "
            f"the profile over tables of that length {experiment.held()}".rstrip(),
            f"attention takes least with {cases[best[0]].label} ({number(best[1].value)} ms), "
            f"most with {cases[worst[0]].label} ({number(worst[1].value)} ms)",
            "intervals hold 95 %, over replications" if experiment.replicated else "",
        ),
    )
