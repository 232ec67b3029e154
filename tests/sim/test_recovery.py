"""Preemption and recovery as stories: which way a victim goes, what that costs, and what it keeps.

A prompt takes 1 ms a token and a decode 1 ms; blocks hold four slots.
"""

from __future__ import annotations

import random

import pytest

from sim import Admission, Request, Sequence, Step, Transfers, timing, victim
from sim.audit.audit import Audit
from sim.audit.ledger import Ledger
from sim.beams import fork
from sim.schedulers.victims import bound, cheapest_to_recover, fewest_blocks, lowest_priority, most_blocks
from sim.step_clock import StepClock
from tests.sim.probing import requests as crowd
from tests.sim.probing import run
from tests.sim.story import Asked, Story, ask, memory, scheduled
from tests.sim.test_link import DEVICE, MODEL

PER_TOKEN = {
    "decode_base_ms": 1.0, "decode_per_seq_ms": 0.0, "decode_per_context_token_ms": 0.0,
    "prefill_base_ms": 0.0, "prefill_per_token_ms": 1.0, "prefill_per_token_length_ms": 0.0,
}  # fmt: skip


def clock(**fields):
    return timing["linear"](**{**PER_TOKEN, **fields})


def story(slots: int, *rows, kind: str = "vllm_v0", block_ms: float = 0.5, n: int = 1, **fields) -> Story:
    asked = ask(*rows)
    for request in asked[1:]:
        request.n = request.width = n
    return Story(scheduled(kind, memory(slots=slots), **fields), asked, clock=clock(), block_ms=block_ms)


TWO = (0, 10, 8), (0, 12, 3)  # 3 + 3 blocks of 6: the second gives way at once, with 12 tokens in 3 blocks


@pytest.mark.parametrize(
    ("block_ms", "way"),
    [
        (1.9, "swap out 1"),  # 3 blocks out and in again take 11.4 ms
        (2.0, "recompute 1"),  # 12 ms either way: a tie is computed again
        (2.1, "recompute 1"),
    ],
)
def test_hybrid_takes_the_cheaper_way(block_ms, way):
    told = story(24, *TWO, preemption="hybrid", block_ms=block_ms)
    assert told.log[1] == f"22: decode 0, {way}"


def test_where_prompts_share_steps_with_decodes_computing_again_costs_what_it_adds():
    """12 tokens alone take 3 + 12 ms; beside a decode of 2 ms the larger base is paid once, and 13 ms are added."""
    cases = (2.1, "orca", "swap out 1"), (2.2, "orca", "recompute 1"), (2.2, "vllm_v0", "swap out 1")
    for block_ms, kind, way in (*cases, (2.6, "vllm_v0", "recompute 1")):
        policy = scheduled(kind, memory(slots=24), preemption="hybrid")
        told = Story(policy, ask(*TWO), clock=clock(decode_base_ms=2, prefill_base_ms=3), block_ms=block_ms)
        assert way in told.log[1], (block_ms, kind)


def test_what_is_computed_again_in_one_step_makes_the_next_estimate_lower():
    """A prompt of its own takes 8 + 12 ms, two in one step 8 + 24: that is 0.8 of what they cost one by one."""
    owner = memory(slots=400)
    recovery = scheduled("vllm_v0", owner, preemption="hybrid").recovery
    recovery.price(clock(prefill_base_ms=8), Transfers(None, None, 1, copy_latency_us=3e3))
    requests = [Request(number, 0, 12, 9) for number in range(3)]
    for request in requests:
        _held(owner, request)
    assert recovery.swaps(requests[0])  # 3 blocks out and in, 18 ms
    assert recovery.recompute_seconds(requests[0]) == pytest.approx(20e-3)
    step = Step()
    step.chunks = [(request.sequences[0], 0, 12) for request in requests[:2]]
    step.num_prefill_tokens, step.recomputed = 24, [(0, 0), (1, 0)]
    assert recovery.note_recomputed(step, 32e-3) == 32e-3
    assert recovery.recompute_seconds(requests[2]) == pytest.approx(16e-3)
    assert not recovery.swaps(requests[2])


