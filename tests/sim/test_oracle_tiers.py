"""Tiers behind the device: the engine against the naive stepper, and the probe on every step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim import Recorder, scheduler, simulate
from sim.audit.audit import Audit
from sim.prefixes.eviction import eviction
from tests.sim.naive import run_naively
from tests.sim.test_oracle import CHUNKED, TIMINGS, Given, assert_equal, group, single
from tests.sim.test_oracle_sessions import SESSIONS, asked
from tests.sim.tiers import TIERS, tiered, transfers

CACHING = [
    "prefix 4", "prefix 16 of 0.10.0", "prefix 4 full and windows", "multi size cached", "adaptive cached", "radix 1",
    "radix 4 lfu",
]  # fmt: skip
WAYS = {
    "synchronous": {},
    "beside": {"asynchronous": True},
    "layer by layer": {"asynchronous": True, "layer_wise": True},
}
OFFLOAD = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(["write_through", "write_back", "selective"]),
        "load": st.sampled_from(["always", "by_cost"]),
        "min_hits": st.sampled_from([1, 2]),
        "order": st.sampled_from([order for order in eviction.kinds if order != "belady"]),
        "gb_per_s": st.sampled_from([0.03, 1.0, 1e3]),
    }
)
MOVED = {"policy": "write_back", "load": "always", "min_hits": 2, "order": "lfu", "gb_per_s": 1e3}


def run(workload, built, clock, way, **fields):
    memory, over = built()
    return simulate(
        workload, scheduler=over, timing=TIMINGS[clock], transfers=transfers(memory, **WAYS[way]),
        max_model_len=64, **fields,
    )  # fmt: skip


def both(workload, built, clock: str, way: str):
    tables: dict[str, list] = {"requests": [], "steps": [], "memory": []}
    recorder = Recorder(lambda table, columns: tables[table].append(columns))
    summary = run(workload, built, clock, way, recorder=recorder)
    joined = {
        table: {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        for table, chunks in tables.items()
        if chunks
    }
    memory, over = built()
    naive = run_naively(
        list(workload.requests()), over, TIMINGS[clock], transfers(memory, **WAYS[way]), 64, workload.beams
    )
    return summary, joined, naive


@pytest.mark.parametrize("scheduler_kind", scheduler.kinds)
@pytest.mark.parametrize("allocator_name", CACHING)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6), kind=st.sampled_from(list(SESSIONS)), slots=st.sampled_from([64, 96, 150]),
    clock=st.sampled_from(list(TIMINGS)), tiers=st.sampled_from(list(TIERS)), way=st.sampled_from(list(WAYS)),
    offload=OFFLOAD, max_num_seqs=st.sampled_from([1, 3, 32]),
)  # fmt: skip
def test_sessions(
    scheduler_kind, allocator_name, seed, kind, slots, clock, tiers, way, offload, max_num_seqs
):
    def built():
        return tiered(allocator_name, scheduler_kind, slots, tiers, offload, max_num_seqs=max_num_seqs)

    assert_equal(*both(asked(seed, kind, True, count=16), built, clock, way))


@pytest.mark.parametrize("scheduler_kind", CHUNKED)
@pytest.mark.parametrize("allocator_name", CACHING)
@settings(max_examples=15)
@given(
    rows=st.lists(single, min_size=2, max_size=14), slots=st.sampled_from([64, 96, 150]),
    clock=st.sampled_from(list(TIMINGS)), tiers=st.sampled_from(list(TIERS)), way=st.sampled_from(list(WAYS)),
    offload=OFFLOAD, budget=st.sampled_from([2, 5, 16, 40]),
)  # fmt: skip
def test_prompts_in_chunks(scheduler_kind, allocator_name, rows, slots, clock, tiers, way, offload, budget):
    fields = {"max_num_batched_tokens": budget, **CHUNKED[scheduler_kind]}

    def built():
        return tiered(allocator_name, scheduler_kind, slots, tiers, offload, **fields)

    assert_equal(*both(Given(rows), built, clock, way))


@pytest.mark.parametrize("scheduler_kind", scheduler.kinds)
@pytest.mark.parametrize("allocator_name", CACHING)
@settings(max_examples=15)
@given(
    rows=st.lists(st.one_of(single, group), min_size=2, max_size=9), slots=st.sampled_from([64, 96, 150]),
    clock=st.sampled_from(list(TIMINGS)), tiers=st.sampled_from(list(TIERS)), way=st.sampled_from(list(WAYS)),
    offload=OFFLOAD, turnover=st.sampled_from([0.0, 0.1, 0.7]), budget=st.sampled_from([None, 9, 40]),
)  # fmt: skip
def test_groups(scheduler_kind, allocator_name, rows, slots, clock, tiers, way, offload, turnover, budget):
    fields = {}
    if budget and scheduler_kind in CHUNKED:
        fields = {"max_num_batched_tokens": budget, **CHUNKED[scheduler_kind]}

    def built():
        return tiered(allocator_name, scheduler_kind, slots, tiers, offload, **fields)

    assert_equal(*both(Given(rows, beams=(turnover, 1)), built, clock, way))


@pytest.mark.parametrize("allocator_name", CACHING)
@settings(max_examples=40)
@given(
    rows=st.lists(st.one_of(single, group), min_size=2, max_size=9), slots=st.sampled_from([64, 96, 150]),
    tiers=st.sampled_from(list(TIERS)), way=st.sampled_from(list(WAYS)), offload=OFFLOAD,
    turnover=st.sampled_from([0.0, 0.1, 0.7]), policy=st.sampled_from(["vllm_v0", "vllm_v1", "sglang", "sarathi"]),
)  # fmt: skip
def test_the_probe_finds_every_token_of_groups_in_its_place(
    allocator_name, rows, slots, tiers, way, offload, turnover, policy
):
    def built():
        return tiered(allocator_name, policy, slots, tiers, offload)

    audit = Audit(every=1)
    summary = run(Given(rows, beams=(turnover, 1)), built, "fixed", way, recorder=Recorder(), probe=audit)
    assert audit.num_samples == summary["steps"]


@pytest.mark.parametrize("allocator_name", CACHING)
@settings(max_examples=40)
@example(  # a run that is to move to the nearest tier loses its end to one that moves there before it
    seed=542645, kind="talk", slots=96, tiers="three", way="layer by layer", offload=MOVED, policy="static"
)
@given(
    seed=st.integers(0, 10**6), kind=st.sampled_from(list(SESSIONS)), slots=st.sampled_from([64, 96, 150]),
    tiers=st.sampled_from(list(TIERS)), way=st.sampled_from(list(WAYS)), offload=OFFLOAD,
    policy=st.sampled_from(["vllm_v0", "vllm_v1", "sglang", "static", "sarathi"]),
)  # fmt: skip
def test_the_probe_finds_every_token_in_its_place(
    allocator_name, seed, kind, slots, tiers, way, offload, policy
):
    memory = []

    def built():
        made = tiered(allocator_name, policy, slots, tiers, offload)
        memory.append(made[0])
        return made

    audit = Audit(every=1)
    summary = run(asked(seed, kind, True, count=16), built, "fixed", way, recorder=Recorder(), probe=audit)
    assert audit.num_samples == summary["steps"]
    names = ["device", *[tier.name for tier in memory[0].tiers.tiers]]
    assert sum(summary[f"{name}_hit_tokens"] for name in names) == summary["prefix_hit_tokens"]
