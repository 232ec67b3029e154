"""Swaps beside the computation, as stories: who waits for which copy, and when memory is free.

A prompt takes 10 ms whatever its length, a decode 1 ms; blocks hold four slots.
"""

from __future__ import annotations

import pytest

from sim import Transfers, scheduler
from sim.audit.audit import Audit
from tests.sim.probing import requests, run
from tests.sim.story import Story, ask, memory, scheduled
from tests.sim.test_link import DEVICE, MODEL


def beside(block_ms: float, layer_wise: bool = False, **fields) -> Transfers:
    """A link on which a block takes so long."""
    if not layer_wise:
        return Transfers(None, None, 1, copy_latency_us=1e3 * block_ms, asynchronous=True, **fields)
    fields |= {"copies_per_block": 1, "copy_latency_us": 1e3 * block_ms, "host_bandwidth_gb_per_s": 1e9}
    return Transfers(MODEL, DEVICE, 1, asynchronous=True, layer_wise=True, **fields)


TWO = (0, 10, 8), (0, 12, 3)  # 3 + 3 blocks of 6: V0 lets the second give way at once


def story(block_ms: float, *rows, slots: int = 24, kind: str = "vllm_v0", **fields) -> Story:
    ways = {name: fields.pop(name) for name in ("prefetch", "layer_wise") if name in fields}
    policy = scheduled(kind, memory(slots=slots), preemption="swap", **fields)
    return Story(policy, ask(*(rows or TWO)), transfers=beside(block_ms, **ways))


def test_blocks_are_free_one_by_one_as_they_are_copied_and_nobody_waits():
    told = story(0.8)
    assert told.log == [
        "0: prompt 0(10) 1(12)",
        "10: decode 0, swap out 1",  # three blocks leave until 10.8, 11.6 and 12.4
        *(f"{at}: decode 0" for at in range(11, 17)),
        "19.4: decode 1, swap in 3 blocks",  # they come back from 17 on, when 0 is done
        "20.4: decode 1",
    ]
    assert told.column("memory", "time")[1:5] == [10, 11, 12, 13]
    assert told.column("memory", "internal")[1:5] == [12, 8, 4, 3 - 3]  # in flight: held, of no use
    assert told.column("memory", "free")[1:5] == [0, 4, 4, 8]  # 0 took a block at 12
    assert told.column("memory", "token_states")[1:5] == [11, 12, 13, 14]
    assert told.column("steps", "duration")[1:] == [1] * 9
    assert told.summary["swap_transfer_s"] == pytest.approx(4.8e-3)
    assert told.summary["swap_stall_s"] == pytest.approx(2.4e-3)  # nobody else was there to run from 17 on


def test_a_step_that_needs_a_block_waits_until_that_block_is_copied():
    told = story(5.0)
    assert told.log[1:4] == ["10: decode 0, swap out 1", "11: decode 0", "12: decode 0"]
    assert told.column("steps", "duration")[1:4] == [1, 1, 4]  # the block is there at 15
    assert told.log[4] == "16: decode 0"


def test_a_block_that_leaves_counts_for_growth_and_not_for_admission():
    """2 arrives while the blocks of 1 leave; it would have room only among those."""
    fast = story(0.001, (0, 10, 8), (0, 12, 3), (10.5, 2, 1))
    assert fast.log[1] == "10: decode 0, swap out 1"
    slow = story(3.0, (0, 10, 8), (0, 12, 3), (10.5, 2, 1), kind="orca")
    assert [line for line in slow.log if "prompt 2" in line] == ["29: prompt 2(2), decode 1"]
    assert slow.log[4:6] == ["14: decode 0", "15: decode 0"]  # the growth waited from 12 to 13


def test_a_swap_in_runs_ahead_while_others_compute():
    """At 15 the blocks of 1 are free; those of 2 come back in 2 ms, and 0 goes on meanwhile."""
    rows = (0, 7, 20), (0, 12, 6), (0, 8, 2)
    ahead, awaited = story(1.0, *rows, slots=32), story(1.0, *rows, slots=32, prefetch=False)
    assert ahead.log[1] == awaited.log[1] == "10: decode 0 1, swap out 2"
    assert ahead.log[6:9] == ["15: decode 0", "16: decode 0", "17: decode 0 2, swap in 2 blocks"]
    assert awaited.log[6:8] == ["15: decode 0 2, swap in 2 blocks", "18: decode 0"]
    assert ahead.summary["swap_stall_s"] == 0
    assert awaited.summary["swap_stall_s"] == pytest.approx(2e-3)
    assert ahead.summary["swap_transfer_s"] == awaited.summary["swap_transfer_s"] == pytest.approx(4e-3)