def test_the_queue_on_the_link_counts():
    """Three blocks out and in take 6 ms, 12 tokens 12 ms; behind ten others the blocks take 16."""
    owner = memory(slots=400)
    policy = scheduled("vllm_v0", owner, preemption="hybrid")
    policy.recovery.price(clock(), Transfers(None, None, 1, copy_latency_us=1e3, asynchronous=True))
    request = Request(0, 0, 12, 9)
    _held(owner, request)
    assert policy.recovery.swaps(request)
    owner.link.submit_out(10)
    assert policy.recovery.swap_seconds(request) == pytest.approx(16e-3)
    assert not policy.recovery.swaps(request)
    owner.link.now = 5_000_000
    assert policy.recovery.swaps(request)


def test_what_computing_again_cost_is_reported():
    told = story(24, *TWO, preemption="recompute")
    assert told.log[-2:] == ["29: prompt 1(13)", "42: decode 1"]
    assert told.summary["recomputed_tokens"] == 12
    assert told.summary["recompute_s"] == pytest.approx(13e-3)  # a step that nothing else needed
    assert told.summary["swap_stall_s"] == told.summary["swap_transfer_s"] == 0


def test_what_swapping_cost_is_reported():
    told = story(24, *TWO, preemption="swap")
    assert told.summary["swap_stall_s"] == told.summary["swap_transfer_s"] == pytest.approx(3e-3)
    assert told.summary["recompute_s"] == told.summary["recomputed_tokens"] == 0


def test_swaps_that_the_host_has_no_room_for_are_counted():
    """Three blocks, and a host pool of one; computing again is not what was asked for."""
    told = {
        mode: Story(
            scheduled("vllm_v0", memory(slots=24, num_host_blocks=1), preemption=mode),
            ask(*TWO),
            clock=clock(),
        ).summary
        for mode in ("swap", "recompute", "hybrid")
    }
    assert [each["swap_refused"] for each in told.values()] == [1, 0, 1]
    assert all(each["recomputed_tokens"] == 12 and not each["swapped_gb"] for each in told.values())
    assert story(24, *TWO, preemption="swap").summary["swap_refused"] == 0


def test_a_chunk_counts_as_far_as_it_was_computed_before():
    """Of a step's three chunks one is new, one was lost but for its next token, one for nine more of its prompt."""
    step = Step()
    requests = [Request(number, 0, 30, 9) for number in range(3)]
    step.chunks = [(Sequence(request, 0, 0, 38), 4, 20) for request in requests]
    step.num_prefill_tokens, step.num_decodes, step.decode_context = 60, 3, 90
    step.recomputed = [(1, 1), (2, 9)]
    rest = step.without_recomputed()
    assert [(each.request.id, start, tokens) for each, start, tokens in rest.chunks] == [
        (0, 4, 20),
        (2, 15, 9),
    ]
    assert (rest.num_prefill_tokens, rest.num_decodes, rest.decode_context) == (29, 3, 90)


def test_prompts_lost_in_part_are_computed_again_in_part():
    """Whatever was computed was asked for, or lost, or the token behind what was lost."""
    fields = {"max_num_batched_tokens": 8, "preemption": "recompute", "chunked_prefill": True}
    policy = scheduled("vllm_v0", memory(slots=24), **fields)
    told = Story(policy, ask((0, 3, 14), (5, 14, 3)), clock=clock())
    assert told.log[3:6] == [
        "5: prompt 1(7), decode 0", "13: decode 0, recompute 1", "14: prompt 1(7), decode 0"
    ]  # fmt: skip
    assert told.column("requests", "status") == ["finished"] * 2
    computed = sum(told.column("steps", "prefill_tokens"))
    resumed = computed - 17 - told.summary["recomputed_tokens"]
    assert told.summary["recomputed_tokens"] >= 14
    assert 0 <= resumed <= told.summary["preemptions"]


# Partial preemption


def test_a_partial_preemption_takes_blocks_one_by_one_and_computes_those_alone():
    told = story(24, *TWO, preemption="partial")
    assert told.log == [
        "0: prompt 0(10) 1(12)",
        "22: decode 0, recompute 1",  # refused by V0's rule, but has room in its last block
        "23: decode 0",
        "24: decode 0",  # here the first needs a block, and gets the last one of 1
        "25: decode 0",
        "26: decode 0",
        "27: decode 0",
        "28: decode 0",  # and the one before
        "29: prompt 1(9)",  # the first four tokens are where they were
        "38: decode 1",
    ]
    assert told.column("memory", "token_states")[1:8] == [
        23,
        24,
        21,
        22,
        23,
        24,
        21,
    ]  # 11 of 0, and 12, 8, 4 of 1
    assert told.summary["recomputed_tokens"] == 8
    assert told.summary["recompute_s"] == pytest.approx(9e-3)


