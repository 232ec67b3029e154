"""vLLM V1's loop: its own tests told again with their numbers, and what only a simulator has to answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Request, order, victim
from sim.audit.audit import Audit
from sim.schedulers import VllmV1
from tests.sim import probing
from tests.sim.story import Story, ask, memory, scheduled
from tests.sim.test_oracle import ALLOCATORS, TIMINGS, Given, assert_equal, both, single


class Loop:
    """The scheduler over `prefix`, whose requests get a token whenever they are computed; a line a step."""

    def __init__(self, blocks: int = 10_000, block_size: int = 16, watermark: float = 0.0, **fields) -> None:
        fields = {"max_num_seqs": 100, "max_num_batched_tokens": 1024, **fields}
        slots = blocks * block_size
        self.memory = memory("prefix", slots=slots, longest=4096, block_size=block_size, watermark=watermark)
        self.policy = scheduled("vllm_v1", self.memory, **fields)
        self.requests: list[Request] = []

    def add(self, tokens: int, priority: int = 0) -> Request:
        number = len(self.requests)
        request = Request(
            number, 0, tokens, 400, content=tuple(range(1000 * number, 1000 * number + tokens)), content_grain=1,
            priority=priority,
        )  # fmt: skip
        self.requests.append(request)
        self.policy.add(request)
        return request

    def step(self) -> dict[int, int]:
        policy = self.policy
        self.planned = step = policy.plan(0)
        self.memory.check_integrity()
        told = {request.id: 1 for request in policy.running if request.sequences[0].decodes}
        told |= {sequence.request.id: tokens for sequence, _, tokens in step.chunks}
        for sequence, start, tokens in step.chunks:
            if start + tokens == sequence.request.prefill_tokens:
                policy.decodes.join(sequence)
        return told

    def finish(self, request: Request) -> None:
        (sequence,) = request.sequences
        self.policy.decodes.leave(sequence)
        self.policy.complete(sequence)


def ids(requests) -> list[int]:
    return [request.id for request in requests]


def test_long_prompts_are_cut():
    loop = Loop(long_prefill_token_threshold=400)
    for _ in range(3):
        loop.add(800)
    assert loop.step() == {0: 400, 1: 400, 2: 224}
    assert loop.step() == {0: 400, 1: 400, 2: 224}
    assert loop.step() == {0: 1, 1: 1, 2: 352}


def test_with_and_without_chunks():
    for chunked, first in ((True, {0: 800, 1: 224}), (False, {0: 800})):
        loop = Loop(max_num_seqs=3, chunked_prefill=chunked)
        for tokens in (800, 800, 10, 10):
            loop.add(tokens)
        assert loop.step() == first


def test_0_10_0_passes_over_a_prompt_that_does_not_fit_and_turns_those_around():
    loop = Loop(max_num_batched_tokens=100, chunked_prefill=False, skip_unfit=True, max_num_seqs=2)
    for tokens in (90, 80, 70, 10):
        loop.add(tokens)
    assert loop.step() == {0: 90, 3: 10}
    assert ids(loop.policy.waiting) == [2, 1]


def test_a_victim_goes_to_the_front_and_finds_what_it_had():
    loop = Loop(blocks=6, block_size=4, reserve_full_prompt=False)
    loop.add(8)
    loop.add(8)
    assert loop.step() == {0: 8, 1: 8}
    for _ in range(4):
        assert loop.step() == {0: 1, 1: 1}
    assert loop.step() == {0: 1}
    assert ids(loop.planned.preempted) == [1]
    assert loop.step() == {0: 1}, "8 of its 13 tokens are found, one block is free, and two are hits"
    loop.finish(loop.requests[0])
    assert loop.step() == {1: 5}
    assert [start for _, start, _ in loop.planned.chunks] == [8]


def test_priorities():
    loop = Loop(blocks=6, block_size=4, order=order["priority"], max_num_seqs=2)
    for priority in (5, 1, 3):
        loop.add(8, priority)
    assert ids(loop.policy.waiting) == [1, 2, 0]
    assert loop.step() == {1: 8, 2: 8}
    for _ in range(4):
        assert loop.step() == {1: 1, 2: 1}
    assert loop.step() == {1: 1}
    assert ids(loop.planned.preempted) == [2]
    assert ids(loop.policy.waiting) == [2, 0]


def test_a_victim_that_was_scheduled_gives_its_token_back():
    loop = Loop(blocks=4, block_size=4, order=order["priority"])
    loop.add(6, 1)
    assert loop.step() == {0: 6}
    loop.add(8, 0)
    assert loop.step() == {0: 1, 1: 8}
    assert loop.step() == {1: 1}, "the first had room for its token, and gave way for the second"
    assert ids(loop.planned.preempted) == [0]
    assert ids(loop.policy.running) == [1]
    assert loop.requests[0].prefill_tokens == 8, "it has 7 tokens and the one that it did not compute"


def test_a_victim_that_was_scheduled_gives_its_chunk_back():
    options = {"long_prefill_token_threshold": 4, "reserve_full_prompt": False}
    loop = Loop(blocks=5, block_size=4, order=order["priority"], **options)
    loop.add(20, 1)
    loop.add(8, 0)
    loop.policy.waiting.reverse()  # so that the lesser one is served first
    assert loop.step() == {0: 4, 1: 4}
    assert loop.step() == {0: 4, 1: 4}
    assert loop.step() == {1: 1}, "the first took the last block for its third chunk"
    assert ids(loop.planned.preempted) == [0]
    assert loop.planned.num_prefill_tokens == 0
    assert loop.memory.num_tokens == 9
    assert loop.requests[0].prefill_tokens == 20


def test_what_a_victim_gives_back_goes_to_who_is_behind():
    options = {"long_prefill_token_threshold": 4, "reserve_full_prompt": False}
    loop = Loop(blocks=7, block_size=4, order=order["priority"], **options)
    for tokens, priority in ((20, 1), (8, 0), (20, 0)):
        loop.add(tokens, priority)
    loop.policy.waiting.rotate(1)  # so that the lesser one is served first
    assert loop.step() == {0: 4, 1: 4, 2: 4}
    assert loop.step() == {0: 4, 1: 4, 2: 4}
    loop.policy.max_num_batched_tokens = 6
    assert loop.step() == {1: 1, 2: 4}, "4 of the 6 tokens had gone to the first"
    assert ids(loop.planned.preempted) == [0]


def test_a_victim_chosen_otherwise():
    loop = Loop(blocks=4, block_size=4, victim=victim["earliest"])
    for tokens in (7, 8):
        loop.add(tokens)
    assert loop.step() == {0: 7, 1: 8}
    assert loop.step() == {1: 1}, "who was admitted first gives way, though it was served"
    assert loop.planned.num_decodes == 1


def test_the_whole_prompt_is_reserved():
    for reserve, first in ((True, {0: 64}), (False, {0: 64, 1: 36})):
        loop = Loop(blocks=8, block_size=16, max_num_batched_tokens=100, reserve_full_prompt=reserve)
        loop.add(64)
        loop.add(80)
        assert loop.step() == first


def test_the_watermark_is_not_for_the_first():
    loop = Loop(blocks=10, watermark=0.5)
    first = loop.add(100)
    loop.add(16)
    assert loop.step() == {0: 100}
    loop.finish(first)
    assert loop.step() == {1: 16}


# What V1 never sees


def exact(slots: int, **fields):
    return memory("prefix", slots=slots, block_size=4, **fields)


def test_a_sequence_that_outgrows_the_memory_fails_alone():
    story = Story(scheduled("vllm_v1", exact(32)), ask((0, 4, 3), (0, 8, 40), (60, 4, 3)))
    assert sorted(story.column("requests", "status")) == ["finished", "finished", "rejected"]
    (reason,) = [reason for reason in story.column("requests", "reason") if reason]
    assert reason == "33 tokens need 9 blocks of 4 slots, the pool has 8"


@pytest.mark.parametrize("reserve", [True, False])
def test_a_prompt_that_can_never_fit_does_not_block_the_queue(reserve):
    policy = scheduled("vllm_v1", exact(32), reserve_full_prompt=reserve, max_num_batched_tokens=16)
    story = Story(policy, ask((0, 40, 2), (0, 65, 2), (0, 4, 2)))
    assert sorted(story.column("requests", "status")) == ["finished", "rejected", "rejected"]
    assert story.log[0] == "0: prompt 2(4), reject 0"


@pytest.mark.parametrize("who", victim.kinds)
def test_prompts_in_parts_do_not_take_each_others_memory_for_ever(who):
    """Two prompts of six blocks each, in parts of one, and eight blocks."""
    owner = exact(32, prefix_caching=False)
    fields = {"long_prefill_token_threshold": 4, "reserve_full_prompt": False, "victim": victim[who]}
    story = Story(scheduled("vllm_v1", owner, **fields), ask((0, 24, 2), (0, 24, 2)))
    assert story.column("requests", "status") == ["finished", "finished"]
    assert story.summary["preemptions"] < 4


def test_without_chunks_a_prompt_beyond_every_budget_is_refused():
    policy = scheduled("vllm_v1", exact(400), chunked_prefill=False, max_num_batched_tokens=16)
    story = Story(policy, ask((0, 40, 2), (0, 4, 2)))
    assert "40 tokens to compute exceed max_num_batched_tokens, 16" in story.column("requests", "reason")[0]
    assert sorted(story.column("requests", "status")) == ["finished", "rejected"]


def test_who_may_be_passed_over_does_not_close_the_queue():
    """1 never fits beside the decode of 0; 2, which comes amid a stretch of decodes, is looked at all the same."""
    fields = {"chunked_prefill": False, "max_num_batched_tokens": 20}
    requests = (0, 4, 30), (0, 20, 1), (15.5, 4, 2)
    story = Story(scheduled("vllm_v1", exact(400), skip_unfit=True, **fields), ask(*requests))
    assert "16: decode 0, prompt 2(4)" in story.log or "16: prompt 2(4), decode 0" in story.log
    story = Story(scheduled("vllm_v1", exact(400), **fields), ask(*requests))
    assert "39: prompt 1(20)" in story.log, "without it nobody overtakes"


@pytest.mark.parametrize(
    ("scheduling", "allocator", "paths"),
    [
        ({}, "contiguous", []),
        ({"reserve_full_prompt": False}, "paged", []),
        ({"reserve_full_prompt": False}, "contiguous", ["scheduler.reserve_full_prompt"]),
        ({"skip_unfit": True}, "prefix", ["scheduler.skip_unfit"]),
        ({"skip_unfit": True, "chunked_prefill": False}, "prefix", []),
    ],
)
def test_options_without_a_meaning_for_each_other(scheduling, allocator, paths):
    config = {"scheduler": scheduling, "allocator": {"kind": allocator}, "workload": {}}
    assert [path for path, _ in VllmV1.check(config)] == paths


# Oracles


@pytest.mark.parametrize("allocator_name", ALLOCATORS)
@settings(max_examples=20)
@given(
    rows=st.lists(single, min_size=1, max_size=14),
    slots=st.sampled_from([64, 96, 150, 400]),
    clock=st.sampled_from(list(TIMINGS)),
    budget=st.sampled_from([2, 5, 16, 70]),
    max_num_seqs=st.sampled_from([1, 3, 32]),
    who=st.sampled_from(["latest", "latest", "earliest"]),
    first=st.sampled_from(["fcfs", "priority", "priority", "sjf"]),
    chunked_prefill=st.booleans(),
    threshold=st.sampled_from([0, 3, 9]),
    reserve=st.booleans(),
    skip=st.booleans(),
)
def test_the_engine_with_every_option(
    allocator_name, rows, slots, clock, budget, max_num_seqs, who, first, chunked_prefill, threshold, reserve, skip
):  # fmt: skip
    fields = {
        "max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget, "victim": who, "order": first,
        "chunked_prefill": chunked_prefill, "long_prefill_token_threshold": threshold, "skip_unfit": skip,
    }  # fmt: skip
    if "contiguous" not in allocator_name:
        fields["reserve_full_prompt"] = reserve
    assert_equal(*both(Given(rows), allocator_name, "vllm_v1", clock, slots, **fields))


@pytest.mark.parametrize("kind", ["prefix", "radix", "paged"])
@pytest.mark.parametrize("first", ["fcfs", "priority"])
def test_every_slot_holds_what_it_should(kind, first):
    preempted = 0
    for seed in range(12):
        asked = probing.requests(seed, 14)
        for request in asked:
            request.priority = request.id * 5 % 3
        owner = memory(kind, slots=96, block_size=4)
        fields = {"max_num_batched_tokens": 8 + seed, "order": order[first]}
        summary = probing.run(owner, asked, Audit(every=1), "vllm_v1", **fields)
        preempted += summary["preemptions"]
    assert preempted > 10