def test_nobody_runs_while_its_own_copy_is_in_flight():
    for ways in ({}, {"prefetch": False}):
        for block_ms in (0.3, 2.0, 20.0):
            policy = scheduled("vllm_v0", memory(slots=60), preemption="swap")
            there: dict[object, int] = {}

            def look(now, plan=policy.plan, policy=policy, there=there, ways=ways):
                step = plan(now)
                link = policy.allocator.link
                for request, (end, _) in policy.incoming.items():
                    there[request] = end
                for request in policy.running:
                    ready = max(now, link.awaited) if ways else now
                    assert there.get(request, 0) <= ready, f"{request} runs at {now}"
                return step

            policy.plan = look
            told = Story(policy, ask(*[(at, 9, 25) for at in range(8)]), transfers=beside(block_ms, **ways))
            assert told.summary["swapped_in_blocks"] > 0
            assert ways or there


def test_layer_by_layer_a_step_computes_what_is_there():
    """A model of four layers: three quarters of the millisecond hide a part of the wait for a block."""
    whole, layered = story(5.0), story(5.0, layer_wise=True)
    assert whole.column("steps", "duration")[3] == 4
    assert layered.column("steps", "duration")[3] == pytest.approx(4 - 0.75)


def test_where_nobody_can_run_the_engine_waits_for_the_link():
    told = story(2.0)
    begun, lasted = told.column("steps", "time"), told.column("steps", "duration")
    steps = [time + duration for time, duration in zip(begun, lasted, strict=True)]
    gap = [(end, begin) for end, begin in zip(steps, begun[1:], strict=False) if begin > end]
    assert gap == [(17, 23)]  # three blocks come back, and there is no step meanwhile
    at = told.column("memory", "time").index(17)
    assert told.column("memory", "token_states")[at] == 12  # the places are taken
    assert told.summary["swap_stall_s"] == pytest.approx(6e-3)


def test_an_arrival_is_served_while_the_engine_waits_for_the_link():
    told = story(20.0, *TWO, (55, 4, 2), chunked_prefill=True)
    assert told.log[7:] == [
        "34: decode 0",  # the last step before 1 is all on the host, at 70, and back, at 130
        "55: prompt 2(4)",
        "65: decode 2",
        "130: decode 1, swap in 3 blocks",
        "131: decode 1",
    ]


def test_the_last_copy_ends_before_the_run_does():
    """What is given up while its copy is in flight is held to the end of the copy."""
    told = story(30.0, (0, 22, 30))
    assert told.column("requests", "status") == ["rejected"]
    assert told.summary["duration_s"] * 1e3 >= 6 * 30


OVER = {
    "token": ("token", {}),
    "sizes": ("multi_size", {"block_size": 2, "largest_block": 16, "slack": 0.5}),
    "picked sizes": ("adaptive", {"block_size": 2, "largest_block": 16, "window": 5}),
    "cached": ("paged", {"prefix_caching": True}),
}


@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1", "sglang"])
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("precision", [None, "int8"])
def test_the_probe_finds_every_token_over_every_allocator_that_swaps(policy, over, precision):
    kind, fields = OVER[over]
    moved = 0
    for seed in range(4):
        there = memory(kind, slots=(64, 100, 150)[seed % 3], **fields)
        ways = {
            "prefetch": seed < 2,
            "quantization": precision,
            "host_bandwidth_gb_per_s": (1e-2, 1e-4)[seed % 2],
        }
        link = Transfers(MODEL, DEVICE, there.block_size, asynchronous=bool(seed), **ways)
        asked = requests(seed, groups=bool(seed % 2))
        summary = run(there, asked, Audit(every=1), policy, link, preemption="swap")
        moved += summary["swapped_in_blocks"]
    assert moved or policy == "sglang", "who looks ahead preempts nobody"


@pytest.mark.parametrize("policy", scheduler.kinds)
@pytest.mark.parametrize("ways", [{}, {"prefetch": False}])
def test_the_probe_finds_every_token_at_every_step(policy, ways):
    moved = preempted = 0
    for seed in range(6):
        over = memory(slots=(64, 100, 150)[seed % 3], block_size=(1, 4, 7)[seed % 3])
        link = Transfers(None, None, 1, copy_latency_us=(100, 3000)[seed % 2], asynchronous=True, **ways)
        asked = requests(seed, groups=bool(seed % 2))
        summary = run(over, asked, Audit(every=1), policy, link, preemption="swap")
        moved += summary["swapped_in_blocks"]
        preempted += summary["preemptions"]
    assert moved or not preempted, "who looks ahead preempts nobody"
