"""Allocators as a user writes them: what contradicts is refused, and every step is proved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.experiments.conftest import SMALL, Kvsim, Write

PAGED = "{kind: paged, block_size: 16}"


def summary(folder: Path) -> dict:
    (file,) = folder.glob("small/*/summary.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    "allocator",
    [
        "{kind: token}",
        "{kind: multi_size, slack: 0.5}",
        "{kind: adaptive, window: 20}",
        "{kind: paged, block_size: 16, prefix_caching: true}",
        "{kind: vattention, page_size: 64 KiB}",
        "{kind: vattention, page_size: 2 MiB, megacache: true, reclamation: eager}",
    ],
)
def test_every_step_is_proved(allocator: str, write: Write, kvsim: Kvsim, tmp_path: Path) -> None:
    tight = SMALL.replace("kv_memory: 2 GiB", "kv_memory: 0.8 GiB").replace("rate: 4.0", "rate: 20.0")
    file = write("x.yaml", tight.replace(PAGED, allocator) + "probe: {every: 1}\n")
    said = kvsim("run", file, "--out", tmp_path / "out", "--no-plots")
    assert said.code == 0, said.err
    figures = summary(tmp_path / "out")
    assert figures["probe_steps"] == figures["steps"]
    assert figures["requests_finished"] == 60


def test_vattention_tells_what_it_mapped(write: Write, kvsim: Kvsim, tmp_path: Path) -> None:
    """Every request fits into one group of 2 MiB, which is 204 tokens of 10,240 bytes."""
    file = write("x.yaml", SMALL.replace(PAGED, "{kind: vattention}"))
    assert kvsim("run", file, "--out", tmp_path / "out", "--no-plots", "--no-probe").code == 0
    figures = summary(tmp_path / "out")
    # One is mapped for each range that is ever in use, and serves all who come after.
    assert figures["mapped_groups"] == figures["mapped_groups_waited_for"] == figures["max_running"]


CONTRADICTIONS = {
    "no model": (
        [
            ("model: opt-13b\n", "max_model_len: 2048\n"),
            ("kv_memory: 2 GiB", "num_blocks: 90"),
            (PAGED, "vattention"),
        ],
        "x.yaml:9:12: allocator: vattention needs a model: its shape says how many tokens a page holds",
    ),
    "samples": (
        [(PAGED, "{kind: vattention}"), ("  arrivals:", "  sampling: {n: 2}\n  arrivals:")],
        "x.yaml:7:17: workload.sampling.n: allocator vattention cannot fork: a batch slot's range is its own",
    ),
    "swap": (
        [(PAGED, "{kind: vattention}"), ("vllm_v0}", "vllm_v0, preemption: swap}")],
        "x.yaml:10:40: scheduler.preemption: allocator vattention cannot swap: who gives way leaves its batch slot",
    ),
    "no double": (
        [(PAGED, "{kind: multi_size, largest_block: 100}")],
        "x.yaml:9:12: allocator: largest_block: got 100, expected block_size 8 times a power of two",
    ),
    "page": (
        [(PAGED, "{kind: vattention, page_size: 1 MiB}")],
        "x.yaml:9:42: allocator.page_size: not allowed, got '1 MiB', expected one of 64 KiB, 128 KiB, 256 KiB, 2 MiB",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_is_refused(case: str, write: Write, kvsim: Kvsim) -> None:
    changes, line = CONTRADICTIONS[case]
    text = SMALL
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    write("x.yaml", text)
    said = kvsim("check", "x.yaml")
    assert said.code == 2
    assert said.err.startswith(line), said.err
