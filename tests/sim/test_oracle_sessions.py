"""Conversations, agents and trees: the engine against the naive stepper, and the probe on every step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Recorder, Transfers, scheduler, simulate
from sim.audit.audit import Audit
from tests.sim.test_oracle import ALLOCATORS, CHUNKED, DEVICE, MODEL, TIMINGS, assert_equal, both, build
from workloads import (
    Agent,
    Conversation,
    FewShot,
    Sampling,
    Streams,
    Synthetic,
    SystemPrompts,
    Tree,
    arrivals,
    lengths,
)

CACHING = ["paged 4", "prefix 4", "prefix 16 of 0.10.0", "radix 1", "radix 4 lfu"]
SESSIONS = {
    "talk": Conversation(turns=3, think_time_s=0.05),
    "talk without a pause": Conversation(turns=3, think_time_s=0),
    "agent": Agent(calls=2, tool_time_s=0.02, result_tokens_median=4),
    "tree": Tree(branches=2, depth=3, keep=1),
    "wide tree": Tree(branches=3, depth=2, keep=2, judging_time_s=0.01, judging_time_cv=1, step_tokens=2),
}
ARRIVALS = {
    "open": arrivals["poisson"](rate=20),
    "burst": arrivals["burst"](),
    "closed": arrivals["closed_loop"](clients=2, think_time_s=0.01),
}


def asked(seed: int, kind: str, prefixes: bool, n: int = 1, when: str = "open", count: int = 12) -> Synthetic:
    """A few small sessions that fit into 64 tokens, more or less."""
    return Synthetic(
        Streams(seed),
        64,
        num_requests=count,
        arrivals=ARRIVALS[when],
        lengths=lengths["uniform"](prompt_max=12, output_max=9),
        system_prompts=SystemPrompts(count=3, tokens_median=9, tokens_sigma=0.4) if prefixes else None,
        few_shot=FewShot(tasks=2, instruction_tokens=1, examples=2, example_tokens=3) if prefixes else None,
        session=SESSIONS[kind],
        sampling=Sampling(n=n),
    )


@pytest.mark.parametrize("scheduler_kind", scheduler.kinds)
@pytest.mark.parametrize("allocator_name", ["contiguous oracle best fit", *CACHING])
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6), kind=st.sampled_from(list(SESSIONS)), prefixes=st.booleans(),
    slots=st.sampled_from([64, 96, 150, 400]), clock=st.sampled_from(list(TIMINGS)),
    when=st.sampled_from(["open", "burst"]), max_num_seqs=st.sampled_from([1, 3, 32]),
)  # fmt: skip
def test_sessions(scheduler_kind, allocator_name, seed, kind, prefixes, slots, clock, when, max_num_seqs):
    workload = asked(seed, kind, prefixes, when=when)
    assert_equal(*both(workload, allocator_name, scheduler_kind, clock, slots, max_num_seqs=max_num_seqs))


@pytest.mark.parametrize("scheduler_kind", CHUNKED)
@pytest.mark.parametrize("allocator_name", CACHING)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 10**6), kind=st.sampled_from(list(SESSIONS)), slots=st.sampled_from([64, 96, 150]),
    budget=st.sampled_from([2, 5, 16, 40]),
)  # fmt: skip
def test_sessions_in_chunks(scheduler_kind, allocator_name, seed, kind, slots, budget):
    fields = {"max_num_batched_tokens": budget, **CHUNKED[scheduler_kind]}
    assert_equal(*both(asked(seed, kind, True), allocator_name, scheduler_kind, "fixed", slots, **fields))


@pytest.mark.parametrize(
    "allocator_name", [*CACHING, "paged 4 cached", "token", "multi size", "adaptive cached"]
)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6), kind=st.sampled_from(list(SESSIONS)), slots=st.sampled_from([96, 150, 400]),
    policy=st.sampled_from(["vllm_v0", "vllm_v1", "sglang", "trtllm"]),
)  # fmt: skip
def test_sessions_of_samples(allocator_name, seed, kind, slots, policy):
    assert_equal(*both(asked(seed, kind, False, n=3), allocator_name, policy, "fixed", slots))


@pytest.mark.parametrize("allocator_name", [*CACHING, *[name for name in ALLOCATORS if "oracle" in name]])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6), kind=st.sampled_from(list(SESSIONS)), slots=st.sampled_from([64, 96, 150, 400]),
    when=st.sampled_from(list(ARRIVALS)), policy=st.sampled_from(["vllm_v0", "static", "sarathi"]),
    samples=st.sampled_from([1, 3]),
)  # fmt: skip
def test_the_probe_finds_every_token_in_its_place(allocator_name, seed, kind, slots, when, policy, samples):
    memory, over = build(allocator_name, policy, slots)
    audit = Audit(every=1)
    summary = simulate(
        asked(seed, kind, True, samples if memory.can_fork else 1, when),
        scheduler=over,
        timing=TIMINGS["fixed"],
        transfers=Transfers(MODEL, DEVICE, memory.block_size),
        recorder=Recorder(),
        max_model_len=64,
        probe=audit,
    )
    assert audit.num_samples == summary["steps"]
    assert summary["requests_finished"] + summary["requests_rejected"] <= 12
    if summary["requests_rejected"] == 0:
        assert summary["requests_finished"] == 12
