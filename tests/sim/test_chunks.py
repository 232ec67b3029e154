"""Stories of steps that mix decodes with parts of prompts, and of queues in other orders."""

from __future__ import annotations

import pytest

from sim import order, timing, victim
from sim.request import NEVER, Request, Sequence
from sim.step import Step
from tests.sim.story import MS, Asked, Story, ask, memory, scheduled


def chunked(slots: int = 400, **fields):
    return scheduled("vllm_v0", memory(slots=slots), chunked_prefill=True, **fields)


def exact(slots: int):
    """Blocks of four, one for who needs one."""
    return memory("prefix", slots=slots, block_size=4, prefix_caching=False)


def test_a_prompt_in_chunks_beside_a_decode():
    story = Story(chunked(max_num_batched_tokens=16), ask((0, 20, 3), (0, 6, 2)))
    assert story.log == [
        "0: prompt 0(16)",
        "10: prompt 0(4) 1(6)",
        "20: decode 0 1",
        "21: decode 0",
    ]
    assert story.column("requests", "first_token_time") == [20.0, 20.0]


def test_v0_computes_an_earlier_arrival_before_it_lets_a_later_one_decode():
    """Both fill memory; the second gives way, comes back in chunks, and the third rests meanwhile."""
    story = Story(
        chunked(slots=40, max_num_batched_tokens=4, victim=victim["earliest"]),
        ask((0, 8, 14), (0, 8, 14), (0, 4, 14)),
    )
    assert sum(story.column("requests", "preemptions")) > 0
    assert set(story.column("requests", "status")) == {"finished"}


def test_a_prompt_that_fills_the_memory_is_given_up_in_chunks():
    """V0 wants a free block beside it for every further chunk, and would preempt it for ever."""
    story = Story(chunked(slots=32, max_num_batched_tokens=16), ask((0, 30, 1)))
    assert story.column("requests", "status") == ["rejected"]
    assert "beside a free block" in story.column("requests", "reason")[0]


def test_half_of_a_prompt_is_dropped_and_counted():
    """Ten blocks: the decode of the first wants one that the second holds for a prompt not half computed."""
    policy = scheduled("sarathi", memory(slots=40), max_num_batched_tokens=5)
    story = Story(policy, ask((0, 4, 6), (0, 32, 2)))
    assert any("recompute 1" in line for line in story.log)
    assert story.summary["recomputed_tokens"] > 0
    assert story.column("requests", "status") == ["finished", "finished"]


def test_sarathi_never_stalls_a_decode():
    policy = scheduled("sarathi", memory(slots=400), max_num_batched_tokens=8)
    story = Story(policy, ask((0, 6, 5), (0, 20, 2)))
    assert story.log == [
        "0: prompt 0(6) 1(2)",
        "10: prompt 1(7), decode 0",
        "21: prompt 1(7), decode 0",
        "32: prompt 1(4), decode 0",
        "43: decode 0 1",
    ]


def test_what_aisimulate_computes_again_ends_in_a_decode():
    """The second gives way and comes back alone: its step lasts a prompt and a decode."""
    policy = scheduled("aisimulate", exact(slots=28))
    story = Story(policy, ask((0, 12, 8), (0, 12, 8)), prefill_ms=10, decode_ms=1)
    back = [line for line in story.log if line.endswith("prompt 1(13)")]
    assert len(back) == 1
    index = story.log.index(back[0])
    begin, end = (float(line.split(":")[0]) for line in story.log[index : index + 2])
    assert end - begin == 11


def test_who_stands_behind_the_server_of_an_earlier_victim_is_passed_over():
    """The third needs a block and takes that of the first; the fourth has no token of that step."""
    policy = scheduled("aisimulate", exact(slots=20), victim=victim["earliest"])
    story = Story(policy, ask((0, 2, 5), (0, 2, 5), (0, 4, 3), (0, 2, 5), (0, 2, 5)))
    assert story.log[:2] == ["0: prompt 0(2) 1(2) 2(4) 3(2) 4(2)", "10: decode 1 2 4, recompute 0"]


@pytest.mark.parametrize(
    ("kind", "finished"), [("fcfs", [0, 1, 2, 3]), ("sjf", [0, 3, 2, 1]), ("ljf", [0, 1, 2, 3])]
)
def test_orders_of_the_queue(kind, finished):
    policy = scheduled("orca", memory(slots=400), max_num_seqs=1, order=order[kind])
    story = Story(policy, ask((0, 4, 9), (1, 4, 8), (2, 4, 6), (3, 4, 2)))
    ends = story.column("requests", "finish_time")
    assert sorted(range(4), key=ends.__getitem__) == finished


def test_priority_overtakes_who_waits():
    requests = [Request(number, number * MS, 4, 5, priority=-number) for number in range(3)]
    policy = scheduled("vllm_v0", memory(slots=400), max_num_seqs=1, order=order["priority"])
    ends = Story(policy, Asked(requests)).column("requests", "finish_time")
    assert ends[0] < ends[2] < ends[1]


def polynomial(*chunks: tuple[Request, int, int], decodes: int = 0, context: int = 0) -> float:
    clock = timing["aisimulate_polynomial"](None, None)
    clock.num_slots = 1600
    step = Step()
    step.chunks = [(Sequence(request, 0, 0, 9), start, tokens) for request, start, tokens in chunks]
    step.num_decodes, step.decode_context = decodes, context
    return clock.seconds(step) * 1e3


def test_the_polynomial_counts_what_is_new_in_prompts():
    new = Request(0, 0, 100, 5)
    assert polynomial((new, 0, 100)) == pytest.approx(4.209989e-7 * 1e4 + 1.518344 + 16.50142, abs=1e-6)
    assert polynomial(decodes=2, context=800) == pytest.approx(-25.74 / 4 + 54.01 / 2 + 5.74, abs=1e-6)
    resumed = Request(1, 0, 100, 50)
    resumed.first_token_time, resumed.prefill_tokens = 7, 120
    generated = polynomial((resumed, 100, 20))
    share = 120 / 1600
    assert generated == pytest.approx(-25.74 * share**2 + 54.01 * share + 5.74, abs=1e-6)
    assert new.first_token_time == NEVER