def test_who_stopped_first_gives_up_first():
    """1 stops before 2 and loses all four blocks before 2 loses any."""
    owner = memory(slots=32)
    made = [Request(number, 0, tokens, 40) for number, tokens in enumerate((4, 15, 8))]
    first, second, third = (_held(owner, request) for request in made)
    for sequence in (second, third):
        owner.stop(sequence)
    assert owner.headroom == 7
    for length, left in ((8, (15, 8)), (12, (12, 8)), (16, (8, 8)), (24, (0, 8)), (28, (0, 4))):
        owner.extend(first, length - first.origin)
        assert (second.origin * bool(second.capacity), third.origin) == left
        owner.check_integrity()
    assert owner.admission(made[2], 9) is Admission.LATER
    assert owner.admission(made[2], 4) is Admission.OK  # what it still has


def test_blocks_that_others_share_are_not_given_up():
    """Of three blocks the child shares two with its parent; the last one it copied when it wrote."""
    owner = memory(slots=400)
    request = Request(0, 0, 10, 40)
    parent = _held(owner, request)
    child = fork(owner, parent)
    request.sequences.append(child)
    assert owner.append(child) == 1
    free = owner.pool.num_free
    owner.stop(child)
    assert owner.yielding == 1
    _held(owner, Request(1, 0, 4 * (free + 1), 1))
    assert (child.num_tokens, parent.num_tokens) == (8, 10)
    assert child.block_table == parent.block_table[:2]


def test_what_was_lost_is_forgotten_where_nobody_looked_in_between():
    """A sequence is entered up to its 12th token, loses four, and writes them again in another block."""
    owner = memory(slots=24)
    ledger = Ledger(owner)
    owner.watch(ledger)
    first, second = Request(0, 0, 12, 9), Request(1, 0, 12, 9)
    sequence, other = _held(owner, first), _held(owner, second)
    ledger.write(sequence)
    owner.stop(sequence)
    owner.extend(other, 1)
    assert sequence.num_tokens == 8
    owner.free(other)
    assert owner.admit(sequence, 13) == 8
    layout = ledger.layout([sequence])
    assert (ledger.enter(layout) == ledger.device.slots[layout.slots]).all()


def test_partial_preemption_brings_back_more_than_a_whole_one():
    rows = [(0, 10, 30)] * 6
    partial, whole = (story(96, *rows, preemption=mode).summary for mode in ("partial", "recompute"))
    assert partial["requests_finished"] == whole["requests_finished"] == 6
    assert 0 < partial["recomputed_tokens"] < whole["recomputed_tokens"]


def test_a_stopped_request_that_grew_past_the_memory_leaves_nothing_behind():
    policy = scheduled("vllm_v0", memory(slots=24), preemption="partial")
    told = Story(policy, ask((0, 20, 30), (0, 2, 2)), clock=clock())  # Story looks at what is held at the end
    assert told.column("requests", "status") == ["rejected", "finished"]


# Victims


def _held(owner, request):
    sequence = Sequence(request, 0, 0, request.prompt_tokens + request.output_tokens - 1)
    request.sequences.append(sequence)
    owner.admit(sequence, request.prompt_tokens)
    return sequence


def test_blocks_are_counted_once_however_many_share_them():
    owner = memory(slots=400)
    group, alone = Request(0, 0, 12, 4, n=3), Request(1, 0, 20, 4)
    first = _held(owner, group)
    group.sequences += [fork(owner, first), fork(owner, first)]
    _held(owner, alone)
    assert fewest_blocks([group, alone]) is group  # 3 blocks against 5
    assert most_blocks([group, alone]) is alone


def test_the_lowest_priority_is_the_greatest_value_and_of_equals_the_latest():
    made = [Request(number, 0, 1, 1, priority=value) for number, value in enumerate((2, 5, 5, 0))]
    assert lowest_priority(made).id == 2


class Prices:
    def seconds(self, request):
        return request.prompt_tokens


