"""What cannot be served fails alone, with its reason; nothing is ever lost; broken policies are named."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Request, Scheduler, Stalled, Step, allocator, scheduler, victim
from tests.sim.story import Asked, Story, ask, memory, scheduled
from tests.sim.test_allocators import CASES


@pytest.mark.parametrize("kind", scheduler.kinds)
def test_a_prompt_that_no_pool_holds_is_passed_over(kind):
    story = Story(scheduled(kind, memory(slots=40)), ask((0, 45, 2), (0, 4, 2)))
    assert story.log[0] == "0: prompt 1(4), reject 0"
    assert story.column("requests", "status") == ["rejected", "finished"]
    assert story.column("requests", "reason") == [
        "45 tokens need 12 blocks of 4 slots, the pool has 10 and keeps 0 as watermark", "",
    ]  # fmt: skip
    assert story.column("requests", "first_scheduled_time") == [None, 0]


FORESEEN = {
    "lightllm": "30 tokens would come to 62 slots with those foreseen, "
    "and LightLLM keeps them below the 40 of the pool",
    "trtllm": "15 blocks to its end cannot be guaranteed, the pool has 10",
}
"""What schedulers that count on the end of a request say at once."""


@pytest.mark.parametrize("kind", FORESEEN)
def test_a_request_that_would_outgrow_the_pool_is_refused_where_its_end_is_foreseen(kind):
    story = Story(scheduled(kind, memory(slots=40)), ask((0, 30, 30), (0, 4, 4)))
    assert story.column("requests", "reason") == [FORESEEN[kind], ""]
    assert story.column("requests", "first_token_time") == [None, 10]


@pytest.mark.parametrize("kind", [kind for kind in scheduler.kinds if kind not in FORESEEN])
def test_a_request_that_outgrows_the_pool_fails_alone(kind):
    story = Story(scheduled(kind, memory(slots=40)), ask((0, 30, 30), (0, 4, 4)))
    assert story.column("requests", "status") == ["rejected", "finished"]
    assert story.column("requests", "reason")[0] == (
        "41 tokens need 11 blocks of 4 slots, the pool has 10 and keeps 0 as watermark"
    )
    assert story.column("requests", "first_token_time")[0] == 10
    assert story.column("requests", "finish_time")[0] is None


@pytest.mark.parametrize("kind", scheduler.kinds)
def test_groups_wider_than_max_num_seqs_are_refused(kind):
    requests = ask((0, 4, 2), (0, 4, 2), (0, 4, 2))
    requests[0].n = requests[0].width = 3
    requests[1].beam_width = requests[1].width = 4
    story = Story(scheduled(kind, memory(slots=40), max_num_seqs=2), requests)
    assert story.column("requests", "reason") == [
        "3 samples or beams exceed max_num_seqs, 2", "4 samples or beams exceed max_num_seqs, 2", "",
    ]  # fmt: skip
    assert story.column("requests", "status") == ["rejected", "rejected", "finished"]


def test_v0_refuses_prompts_beyond_its_budget():
    story = Story(
        scheduled("vllm_v0", memory(slots=80), max_num_batched_tokens=16), ask((0, 20, 2), (0, 16, 2))
    )
    assert story.log == ["0: prompt 1(16), reject 0", "10: decode 1"]
    assert story.column("requests", "reason")[0] == (
        "a prompt of 20 tokens exceeds the 16 that one step takes"
    )


def test_the_length_of_the_model_is_kept():
    story = Story(scheduled("orca", memory(slots=200)), ask((0, 65, 2), (0, 64, 9), (0, 60, 9), (0, 4, 9)))
    assert story.column("requests", "status") == ["rejected", "finished", "finished", "finished"]
    assert story.column("requests", "reason")[0] == "prompt of 65 tokens exceeds max_model_len 64"
    assert story.column("requests", "output_tokens") == [2, 1, 4, 9]


def group(prompt: int, output: int, width: int, number: int = 0, at: int = 0) -> Request:
    return Request(number, at, prompt, output, n=width)


def test_a_group_without_host_room_is_given_up():
    policy = scheduled("vllm_v0", memory(slots=40, num_host_blocks=3))
    story = Story(policy, [group(8, 9, 2), group(8, 9, 2, number=1)])
    assert story.column("requests", "status") == ["finished", "rejected"]
    assert story.column("requests", "reason")[1] == (
        "preempted as a group of 2, and the host pool has no room for its blocks"
    )


def test_a_group_that_can_never_come_back_leaves_the_host():
    policy = scheduled("vllm_v0", memory(slots=32))
    story = Story(policy, [group(8, 20, 3), group(8, 3, 2, number=1, at=400_000_000)])
    # 0 holds all 8 blocks when it is refused, and would need 8 + 3 to come back.
    assert story.log[6:9] == ["15: swap out 0", "15: reject 0", "400: prompt 1(8)"]
    assert story.column("requests", "reason") == [
        "swapped out, and too large to come back even into an empty pool",
        "",
    ]
    assert policy.allocator.host_pool.num_used == 0
    assert (story.summary["swapped_out_blocks"], story.summary["swapped_in_blocks"]) == (8, 0)


def test_a_group_that_the_watermark_keeps_out_for_ever_is_given_up():
    """8 blocks and 2 branches: 10 of 10 are not more than the pool, and never leave one free."""
    policy = scheduled("vllm_v0", memory(slots=40, watermark=0.1))
    story = Story(policy, [group(4, 3, 1), group(24, 9, 2, number=1)])
    assert story.log[1:] == ["10: decode 0 1", "11: decode 0, swap out 1", "12: reject 1"]
    assert story.column("requests", "status") == ["finished", "rejected"]


def test_blocks_swapped_out_by_a_plan_without_tokens_are_paid_for():
    """0 needs three free blocks: 1 gives way, that is not enough, and 0 goes too."""
    policy = scheduled("vllm_v0", memory(slots=40), preemption="swap")
    story = Story(policy, [group(20, 20, 3), group(3, 8, 1, number=1)], block_ms=100)
    assert story.log[2:5] == [
        "11: swap out 1 0",  # nothing is computed at 11
        "11: decode 1, reject 0, swap in 1 blocks",
        "1012: decode 1",  # 1 + 8 blocks out, 1 in
    ]
    assert story.summary["swapped_out_blocks"] == 9
    assert story.summary["swapped_in_blocks"] == 1


class Lazy(Scheduler):
    """Never admits anybody."""

    def plan(self, now: int) -> Step:
        return Step()


class Restless(Scheduler):
    """Preempts for ever."""

    def plan(self, now: int) -> Step:
        step = Step()
        step.preempted += self.waiting
        return step


class Quarrel(Scheduler):
    """Computes a token of one prompt, then drops it for the other."""

    def plan(self, now: int) -> Step:
        step = Step()
        for request in list(self.running):
            self.preempt(request, step)
            self.waiting.rotate(-1)
        if self.waiting:
            self.admit(self.waiting.popleft(), step, now, budget=1)
        return step


class Forgetful(Scheduler):
    """Drops requests on the floor."""

    def plan(self, now: int) -> Step:
        self.waiting.clear()
        return Step()


@pytest.mark.parametrize("policy", [Lazy, Restless])
def test_a_policy_that_does_nothing_stalls(policy):
    message = (
        r"nothing can proceed at 0\.003000 s: request 0 is waiting and needs slots for 7 tokens; "
        r"running 0, waiting 1, swapped 0, memory MemoryUsage\(token_states=0, .*free=40\)"
    )
    with pytest.raises(Stalled, match=message):
        Story(policy(memory(slots=40)), ask((3, 7, 2)))


def test_requests_that_preempt_each_other_without_a_token_are_a_livelock():
    message = (
        r"livelock at 1\.010000 s: 101 preemptions in a row without a token; last request 0, "
        r"each prefilled up to 51 times; running 1, waiting 1, memory MemoryUsage\(token_states=1, .*free=32\)"
    )
    with pytest.raises(Stalled, match=message):
        Story(Quarrel(memory(slots=40)), ask((0, 7, 2), (0, 7, 2)))


def test_requests_that_are_prefilled_again_and_again_are_counted():
    """Memory for one whole request and a bit: whoever comes back early is soon in the way once more."""
    policy = scheduled("vllm_v0", memory(slots=24, block_size=1))
    story = Story(policy, ask((0, 8, 12), (0, 8, 12), (0, 8, 12)))
    assert [line for line in story.log if "prompt" in line or "recompute" in line] == [
        "0: prompt 0(8) 1(8) 2(8)",
        "10: decode 0 1, recompute 2",
        "14: decode 0, recompute 1",
        "21: prompt 1(13) 2(9)",
        "32: decode 1, recompute 2",
        "37: prompt 2(11)",
    ]
    assert story.column("requests", "prefills") == [1, 2, 3]
    assert story.summary["max_prefills"] == 3
    assert story.summary["requests_thrashed"] == 1


def test_a_policy_that_forgets_is_found_out():
    with pytest.raises(Stalled, match="1 requests never came to an end"):
        Story(Forgetful(memory(slots=40)), ask((3, 7, 2)))


rows = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0.5, 3, 10, 37, 400]),
        st.integers(1, 70),
        st.integers(1, 60),
        st.integers(1, 4),
    ),
    max_size=14,
)


@pytest.mark.parametrize("kind", scheduler.kinds)
@pytest.mark.parametrize(("memory_kind", "fields"), CASES)
@settings(max_examples=10)
@given(
    rows=rows,
    slots=st.sampled_from([30, 96, 150, 400]),
    max_num_seqs=st.sampled_from([1, 3, 32]),
    budget=st.sampled_from([None, 30, 64]),
    preemption=st.sampled_from(["auto", "recompute", "swap"]),
    who=st.sampled_from(victim.kinds),
    clients=st.sampled_from([None, None, 1, 3]),
    beam=st.booleans(),
)
def test_no_request_is_ever_lost(
    kind, memory_kind, fields, rows, slots, max_num_seqs, budget, preemption, who, clients, beam
):
    over = memory(memory_kind, slots=slots, **fields)
    rows = sorted(rows)
    requests = [
        Request(
            number, round(at * 1e6), prompt, output,
            **({"beam_width" if beam else "n": width} if over.can_fork else {}),
        )
        for number, (at, prompt, output, width) in enumerate(rows)
    ]  # fmt: skip
    policy = scheduled(
        kind, over, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, preemption=preemption,
        victim=victim[who],
    )  # fmt: skip
    workload = Asked(requests, clients=clients, think_ms=0, beams=(0.2, 3) if beam else None)
    story = Story(policy, workload, stretches=True)
    assert story.summary["requests_finished"] + story.summary["requests_rejected"] == len(rows)
    assert not policy.waiting
    assert not policy.running
    assert not policy.swapped
    assert policy.num_seqs == policy.decodes.size == policy.decodes.context == 0
    assert not any(policy.decodes.finishes.values())
    assert not any(policy.decodes.growths.values())
    if not rows:
        assert math.isnan(story.summary["e2e_mean_s"])
        return
    assert sorted(story.chunks["requests"][0]["request_id"]) == list(range(len(rows)))
    for request, status, reason in zip(
        requests, story.column("requests", "status"), story.column("requests", "reason"), strict=True
    ):
        assert (status == "rejected") == bool(reason)
        if status == "finished":
            assert request.output_tokens == min(rows[request.id][2], max(1, 64 - request.prompt_tokens))
            assert request.arrival_time <= request.first_scheduled_time
            assert request.first_scheduled_time < request.first_token_time <= request.finish_time
        else:
            assert request.finish_time == -1


def test_every_registered_allocator_serves_every_scheduler():
    for kind in scheduler.kinds:
        for memory_kind in allocator.kinds:
            story = Story(scheduled(kind, memory(memory_kind, slots=256)), ask(*[(0, 20, 12)] * 9))
            assert story.summary["requests_finished"] == 9
