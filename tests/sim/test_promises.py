"""Schedulers that look ahead, as stories: SGLang, LightLLM, TensorRT-LLM; and nano-vllm.

A prompt takes 10 ms whatever its length, a decode 1 ms; blocks hold four slots unless said otherwise.
"""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import Request, order, scheduler, victim
from sim.schedulers.prefix_order import PrefixOrder
from tests.sim.story import MS, Story, ask, memory, scheduled


def prompts(story: Story) -> list[str]:
    return [line for line in story.log if "prompt" in line]


# TensorRT-LLM


def trtllm(slots: int = 24, **fields):
    return scheduled("trtllm", memory(slots=slots), **fields)


def test_nobody_is_admitted_whose_end_is_not_guaranteed():
    """6 blocks: 0 comes to 4 of them, 1 to 3."""
    story = Story(trtllm(), ask((0, 8, 8), (0, 4, 5), (0, 4, 1)))
    assert prompts(story) == ["0: prompt 0(8)", "17: prompt 1(4) 2(4)"]
    assert story.column("memory", "external")[0] == 0


def test_a_pool_that_fits_to_the_last_block_preempts_nobody():
    story = Story(trtllm(), ask((0, 8, 8), (0, 4, 4)))
    assert prompts(story) == ["0: prompt 0(8) 1(4)"]
    assert story.summary["preemptions"] == 0
    v0 = Story(scheduled("vllm_v0", memory(slots=24)), ask((0, 8, 9), (0, 7, 9)))
    assert v0.summary["preemptions"] > 0


def test_what_clients_allow_is_what_counts():
    story = Story(trtllm(max_new_tokens=16), ask((0, 8, 8), (0, 4, 4)))  # 6 and 5 blocks
    assert prompts(story) == ["0: prompt 0(8)", "17: prompt 1(4)"]
    shorter = Story(trtllm(max_new_tokens=4), ask((0, 8, 9), (0, 8, 9)))  # 3 and 3, as it seems
    assert prompts(shorter)[0] == "0: prompt 0(8) 1(8)"
    assert shorter.summary["preemptions"] == 1
    assert shorter.column("requests", "status") == ["finished", "finished"]


def test_max_utilization_pauses_the_latest():
    story = Story(trtllm(capacity="max_utilization"), ask((0, 8, 8), (0, 8, 8), (0, 4, 5)))
    assert story.log[:2] == [
        "0: prompt 0(8) 1(8) 2(4)",
        "10: decode 0 1, recompute 2",
    ]  # 3 new blocks, 1 is free
    assert story.log[5] == "14: decode 0, recompute 1"
    assert story.log[8] == "17: prompt 1(13) 2(5)"


def test_a_request_beyond_the_pool_fails_alone():
    story = Story(trtllm(), ask((0, 20, 8), (0, 4, 4)))
    assert story.log[0] == "0: prompt 1(4), reject 0"
    assert story.column("requests", "reason") == [
        "7 blocks to its end cannot be guaranteed, the pool has 6", "",
    ]  # fmt: skip


def test_prefixes_that_others_hold_are_not_needed_again():
    """0 comes to 4 blocks of 6; 1 to 4 as well, of which 0 holds 2."""

    def requests() -> list[Request]:
        return [Request(n, 5 * n * MS, 9, 5, content=(1, 2), content_grain=4) for n in range(2)]

    for kind, first in (("prefix", "10: prompt 1(1), decode 0"), ("paged", "14: prompt 1(9)")):
        fields = {} if kind == "paged" else {"block_size": 4}
        story = Story(scheduled("trtllm", memory(kind, slots=24, **fields)), requests())
        assert prompts(story)[1] == first


def test_decodes_count_in_the_budget_of_a_step():
    requests = (0, 4, 9), (5, 6, 2), (5, 6, 2)
    story = Story(trtllm(200, max_num_batched_tokens=12), ask(*requests))
    assert prompts(story) == ["0: prompt 0(4)", "10: prompt 1(6), decode 0", "21: prompt 2(6), decode 0 1"]
    chunks = Story(trtllm(200, max_num_batched_tokens=12, chunked_context=True), ask(*requests))
    assert prompts(chunks)[1:] == ["10: prompt 1(6) 2(5), decode 0", "21: prompt 2(1), decode 0 1"]
    too_long = Story(trtllm(200, max_num_batched_tokens=5), ask(*requests))
    assert too_long.column("requests", "status") == ["finished", "rejected", "rejected"]


