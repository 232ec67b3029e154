"""Schedulers as stories: who runs when, who waits, who gives way.

A prompt takes 10 ms whatever its length, a decode 1 ms; blocks hold four slots.
"""

from __future__ import annotations

import pytest

from sim import victim
from tests.sim.story import Story, ask, memory, scheduled


def v0(slots: int, *, watermark: float = 0.0, num_host_blocks: int | None = None, **fields):
    return scheduled(
        "vllm_v0", memory(slots=slots, watermark=watermark, num_host_blocks=num_host_blocks), **fields
    )


# vLLM V0


def test_prompts_come_first_and_alone():
    story = Story(v0(48), ask((0, 10, 4), (0, 12, 4), (11.5, 6, 2)))
    assert story.log == [
        "0: prompt 0(10) 1(12)",
        "10: decode 0 1",
        "11: decode 0 1",
        "12: prompt 2(6)",  # the decodes stand still
        "22: decode 0 1 2",
    ]
    assert story.column("requests", "first_token_time") == [10, 10, 22]
    assert story.column("requests", "finish_time") == [23, 23, 23]


def test_an_admission_leaves_the_watermark_free():
    requests = (0, 20, 3), (0, 13, 2)  # 5 and 4 of 10 blocks
    assert Story(v0(40), ask(*requests)).log[0] == "0: prompt 0(20) 1(13)"
    story = Story(v0(40, watermark=0.2), ask(*requests))
    assert story.log == [
        "0: prompt 0(20)",
        "10: decode 0",
        "11: decode 0",
        "12: prompt 1(13)",
        "22: decode 1",
    ]


def test_running_sequences_may_use_the_watermark():
    story = Story(v0(40, watermark=0.2), ask((0, 32, 5)))  # ends with 36 tokens, 9 of 10 blocks
    assert story.column("requests", "status") == ["finished"]
    assert max(story.column("memory", "token_states")) == 36
    assert story.summary["preemptions"] == 0


def test_the_latest_is_recomputed_with_what_it_had_generated():
    story = Story(v0(24), ask((0, 10, 8), (0, 12, 3), (11.5, 6, 2)))
    assert story.log == [
        "0: prompt 0(10) 1(12)",  # 3 + 3 blocks: none is left
        "10: decode 0, recompute 1",  # 0 has room in its last block and is refused all the same
        *(f"{at}: decode 0" for at in range(11, 17)),
        "17: prompt 1(13) 2(6)",  # the preempted one in front, with its prompt and one output
        "27: decode 1, recompute 2",
        "28: prompt 2(7)",
    ]
    assert story.column("requests", "preemptions") == [0, 1, 1]
    assert story.column("requests", "first_token_time") == [10, 10, 27]
    assert story.column("requests", "finish_time") == [17, 28, 38]
    assert story.summary["recomputed_tokens"] == 12 + 6
    assert story.summary["preemptions"] == 2


def test_two_blocks_for_two_prompts():
    story = Story(v0(8), ask((0, 4, 2), (0, 4, 2)))
    assert story.log == ["0: prompt 0(4) 1(4)", "10: decode 0, recompute 1", "11: prompt 1(5)"]


def test_the_third_gives_way_and_then_the_second_itself():
    requests = ask((0, 4, 3), (0, 4, 3), (0, 3, 3))
    requests[1].n = requests[1].width = 2
    story = Story(v0(16), requests)
    assert story.log[:2] == ["0: prompt 0(4) 1(4) 2(3)", "10: decode 0, recompute 2, swap out 1"]


@pytest.mark.parametrize(
    ("who", "log"),
    [
        ("latest", "10: decode 0 1 2 3, recompute 4"),
        ("earliest", "10: decode 0 2 3 4, recompute 1"),
        ("most_slots", "10: decode 0 1 3 4, recompute 2"),
        ("fewest_slots", "10: decode 0 1 2, recompute 3 4"),  # one block was not enough
    ],
)
def test_victims(who, log):
    """0 needs a block and none is left; the others hold 2, 3, 1 and 2."""
    requests = ask((0, 4, 2), (0, 7, 2), (0, 11, 2), (0, 3, 2), (0, 7, 2))
    assert Story(v0(36, victim=victim[who]), requests).log[1] == log


