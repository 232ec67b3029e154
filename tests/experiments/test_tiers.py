"""Tiers from the YAML on: what is refused when it is read, what a run tells."""

from __future__ import annotations

import json

import pytest

from experiments.config import load
from experiments.mistakes import Mistakes
from experiments.summary_table import summary_table, tiers_of
from experiments.sweep import run_sweep
from experiments.text import tier_told

EXPERIMENT = {
    "name": "small",
    "model": "opt-13b",
    "num_blocks": 60,
    "max_model_len": 512,
    "workload": {
        "num_requests": 60,
        "arrivals": {"kind": "poisson", "rate": 4.0},
        "lengths": {"kind": "uniform", "prompt_max": 100, "output_max": 20},
        "session": {"kind": "conversation", "think_time_s": 0.5},
    },
    "allocator": {"kind": "prefix"},
    "scheduler": {"kind": "vllm_v1"},
    "timing": {"kind": "fixed", "prefill_ms": 10, "decode_ms": 5},
    "transfers": {"asynchronous": True},
    "tiers": [{"kind": "host", "num_blocks": 40}, {"kind": "nvme", "capacity_gb": 10}],
}


def loaded(folder, **changes):
    config = folder / "small.yaml"
    config.write_text(json.dumps({**EXPERIMENT, **changes}))  # which is YAML
    return load(config, probe=False)


def mistakes(folder, **changes) -> str:
    with pytest.raises(Mistakes) as caught:
        loaded(folder, **changes)
    return "\n".join(map(str, caught.value.mistakes))


@pytest.mark.parametrize(
    "allocator",
    [
        {"kind": "contiguous"},
        {"kind": "paged"},
        {"kind": "paged", "prefix_caching": True},
        {"kind": "prefix", "prefix_caching": False},
        {"kind": "jenga"},
        {"kind": "nano_vllm"},
    ],
    ids=str,
)
def test_allocators_without_cached_prefixes_to_go_on_with_are_refused(tmp_path, allocator):
    told = mistakes(tmp_path, allocator=allocator)
    assert "tiers: there are no cached prefixes that tiers could go on with: " in told
    assert allocator["kind"] in told
    assert "prefix, adaptive, multi_size, radix, with prefix caching" in told


def test_options_without_a_meaning_are_refused(tmp_path):
    assert "offload.policy: has no meaning without tiers" in mistakes(
        tmp_path, tiers=None, transfers={}, offload={"policy": "write_back"}
    )
    assert "only the selective policy counts hits" in mistakes(tmp_path, offload={"min_hits": 3})
    assert "transfers.prefetch: what tiers have is loaded for the step" in mistakes(
        tmp_path, transfers={"asynchronous": True, "prefetch": False}
    )
    assert "allocator prefix cannot swap beside the computation" in mistakes(tmp_path, tiers=None)
    loaded(tmp_path, offload={"policy": "selective", "min_hits": 3})


@pytest.mark.parametrize(
    ("tiers", "told"),
    [
        ([], "list one at least"),
        ([{"kind": "tape"}], "unknown kind"),
        ([{"kind": "host"}, {"kind": "host"}], "tiers: tiers need different names"),
        ([{"kind": "host", "eviction": "belady"}], "belady knows all requests beforehand"),
        ([{"kind": "nvme", "capacity_gb": 0.001}], "hold no block"),
        ([{"kind": "nvme", "bandwidth_gb_per_s": 0}], "bandwidth_gb_per_s"),
    ],
)
def test_tiers_that_make_no_sense_are_refused_where_they_stand(tmp_path, tiers, told):
    assert told in mistakes(tmp_path, tiers=tiers)


def test_two_tiers_of_a_kind_have_names(tmp_path):
    named = [{"kind": "nvme", "num_blocks": 10}, {"kind": "nvme", "name": "slow", "num_blocks": 10}]
    (row,) = run_sweep(loaded(tmp_path, tiers=named), tmp_path, processes=1).rows
    assert {"nvme_hit_rate", "slow_hit_rate", "slow_read_gb"} <= row.keys()


def test_hits_by_tier_add_up_and_are_told(tmp_path):
    (row,) = run_sweep(loaded(tmp_path), tmp_path, processes=1).rows
    assert row["requests_finished"] == 60
    tokens = [row[f"{name}_hit_tokens"] for name in ("device", "host", "nvme")]
    assert sum(tokens) == row["prefix_hit_tokens"]
    assert all(tokens)
    rates = [row[f"{name}_hit_rate"] for name in ("device", "host", "nvme")]
    assert sum(rates) == pytest.approx(row["prefix_hit_rate"])
    assert row["tier_wait_s"] > 0
    assert row["host_written_gb"] > 0
    assert row["nvme_written_gb"] > 0
    assert tiers_of([row]) == ["host", "nvme"]
    table = summary_table([row], [])
    assert "device hits %" in table
    assert "nvme hits %" in table


def test_runs_without_tiers_beside_runs_with_them(tmp_path):
    zipped = {"tiers": [None, EXPERIMENT["tiers"]], "transfers": [{}, {"asynchronous": True}]}
    plan = loaded(tmp_path, sweep={"zip": zipped}, tiers=None, transfers={})
    without, with_tiers = run_sweep(plan, tmp_path, processes=1).rows
    assert with_tiers["prefix_hit_rate"] > without["prefix_hit_rate"]
    assert "host 40 blocks + nvme 10 GB" in summary_table([without, with_tiers], plan.swept)


def test_tiers_in_words():
    assert tier_told({"kind": "host", "capacity_gb": 32}) == "host 32 GB"
    assert tier_told({"kind": "nvme", "name": "slow", "num_blocks": 500}) == "slow 500 blocks"