# LightLLM


def lightllm(slots: int, **fields):
    return scheduled("lightllm", memory(slots=slots, block_size=1), **fields)


@pytest.mark.parametrize(("slots", "first"), [(15, "0: prompt 0(4) 1(4)"), (14, "0: prompt 0(4)")])
def test_the_peak_stays_below_the_pool(slots, first):
    """0 has 5 slots and 6 to come after its first token, 1 has 5 and 2: at 1's end 10 + 2 * 2 = 14 are in use."""
    story = Story(lightllm(slots), ask((0, 4, 8), (0, 4, 4)))
    assert story.log[0] == first
    assert story.summary["preemptions"] == 0


@pytest.mark.parametrize("stretches", [False, True])
def test_a_later_start_may_have_a_lower_peak(stretches):
    """1 would see 14 + 2 * 2 = 18 slots at the end of 0 at once, one step later 15 + 2."""
    story = Story(lightllm(18), ask((0, 10, 4), (0, 2, 10)), stretches=stretches)
    assert prompts(story) == ["0: prompt 0(10)", "11: prompt 1(2)"]


def test_a_peak_of_the_whole_pool_is_refused_for_good_where_nobody_runs():
    story = Story(lightllm(18), ask((0, 10, 9), (0, 4, 2)))
    assert story.log[0] == "0: prompt 1(4), reject 0"
    assert story.column("requests", "reason")[0] == (
        "10 tokens would come to 18 slots with those foreseen, and LightLLM keeps them below the 18 of the pool"
    )


def test_estimates_admit_more_and_may_be_wrong():
    requests = (0, 4, 12), (0, 4, 12)  # 15 slots each
    assert prompts(Story(lightllm(18), ask(*requests))) == ["0: prompt 0(4)", "21: prompt 1(4)"]
    bold = Story(lightllm(18, busy_share=1.0, estimated_output=2), ask(*requests))
    assert prompts(bold) == ["0: prompt 0(4) 1(4)", "21: prompt 1(10)"]
    assert bold.summary["preemptions"] == 1
    later = Story(lightllm(18, busy_share=0.2, estimated_output=2), ask((0, 4, 12), (5, 4, 12)))
    assert prompts(later)[1] == "21: prompt 1(4)"  # a fifth is in use: no more estimates


def test_what_an_estimate_knows():
    policy = lightllm(400, max_new_tokens=50, busy_share=1.0, estimated_output=10)
    request = Request(0, 0, 4, 60)
    assert [policy._foresee(request, outputs, busy=False) for outputs in (1, 9, 20, 48)] == [10, 10, 22, 50]
    assert policy._foresee(request, 1, busy=True) == 50
    assert policy.limit(Request(0, 0, 60, 1)) == 4  # the model's 64


# SGLang


def sglang(slots: int, kind: str = "paged", **fields):
    options = {"block_size": 4} if kind == "radix" else {}
    return scheduled("sglang", memory(kind, slots=slots, **options), **fields)


def test_outputs_to_come_count_at_admission():
    """40 slots: 0 takes 8 + 16; 1 would need 24 of the 32 left, less the 16 of 0."""
    story = Story(sglang(40), ask((0, 8, 16), (0, 8, 16), (0, 4, 1)))
    assert prompts(story) == ["0: prompt 0(8)", "25: prompt 1(8) 2(4)"]  # nobody is looked at in between


@pytest.mark.parametrize(("conservativeness", "at"), [(1.0, "25"), (0.3, "10")])
def test_of_running_requests_a_share_of_the_outputs_counts(conservativeness, at):
    """At 10 ms 32 slots are left and 0 has 15 tokens to come: 32 - 0.7 * 15 < 24 < 32 - 0.21 * 15."""
    story = Story(sglang(40, schedule_conservativeness=conservativeness), ask((0, 8, 16), (5, 8, 16)))
    assert prompts(story)[1] == f"{at}: prompt 1(8)"