def test_every_victim_policy_can_serve():
    for kind in victim.kinds:
        story = Story(v0(36, victim=victim[kind]), ask(*[(0, 7, 9)] * 6))
        assert story.summary["requests_finished"] == 6
        assert story.summary["preemptions"] > 0
    assert victim["lifo"] is victim["latest"]
    assert victim["fifo"] is victim["earliest"]


GROUPS = (0, 8, 9), (0, 8, 9), (15, 4, 1)


def test_groups_are_swapped_and_come_back_before_anyone_waiting():
    requests = ask(*GROUPS)
    for request in requests[:2]:
        request.n = request.width = 2
    story = Story(v0(40), requests, block_ms=0.5)
    assert story.log == [
        "0: prompt 0(8) 1(8)",
        "10: decode 0 1",  # two new blocks each, and no copy: the prompts fill theirs
        "11: decode 0 1",
        "12: decode 0 1",
        "13: decode 0 1",
        "14: decode 0, swap out 1",  # the last two free blocks went to 0
        "17: decode 0",  # 4 blocks out took 2 ms
        "18: decode 0",
        "19: decode 0",
        "20: decode 1, swap in 4 blocks",  # 2 waits since 15, and memory would have held it
        "23: prompt 2(4)",
        "33: decode 1",
        "34: decode 1",
        "35: decode 1",
    ]
    assert story.summary["swapped_out_blocks"] == story.summary["swapped_in_blocks"] == 4
    assert story.summary["recomputed_tokens"] == 0
    assert story.column("steps", "waiting")[5:10] == [1, 2, 2, 2, 1]


def test_swap_is_for_single_sequences_too_where_asked_for():
    story = Story(v0(24, preemption="swap"), ask((0, 10, 8), (0, 12, 3)))
    assert story.log[1] == "10: decode 0, swap out 1"
    assert story.log[8] == "17: decode 1, swap in 3 blocks"
    no_host = Story(v0(24, preemption="swap", num_host_blocks=2), ask((0, 10, 8), (0, 12, 3)))
    assert no_host.log[1] == "10: decode 0, recompute 1"


def test_the_last_sharer_writes_in_place():
    story = Story(v0(64), ask((0, 10, 3), n=4))
    assert story.log == ["0: prompt 0(10)", "10: decode 0, copy 3", "11: decode 0"]
    assert story.summary["copied_blocks"] == 3
    assert Story(v0(64), ask((0, 8, 3), n=4)).summary["copied_blocks"] == 0


def test_max_num_seqs_counts_every_sample():
    one = Story(v0(400, max_num_seqs=2), ask((0, 4, 3), (0, 4, 3), (0, 4, 3)))
    assert one.log == [
        "0: prompt 0(4) 1(4)",
        "10: decode 0 1",
        "11: decode 0 1",
        "12: prompt 2(4)",
        "22: decode 2",
        "23: decode 2",
    ]
    assert one.summary["max_running"] == 2
    groups = Story(v0(400, max_num_seqs=5), ask((0, 4, 3), (0, 4, 3), n=3))
    assert groups.log[0] == "0: prompt 0(4)"


@pytest.mark.parametrize(
    ("budget", "first"), [(60, "prompt 0(30)"), (90, "prompt 0(30) 1(60)"), (120, "prompt 0(30) 1(60)")]
)
def test_the_token_budget_of_v0(budget, first):
    policy = scheduled("vllm_v0", memory(slots=400), max_num_batched_tokens=budget)
    assert Story(policy, ask((0, 30, 2), (0, 60, 2), (0, 31, 2))).log[0] == f"0: {first}"


# Orca


def test_orca_mixes_prompts_and_decodes():
    story = Story(scheduled("orca", memory(slots=64)), ask((0, 8, 3), (10.5, 8, 3)))
    assert story.log == [
        "0: prompt 0(8)",
        "10: decode 0",
        "11: prompt 1(8), decode 0",
        "22: decode 1",
        "23: decode 1",
    ]
    assert story.column("requests", "finish_time") == [22, 24]


