"""What combines with what: the printed tables are what is refused, and what they promise runs under the probe."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations as pairs_of
from pathlib import Path
from typing import Any

import pytest

from experiments import build
from experiments.capacity import make_capacity
from experiments.combinations import BASE, SHIPPED, TECHNIQUES, Checks, Technique, settings
from experiments.experiment import Experiment
from tests.experiments.conftest import Kvsim, Write

README = Path(__file__).parents[2] / "experiments" / "README.md"
BEGIN, END = "<!-- kvsim list combinations -->\n", "\n<!-- end of the list -->"

Figures = dict[str, Any]
EVIDENCE: dict[str, Callable[[Figures], Any]] = {
    "parallel samples": lambda of: of["blocks_saved_share"],
    "beams": lambda of: of["copied_blocks"] or of["blocks_saved_share"],
    "prefixes": lambda of: of["prefix_hit_tokens"],
    "belady": lambda of: of["prefix_hit_tokens"],
    "swap": lambda of: of["swapped_in_blocks"],
    "recompute": lambda of: (  # where a token takes half the memory, caches leave nobody to preempt
        (of["recomputed_tokens"] or (not of["preemptions"] and of["prefix_hit_tokens"]))
        and not of["swapped_out_blocks"]
    ),
    "hybrid": lambda of: (
        of["free to move"]["swapped_out_blocks"]
        and of["dear to move"]["recomputed_tokens"]
        and not of["dear to move"]["swapped_out_blocks"]
    ),
    "partial": lambda of: (
        not of["swapped_out_blocks"] and of["recomputed_tokens"] < of["taken as a whole"]["recomputed_tokens"]
    ),
    "asynchronous swap": lambda of: of["swapped_in_blocks"],
    "quantised swap": lambda of: of["quantization_max_error"],
    "quantised cache": lambda of: of["quantization_max_error"],
    "tiers": lambda of: of["host_written_gb"],
    "windows": lambda of: of["slides"],
    "states": lambda of: of["states"],
    "chunked prefill": lambda of: of["mixed_steps"],
}
"""What a run shows where a technique was at work: a new technique needs its own."""

BESIDE = {
    "hybrid": {
        "free to move": ["transfers.copy_latency_us=0", "transfers.host_bandwidth_gb_per_s=1e+9"],
        "dear to move": ["transfers.copy_latency_us=1e+6"],
    },
    "partial": {"taken as a whole": ["scheduler.preemption=recompute"]},
}
"""Runs that show it beside the one that combines: the same but for some settings."""

checks = Checks()
names = {technique.name: technique for technique in TECHNIQUES}


def run(sets: list[str]) -> Figures:
    """A run under the probe, which looks at every tenth step."""
    experiment = Experiment(**checks.point([*sets, "probe.every=10"]).settings)
    mixed = 0

    def sink(table: str, columns: dict[str, Any]) -> None:
        nonlocal mixed
        if table == "steps":
            mixed += int(((columns["prefill_tokens"] > 0) & (columns["decode_seqs"] > 0)).sum())

    figures, _ = build.run(experiment, 0, sink)
    figures["mixed_steps"] = mixed
    over = build.make_allocator(experiment, make_capacity(experiment, *build.make_hardware(experiment)))
    groups = getattr(over, "groups", ())
    figures["slides"] = bool(getattr(over, "windowed", ()))
    figures["states"] = any(group.state_slots for group in groups)
    return figures


def shown(sets: list[str], *techniques: Technique) -> None:
    figures = run(sets)
    for technique in techniques:
        for name, others in BESIDE.get(technique.name, {}).items():
            paths = tuple(each.partition("=")[0] for each in others)
            figures[name] = run([*(each for each in sets if not each.startswith(paths)), *others])
    finished, rejected = figures["requests_finished"], figures["requests_rejected"]
    assert finished + rejected == 20
    assert finished >= 14  # the host pool may be too full for a group
    assert figures["probe_steps"] > 4
    assert figures["probe_max_error"] < 1e-5
    for technique in techniques:
        assert EVIDENCE[technique.name](figures), f"nothing shows {technique.name}"


@pytest.mark.parametrize("kind", SHIPPED)
def test_every_allocator_takes_the_base_that_others_are_asked_over(kind: str) -> None:
    assert not checks.refusal(kind, settings(kind) or [])


@pytest.mark.parametrize("kind", SHIPPED)
def test_what_an_allocator_takes_runs_and_shows(kind: str) -> None:
    for technique in TECHNIQUES:
        sets = settings(kind, technique)
        assert sets is not None
        if not checks.refusal(kind, sets):
            shown(sets, technique)


@pytest.mark.parametrize("one", TECHNIQUES[:-1], ids=lambda technique: technique.name)
def test_what_combines_runs_and_shows(one: Technique) -> None:
    for other in TECHNIQUES[TECHNIQUES.index(one) + 1 :]:
        for kind in SHIPPED:
            sets = settings(kind, one, other)
            if sets is not None and not checks.refusal(kind, sets):
                shown(sets, one, other)


def test_what_is_refused_is_refused_on_the_command_line(kvsim: Kvsim, write: Write) -> None:
    """Exit code 2, with the reason, before anything runs."""
    write("base.yaml", BASE.replace("name: combinations", "name: base"))
    refused = 0
    for kind in ("contiguous", "paged", "prefix"):
        for technique in TECHNIQUES:
            sets = settings(kind, technique) or []
            if checks.refusal(kind, sets):
                refused += 1
                said = kvsim("run", "base.yaml", *(part for each in sets for part in ("--set", each)))
                assert said.code == 2
                assert said.lines
                assert not Path("results").exists()
    assert refused > 10


NEVER = {
    "contiguous with forks": (("contiguous", "parallel samples"), "it cannot fork"),
    "contiguous with prefixes": (("contiguous", "prefixes"), "one request's alone"),
    "contiguous with partial preemption": (("contiguous", "partial"), "nobody outgrows a reservation"),
    "contiguous with tiers": (("contiguous", "tiers"), "no cached prefixes that tiers"),
    "swaps of cached blocks of several sizes": (("multi_size", "prefixes", "swap"), "stays cached"),
    "partial preemption of layer groups": (("prefix", "partial"), "cannot take a part of what a sequence"),
    "partial preemption of states": (("jenga", "states", "partial"), "cannot take a part of what a sequence"),
    "cached prefixes of states": (("prefix", "states", "prefixes"), "no checkpoints of states"),
    "partial preemption of what stays cached": (("paged", "prefixes", "partial"), "take recompute"),
    "two precisions in one cache": (
        ("paged", "quantised cache", "quantised swap"),
        "the precision of the cache",
    ),
}


@pytest.mark.parametrize("combination", NEVER)
def test_what_cannot_be(combination: str) -> None:
    (kind, *wanted), reason = NEVER[combination]
    sets = settings(kind, *(names[name] for name in wanted))
    assert sets is not None
    assert reason in checks.refusal(kind, sets)


@pytest.mark.parametrize("technique", ["parallel samples", "beams", "swap", "hybrid"])
def test_groups_and_swaps_need_a_host_pool(technique: str) -> None:
    sets = settings("paged", names[technique]) or []
    assert "needs a host pool" in checks.refusal("paged", [*sets, "allocator.num_host_blocks=0"])


@pytest.mark.parametrize("technique", ["recompute", "partial"])
def test_groups_that_are_computed_again_need_none(technique: str) -> None:
    sets = settings("paged", names["beams"], names[technique]) or []
    assert not checks.refusal("paged", [*sets, "allocator.num_host_blocks=0"])
    assert run([*sets, "allocator.num_host_blocks=0"])["requests_finished"] == 20


def test_the_shipped_tables_are_those_of_the_code(kvsim: Kvsim) -> None:
    """Where they are not: put what `kvsim list combinations` prints between the marks of experiments/README.md."""
    said = kvsim("list", "combinations")
    assert said.code == 0
    _, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.partition(END)[0].strip() == said.out.strip()
    assert said.out.count("\n|") > len(SHIPPED) + len(TECHNIQUES)


def test_every_pair_stands_in_the_table(kvsim: Kvsim) -> None:
    rows = [line.split(" | ") for line in kvsim("list", "combinations").out.splitlines() if line[:1] == "|"]
    filled = sum(1 for row in rows[2 + len(SHIPPED) + 2 :] for cell in row[1:] if cell.strip(" |"))
    assert filled == len(list(pairs_of(TECHNIQUES, 2)))
