"""Prefix caching from the YAML to the summary, under the probe with real attention."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.experiments.conftest import Kvsim, Write

CONFIG = """\
name: cached
num_blocks: {blocks}
max_model_len: 512
workload: {{kind: trace, path: trace.jsonl, format: {{kind: mooncake, block_size: 32}}}}
allocator: {{kind: {kind}, block_size: {size}}}
scheduler: {{kind: {scheduler}, max_num_seqs: 8}}
timing: {{kind: fixed, prefill_ms: 20, decode_ms: 10}}
probe: {{every: 1}}
"""


@pytest.fixture
def trace(write: Write) -> None:
    """Conversations of three turns, four at a time: a turn begins with the one before it."""
    rows = []
    for number in range(60):
        turn, conversation = number // 4 % 3, number % 4 + number // 12 * 4
        ids = [0, *(100 * conversation + index for index in range(1, 2 + 2 * turn))]
        rows.append(
            {
                "timestamp": 150 * number, "input_length": 32 * len(ids) - 7, "output_length": 20 + number % 7,
                "hash_ids": ids,
            }
        )  # fmt: skip
    write("trace.jsonl", "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("scheduler", ["vllm_v0", "orca"])
@pytest.mark.parametrize(
    ("kind", "size", "blocks"),
    [("prefix", 32, 40), ("prefix", 16, 60), ("prefix", 8, 70), ("radix", 32, 40), ("radix", 1, 700)],
)
def test_hits_are_proved_and_counted(
    kind, size, blocks, scheduler, trace: None, kvsim: Kvsim, write: Write
) -> None:
    write("cached.yaml", CONFIG.format(kind=kind, size=size, blocks=blocks, scheduler=scheduler))
    said = kvsim("run", "cached.yaml", "--no-plots")
    assert said.code == 0, said.err
    (file,) = Path("results/cached").glob("*/summary.json")
    summary = json.loads(file.read_text())
    requests = pd.read_parquet(file.parent / "requests.parquet")
    assert summary["probe_steps"] == summary["steps"]
    assert summary["probe_max_error"] < 1e-5
    assert summary["requests_finished"] == 60
    assert summary["prefix_hit_tokens"] == requests["cached_tokens"].sum() > 1000
    assert summary["prefix_hit_rate"] == summary["prefix_hit_tokens"] / requests["prompt_tokens"].sum()
    assert (requests["cached_tokens"] < requests["prompt_tokens"]).all()
    assert (requests["cached_tokens"] % size == 0).all()


def test_samples_and_swapping_are_refused(trace: None, kvsim: Kvsim, write: Write) -> None:
    text = CONFIG.format(kind="prefix", size=16, blocks=40, scheduler="vllm_v0")
    write("cached.yaml", text)
    said = kvsim("check", "cached.yaml", "--set", "scheduler.preemption=swap")
    assert said.code == 2
    assert "allocator prefix cannot swap" in said.err
    closed = "workload={num_requests: 9, arrivals: {kind: closed_loop, clients: 2}, lengths: {kind: alpaca}}"
    said = kvsim(
        "check", "cached.yaml", "--set", "allocator={kind: radix, eviction: belady}", "--set", closed
    )
    assert said.code == 2
    assert "allocator.eviction: belady knows all requests beforehand" in said.err


def test_without_caching_it_is_paged(trace: None, kvsim: Kvsim, write: Write) -> None:
    write("cached.yaml", CONFIG.format(kind="prefix", size=16, blocks=60, scheduler="vllm_v0"))
    figures = []
    for allocator in ("{kind: paged, watermark: 0}", "{kind: prefix, prefix_caching: false}"):
        assert (
            kvsim(
                "run",
                "cached.yaml",
                "--no-plots",
                "--out",
                str(len(figures)),
                "--set",
                f"allocator={allocator}",
            ).code
            == 0
        )
        (file,) = Path(f"{len(figures)}/cached").glob("*/summary.json")
        figures.append(json.loads(file.read_text()))
    paged, prefix = figures
    assert prefix["prefix_hit_tokens"] == 0
    assert prefix["requests_finished"] == paged["requests_finished"] == 60


@pytest.mark.parametrize(
    ("kind", "size", "exact"), [("prefix", 16, False), ("radix", 64, True), ("paged", 16, None)]
)
def test_hits_in_blocks_finer_than_the_trace_names_are_said_to_be_a_lower_bound(
    kind, size, exact, trace: None, kvsim: Kvsim, write: Write
) -> None:
    write("cached.yaml", CONFIG.format(kind=kind, size=size, blocks=60, scheduler="vllm_v0"))
    said = kvsim("run", "cached.yaml")
    (file,) = Path("results/cached").glob("*/summary.json")
    assert json.loads(file.read_text())["prefix_hits_exact"] is exact
    bounded = exact is False
    assert ("prefix hits are a lower bound" in said.out) == bounded
    assert ("Prefix hits are a lower bound" in Path("results/cached/report.html").read_text()) == bounded