def test_the_ratio_falls_with_every_decode_step_and_comes_back_when_nothing_runs():
    policy = sglang(400)
    assert policy.new_token_ratio == pytest.approx(0.7)
    policy.decodes.clock = 100
    assert policy.new_token_ratio == pytest.approx(0.7 - 100 * (0.7 - 0.098) / 600)
    policy.decodes.clock = 10_000
    assert policy.new_token_ratio == pytest.approx(0.098)
    policy.plan(0)
    assert policy.new_token_ratio == pytest.approx(0.7)


def test_a_retraction_takes_those_with_the_fewest_outputs_to_the_end_of_the_queue():
    story = Story(sglang(24, schedule_conservativeness=0.01), ask((0, 4, 12), (5, 5, 10), (5, 4, 10)))
    assert story.log[1] == "10: prompt 1(5)"  # 2 finds too little
    assert story.log[9] == "27: decode 0, recompute 1"
    assert prompts(story)[2:] == ["31: prompt 2(4)", "50: prompt 1(13)"]


def test_a_retraction_sets_the_ratio_by_what_was_generated():
    policy = sglang(100, schedule_conservativeness=0.01)
    ratios = []
    relieve = policy.relieve

    def watched(requests, step) -> None:
        relieve(requests, step)
        ratios.append(policy.new_token_ratio)

    policy.relieve = watched
    story = Story(policy, ask(*[(at, 4, 60) for at in (0, 5, 15, 25)]))
    assert "60: decode 0 1, recompute 3 2" in story.log  # each has 21 of its 60 outputs
    assert ratios[0] == pytest.approx((2 * 21 + 2 * 20) / (2 * 60 + 1))


def test_a_retraction_makes_room_for_twenty_steps():
    """Five of 20 tokens fill the pool; 60 free slots are enough for two that stay, 40 were not for three."""
    policy = sglang(100, max_new_tokens=10)  # they go on for longer all the same
    story = Story(policy, ask(*[(0, 4, 30)] * 5))
    first = next(line for line in story.log if "recompute" in line)
    assert first == "26: decode 0 1, recompute 4 3 2"
    assert set(story.column("requests", "status")) == {"finished"}


def test_the_head_that_nobody_could_wait_for_is_rejected():
    story = Story(sglang(24), ask((0, 24, 4), (0, 4, 2)))
    assert story.log[0] == "0: prompt 1(4), reject 0"
    assert story.column("requests", "reason")[0] == (
        "24 tokens and those to come do not leave a slot free in a pool of 24, which SGLang asks for"
    )


def test_who_outgrows_the_pool_fails_alone():
    story = Story(sglang(24), ask((0, 8, 40), (0, 4, 2)))
    assert story.log[-3:] == ["26: recompute 0", "26: prompt 1(4), reject 0", "36: decode 1"]
    assert story.column("requests", "reason")[0].startswith("25 tokens need 7 blocks")


def test_one_prompt_at_a_time_is_cut_to_whole_pages():
    story = Story(sglang(64, chunked_prefill_size=10), ask((0, 20, 2), (0, 6, 3)))
    assert prompts(story) == ["0: prompt 0(8)", "10: prompt 0(10)", "20: prompt 0(2) 1(6)"]
    mixed = Story(sglang(64, chunked_prefill_size=10, mixed_chunk=True), ask((0, 4, 4), (1, 20, 2)))
    assert prompts(mixed) == [
        "0: prompt 0(4)",
        "10: prompt 1(8), decode 0",  # 9 are left beside the decode
        "21: prompt 1(9), decode 0",
        "32: prompt 1(3), decode 0",
    ]


def test_a_step_stops_at_its_prompt_tokens():
    story = Story(sglang(200, max_num_batched_tokens=20), ask((0, 30, 1), (0, 12, 1), (0, 8, 1), (0, 4, 1)))
    assert prompts(story) == ["0: prompt 0(30)", "10: prompt 1(12)", "20: prompt 2(8) 3(4)"]


def named(*rows: tuple[float, tuple[int, ...], int]) -> list[Request]:
    """Requests of (arrival in ms, names of runs of four tokens, tokens of its own), with one output."""
    return [
        Request(number, round(at * MS), 4 * len(content) + own, 1, content=content, content_grain=4)
        for number, (at, content, own) in enumerate(rows)
    ]


LONG = tuple(range(100, 112))
OTHER = tuple(range(200, 210))