def test_a_victim_with_a_second_parameter_gets_the_costs():
    made = [Request(number, 0, prompt, 4) for number, prompt in enumerate((9, 4, 4, 12))]
    assert bound(cheapest_to_recover, Prices())(made).id == 2  # of equals the latest
    assert bound(most_blocks, Prices()) is most_blocks
    assert victim["fewest_slots"] is fewest_blocks
    assert victim["priority"] is lowest_priority


def test_cheapest_to_recover_weighs_the_way_that_each_would_go():
    """0 needs a block; 1 has 12 tokens, 2 has 5. Moved they cost 3 and 2 blocks, computed again 12 and 5 ms."""
    rows = (0, 4, 4), (0, 12, 3), (0, 5, 3)
    for block_ms, mode, log in (
        (0.5, "recompute", "recompute 2"),
        (0.5, "swap", "swap out 2"),
        (50.0, "hybrid", "recompute 2"),
    ):
        fields = {"preemption": mode, "victim": cheapest_to_recover}
        assert log in story(24, *rows, block_ms=block_ms, **fields).log[1]


def test_cached_blocks_need_not_be_computed_again():
    """Both give way with 17 tokens; of 1 a prompt of 16 is cached for another that begins alike."""
    owner = memory("prefix", slots=400, block_size=4)
    policy = scheduled("vllm_v0", owner)
    made = [Request(number, 0, 17, 4, content=(number // 2,), content_grain=16) for number in range(4)]
    told = {}

    def look(now, plan=policy.plan):
        step = plan(now)
        if now and not told:
            told.update({each.id: policy.recovery.recompute_seconds(each) for each in policy.running})
        return step

    policy.plan = look
    Story(policy, Asked(made), clock=clock())
    assert told == pytest.approx(dict.fromkeys(range(4), 2e-3))  # of 18 tokens 16 are cached; 1 ms a token


OVER = {
    "token": {},
    "multi_size": {"block_size": 2, "largest_block": 16, "slack": 0.5},
    "adaptive": {"block_size": 2, "largest_block": 16, "window": 5},
}


@pytest.mark.parametrize("kind", OVER)
@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1", "sarathi"])
def test_the_probe_finds_what_partial_preemptions_leave_over_other_allocators(kind, policy):
    lost = {"partial": 0, "recompute": 0}
    for mode in lost:
        for seed in range(4):
            over = memory(kind, slots=(64, 100, 150)[seed % 3], **OVER[kind])
            summary = run(over, crowd(seed, groups=bool(seed % 2)), Audit(every=1), policy, preemption=mode)
            lost[mode] += summary["recomputed_tokens"]
    assert 0 < lost["partial"] < lost["recompute"]


@pytest.mark.parametrize("mode", ["recompute", "swap", "hybrid", "partial"])
@pytest.mark.parametrize("who", ["cheapest_to_recover", "fewest_blocks", "earliest"])
def test_the_probe_finds_every_token_at_every_step(mode, who):
    moved = 0
    for seed in range(4):
        asked = crowd(seed, groups=bool(seed % 2))
        slots = random.Random(seed).choice((64, 100, 150))
        summary = run(memory(slots=slots), asked, Audit(every=1), preemption=mode, victim=who)
        moved += summary["preemptions"]
    assert moved


def test_a_step_that_nothing_else_needed_was_lost_as_a_whole():
    """Its overhead too: 12 tokens computed again beside no decode, of a model whose steps begin with 20 ms."""
    step = Step()
    request = Request(0, 0, 12, 4)
    step.chunks, step.num_prefill_tokens = [(Sequence(request, 0, 0, 15), 0, 12)], 12
    model = timing["roofline"](MODEL, DEVICE, step_overhead_ms=20)
    recovery = scheduled("vllm_v0", memory(slots=24)).recovery
    recovery.price(model, Transfers(None, None, 4))
    over = StepClock(model, Transfers(None, None, 4), recovery, None)
    whole = over.duration(step, 0)
    assert over.recompute_time == 0
    step.recomputed = [(0, 0)]
    assert over.duration(step, 0) == over.recompute_time == whole > 20_000_000
    step.num_decodes, step.decode_context = 2, 40
    over.duration(step, 0)
    assert over.recompute_time - whole < 20_000_000  # the decodes would have begun one as well