def test_the_token_budget_of_orca_spares_the_first_prompt():
    policy = scheduled("orca", memory(slots=400), max_num_batched_tokens=16)
    story = Story(policy, ask((0, 20, 3), (0, 10, 2), (0, 6, 2), (0, 1, 1)))
    assert story.log == [
        "0: prompt 0(20)",
        "10: prompt 1(10) 2(6), decode 0",
        "21: prompt 3(1), decode 0 1 2",
    ]


def test_a_large_head_blocks_small_ones_behind_it():
    over = memory("contiguous", slots=64, reserve="oracle")
    story = Story(scheduled("orca", over), ask((0, 20, 12), (0, 40, 24), (0, 4, 4)), stretches=True)
    assert story.log == [
        "0: prompt 0(20)",  # 32 of 64 slots
        "10: decode 0",
        "21: prompt 1(40)",  # all 64
        "31: decode 1",
        "54: prompt 2(4)",
        "64: decode 2",
    ]
    # While the head is refused, the free half is too small for it.
    assert story.column("memory", "external")[:12] == [32] * 12
    assert story.column("memory", "free")[:12] == [0] * 12


def test_orca_over_paged_memory_preempts_the_latest():
    story = Story(scheduled("orca", memory(slots=24)), ask((0, 10, 4), (0, 12, 3)))
    assert story.log == [
        "0: prompt 0(10) 1(12)",
        "10: decode 0, recompute 1",
        "11: decode 0",
        "12: decode 0",
        "13: prompt 1(13)",
        "23: decode 1",
    ]


def test_orca_admits_nobody_in_a_step_that_preempted():
    """The 3 blocks that 1 gave back would hold it again at once."""
    story = Story(scheduled("orca", memory(slots=24)), ask((0, 10, 3), (0, 9, 3)))
    assert story.log == [
        "0: prompt 0(10) 1(9)",
        "10: decode 0, recompute 1",
        "11: prompt 1(10), decode 0",
        "22: decode 1",
    ]


# Static batches


def test_a_static_batch_runs_to_its_end():
    story = Story(scheduled("static", memory(slots=64), max_num_seqs=2), ask((0, 8, 2), (0, 8, 5), (1, 8, 2)))
    assert story.log == [
        "0: prompt 0(8) 1(8)",
        "10: decode 0 1",
        "11: decode 1",
        "12: decode 1",
        "13: decode 1",
        "14: prompt 2(8)",
        "24: decode 2",
    ]
    assert story.column("requests", "finish_time") == [11, 14, 25]  # the answer does not wait for the batch
    # From 11 on all 12 slots of 0 are waste, until the batch is done.
    assert story.column("memory", "time") == [0, 10, 11, 12, 13, 14, 24, 25]
    assert story.column("memory", "internal") == [0, 3, 12, 12, 12, 0, 3, 0]
    assert story.column("memory", "token_states") == [16, 18, 10, 11, 12, 8, 9, 0]
    assert story.column("steps", "running") == [2, 2, 1, 1, 1, 1, 1]
    assert story.column("steps", "waiting") == [0, 1, 1, 1, 1, 0, 0]


def test_a_static_batch_is_what_memory_holds():
    over = memory("contiguous", slots=64, longest=32)
    story = Story(scheduled("static", over), ask(*[(0, 8, 2)] * 5), stretches=True)
    assert [line for line in story.log if "prompt" in line] == [
        "0: prompt 0(8) 1(8)",
        "11: prompt 2(8) 3(8)",
        "22: prompt 4(8)",
    ]


def test_a_static_batch_whose_last_request_is_swapped_waits_for_the_memory_of_the_batch():
    story = Story(scheduled("static", memory(slots=40), preemption="swap"), ask((0, 19, 2), (0, 15, 8)))
    assert story.log[:4] == [
        "0: prompt 0(19) 1(15)",
        "10: decode 0 1",
        "11: decode 1",
        "12: decode 1, swap in 5 blocks",
    ]
    assert story.summary["requests_finished"] == 2