def test_the_longest_cached_prefix_goes_first():
    requests = named((0, LONG, 1), (1, (7, 8), 1), (2, LONG[:5], 1), (3, LONG[:9], 1))
    story = Story(sglang(400, "radix", max_num_seqs=1), requests)
    assert prompts(story)[1:] == ["10: prompt 3(1)", "20: prompt 2(1)", "30: prompt 1(9)"]


def test_of_two_alike_the_second_waits_until_the_first_is_cached():
    requests = named((0, (1,), 1), (1, OTHER, 1), (2, OTHER, 2), (3, (5, 6), 1))
    story = Story(sglang(400, "radix", max_num_seqs=2), requests)
    assert prompts(story)[1:] == ["10: prompt 1(41) 3(9)", "20: prompt 2(2)"]
    little = named((0, (1,), 1), (1, OTHER[:7], 1), (2, OTHER[:7], 2), (3, (5, 6), 1))  # 28 tokens alike
    story = Story(sglang(400, "radix", max_num_seqs=2), little)
    assert prompts(story)[1:] == ["10: prompt 1(29) 2(30)", "20: prompt 3(9)"]


def test_above_128_the_queue_stays_as_it_is():
    warm = Story(sglang(4000, "radix"), named((0, LONG, 1)))
    sorter = PrefixOrder("lpm", warm.policy.allocator, 0)
    for others, first in ((127, 127), (128, 0)):
        requests = named(*[(0, (300 + n,), 1) for n in range(others)], (0, LONG, 1))
        queue = deque(requests)
        sorter.sort(queue, lambda request: request.output_tokens)
        assert queue[0].id == first


def test_depth_first_takes_the_branch_that_most_wait_for():
    warm = Story(sglang(4000, "radix"), named((0, (1, 2, 3), 1), (0, (1, 2, 4), 1), (0, (9, 8), 1)))
    queue = deque(
        named((0, (9, 8), 3), (0, (1, 2, 4), 3), (0, (1, 2, 3), 3), (0, (5,), 3), (0, (1, 2, 4), 3),
              (0, (1, 2), 3), (0, (1, 2, 3), 3), (0, (1, 2, 4), 3))
    )  # fmt: skip
    PrefixOrder("dfs-weight", warm.policy.allocator, 0).sort(queue, lambda request: request.output_tokens)
    assert [request.id for request in queue] == [1, 4, 7, 2, 6, 5, 0, 3]


def test_longest_outputs_and_chance():
    lof = Story(sglang(400, policy="lof", max_num_seqs=1), ask((0, 4, 1), (0, 4, 2), (0, 4, 3)))
    assert [line.split()[2] for line in prompts(lof)] == ["2(4)", "1(4)", "0(4)"]
    drawn = [
        prompts(Story(sglang(400, policy="random", seed=seed, max_num_seqs=1), ask(*[(0, 4, 1)] * 8)))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@given(
    moves=st.lists(
        st.one_of(st.integers(1, 9), st.sampled_from(["admit", "admit", "retract"])), min_size=1, max_size=60
    )
)
def test_a_queue_in_which_new_ones_are_inserted_is_sorted(moves):
    """By a plain, stable sort of the whole queue before each admission."""
    sorter = PrefixOrder("lof", sglang(400).allocator, 0)
    queue, plain, left = deque(), [], []
    for number, move in enumerate(moves):
        if isinstance(move, int):
            queue.append(Request(number, 0, 1, move))
        elif move == "retract" and left:
            left[0].preemptions += 1
            queue.append(left.pop(0))
        plain += [each for each in queue if each not in plain]
        if not queue or move != "admit":
            continue
        plain.sort(key=lambda each: each.output_tokens, reverse=True)
        sorter.sort(queue, lambda each: each.output_tokens)
        assert list(queue) == plain
        left.append(queue.popleft())
        plain.pop(0)


def test_a_cached_prefix_that_is_locked_is_no_longer_free():
    """At 30 ms 24 slots are free, 16 of them cached, and 1 has 8 tokens to come. 2 would lock the 16 and have 9."""
    requests = named((0, (1, 2, 3, 4), 1), (20, (9,), 3), (25, (1, 2, 3, 4), 1))
    requests[1].output_tokens = 9
    requests[2].output_tokens = 8
    story = Story(sglang(32, "radix"), requests)
    assert prompts(story)[1:] == ["20: prompt 1(7)", "38: prompt 2(1)"]
    requests = named((0, (1, 2, 3, 4), 1), (20, (9,), 3), (25, (1, 2, 3, 4), 1))
    requests[1].output_tokens = 9
    assert prompts(Story(sglang(32, "radix"), requests))[2] == "30: prompt 2(1)"  # with 2 tokens in all


@pytest.mark.parametrize(("mixed", "at"), [(False, "10"), (True, "25")])
def test_decodes_of_a_mixed_step_need_slots_too(mixed, at):
    """1 needs 8 + 20 slots; 32 - 0.21 * 15 are left, and one less in a step that decodes."""
    policy = sglang(40, schedule_conservativeness=0.3, mixed_chunk=mixed)
    assert prompts(Story(policy, ask((0, 8, 16), (5, 8, 20))))[1].startswith(f"{at}: prompt 1(8)")


def test_an_order_is_refused_beside_a_policy_that_sorts():
    config = {
        "scheduler": {"policy": "lpm", "order": {"kind": "sjf"}}, "allocator": {"kind": "radix"}, "workload": {},
    }  # fmt: skip
    assert [where for where, _ in scheduler["sglang"].check(config)] == ["scheduler.order"]
    for settings in ({"policy": "fcfs"}, {"policy": None}, {}):
        config["scheduler"] = {"order": {"kind": "sjf"}, **settings}
        assert not list(scheduler["sglang"].check(config))
    story = Story(sglang(400, order=order["sjf"], max_num_seqs=1), ask((0, 4, 3), (0, 4, 2), (0, 4, 1)))
    assert [line.split()[2] for line in prompts(story)] == ["2(4)", "1(4)", "0(4)"]


def test_the_victim_with_the_fewest_outputs():
    requests = ask((0, 4, 9), (0, 8, 9), (0, 8, 9), (0, 30, 9))
    for request, outputs in zip(requests, (2, 1, 1, 3), strict=True):
        request.prefill_tokens += outputs
    assert victim["fewest_outputs"](requests) is requests[2]


# nano-vllm


def nano(blocks: int, **fields):
    return scheduled("nano_vllm", memory("nano_vllm", slots=4 * blocks, block_size=4), **fields)


def test_only_the_first_prompt_of_a_step_is_cut():
    story = Story(nano(10, max_num_batched_tokens=16), ask((0, 20, 2), (0, 3, 1), (0, 12, 1)))
    assert story.log == [
        "0: prompt 0(16)",
        "10: prompt 0(4) 1(3)",  # 2's 12 do not fit into the other 9
        "20: prompt 2(12)",
        "30: decode 0",
    ]


def test_the_last_one_running_gives_way_and_finds_its_blocks_again():
    requests = [Request(n, 0, 8, out, content=(n, n), content_grain=4) for n, out in enumerate((5, 3))]
    story = Story(nano(5), requests)
    assert story.log == [
        "0: prompt 0(8) 1(8)",
        "10: decode 0, recompute 1",
        *(f"{at}: decode 0" for at in (11, 12, 13)),
        "14: prompt 1(1)",  # 9 tokens, 8 of them found
        "24: decode 1",
    ]


def test_equal_prompts_of_one_step_share_nothing():
    def twice(at: float) -> list[Request]:
        return [Request(n, round(n * at * MS), 9, 2, content=(1, 2), content_grain=4) for n in range(2)]

    assert prompts(Story(nano(10), twice(0))) == ["0: prompt 0(9) 1(9)"]
    assert prompts(Story(nano(10), twice(5))) == ["0: prompt 0(9)", "10: prompt 1(1)"]


def test_the_limit_is_on_the_sequences_of_a_step():
    story = Story(nano(20, max_num_seqs=2), ask((0, 4, 3), (0, 4, 2), (0, 4, 3)))
    assert story.log == [
        "0: prompt 0(4) 1(4)",
        "10: prompt 2(4)",
        "20: decode 0 1",  # 2 runs and has to wait
        "21: decode 0 2",
        "22: decode 2",
    ]


def test_a_lone_request_that_outgrows_the_pool_fails():
    story = Story(nano(2), ask((0, 8, 4), (1, 4, 2)))
    assert story.log == ["0: prompt 0(8)", "10: recompute 0", "10: prompt 1(4), reject 0", "20: decode 1"]
    assert story.column("requests", "reason")[0].startswith("9 tokens need 3 blocks")
