"""The engine against the naive stepper: equal to the last bit for every allocator and scheduler."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import (
    Capacity,
    Device,
    Model,
    Recorder,
    Request,
    Transfers,
    allocator,
    order,
    scheduler,
    simulate,
    timing,
    victim,
)
from sim.layer_groups import LayerKind
from sim.prefixes.eviction import eviction
from tests.sim.naive import run_naively

MODEL = Model(
    name="tiny", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, num_params=1e6,
    active_params=1e6, max_model_len=64,
)  # fmt: skip
DEVICE = Device(name="d", flops_per_s=1e12, memory_bytes_per_s=1e10, memory_bytes=1e9, host_bytes_per_s=1e9)

KINDS = (LayerKind(1, 2), LayerKind(3, 2, 7), LayerKind(2, 2, 20), LayerKind(1, state_bytes=7))
ALLOCATORS = {
    "contiguous max": ("contiguous", {}),
    "contiguous pow2": ("contiguous", {"reserve": "pow2"}),
    "contiguous oracle first fit": ("contiguous", {"reserve": "oracle", "placement": "first_fit"}),
    "contiguous oracle best fit": ("contiguous", {"reserve": "oracle", "placement": "best_fit"}),
    "paged 1": ("paged", {"block_size": 1, "watermark": 0.05}),
    "paged 4": ("paged", {"block_size": 4}),
    "paged 16 no watermark": ("paged", {"block_size": 16, "watermark": 0.0}),
    "paged 4 little host": ("paged", {"block_size": 4, "num_host_blocks": 6}),
    "paged 4 cached": ("paged", {"block_size": 4, "prefix_caching": True}),
    "paged 5 cached little host": (
        "paged",
        {"block_size": 5, "prefix_caching": True, "num_host_blocks": 6, "watermark": 0.0},
    ),
    "multi size": ("multi_size", {"block_size": 2, "largest_block": 16, "slack": 0.3}),
    "multi size little host": (
        "multi_size",
        {"block_size": 4, "largest_block": 16, "slack": 1.0, "num_host_blocks": 6, "watermark": 0.1},
    ),
    "multi size cached": (
        "multi_size",
        {"block_size": 2, "largest_block": 16, "slack": 0.3, "prefix_caching": True},
    ),
    "adaptive": ("adaptive", {"block_size": 2, "largest_block": 16, "window": 5}),
    "adaptive cached": (
        "adaptive",
        {"block_size": 4, "largest_block": 16, "window": 5, "watermark": 0.1, "prefix_caching": True},
    ),
    "token": ("token", {}),
    "vattention": ("vattention", {"watermark": 0.1}),
    "vattention eager": ("vattention", {"reclamation": "eager"}),
    "prefix 4": ("prefix", {"block_size": 4}),
    "prefix 16 of 0.10.0": ("prefix", {"block_size": 16, "watermark": 0.1, "keyless_first": False}),
    "prefix 8 without caching": ("prefix", {"block_size": 8, "prefix_caching": False}),
    "nano 4": ("nano_vllm", {"block_size": 4}),
    "prefix 4 window 10": ("prefix", {"block_size": 4, "windows": [10]}),
    "prefix 4 full and windows": ("prefix", {"block_size": 4, "windows": [None, 9, 1]}),
    "prefix 2 windows of 0.10.0": (
        "prefix",
        {"block_size": 2, "windows": [5, None, 5], "watermark": 0.1, "keyless_first": False},
    ),
    "prefix 8 windows without caching": (
        "prefix",
        {"block_size": 8, "windows": [None, 3, 20], "prefix_caching": False},
    ),
    "prefix 4 of four kinds of layers": ("prefix", {"block_size": 4}, KINDS),
    "jenga 1": ("jenga", {"block_size": 1}),
    "jenga 4 of four kinds of layers": ("jenga", {"block_size": 4}, KINDS),
    "jenga 2 full and sliding": ("jenga", {"block_size": 2, "watermark": 0.1}, KINDS[:2]),
    "radix 1": ("radix", {}),
    "radix 4 lfu": ("radix", {"block_size": 4, "eviction": eviction["lfu"], "watermark": 0.1}),
}
RARE_ALLOCATORS = {
    "prefix 3 four windows": ("prefix", {"block_size": 3, "windows": [16, None, 40, 3]}),
    "prefix 1 full and window": ("prefix", {"block_size": 1, "windows": [None, 4]}),
    "prefix 16 window and full": ("prefix", {"block_size": 16, "windows": [30, None], "watermark": 0.1}),
    "jenga 3 of three kinds of layers": ("jenga", {"block_size": 3}, KINDS[:3]),
}
ORDERS = {
    **{kind: partial(lambda each: each, order[kind]) for kind in ("fcfs", "sjf", "ljf", "priority")},
    "sjf predicted": lambda: partial(order["sjf"], noise=0.5, seed=3),
    "edf": lambda: partial(order["edf"], target_s=0.01, per_prompt_token_ms=1.0),
    "mlfq": lambda: order["mlfq"](quantum=3, levels=4, prompt_weight=0.1),
    "mlfq promoting": lambda: order["mlfq"](quantum=2, levels=3, prompt_weight=0.2, starvation_s=0.02),
    "vtc": order["vtc"],
    "vtc by outputs": lambda: order["vtc"](input_weight=0.1, output_weight=1.7),
}
RANKED = ("sjf predicted", "edf", "mlfq", "mlfq promoting", "vtc", "vtc by outputs")
TIMINGS = {
    "fixed": timing["fixed"](None, None, prefill_ms=7.0, decode_ms=3.0),
    "linear": timing["linear"](None, None),
    "roofline": timing["roofline"](MODEL, DEVICE, step_overhead_ms=0.01),
}


MODES = ["auto", "recompute", "swap", "hybrid", "partial"]


class Given:
    """A workload of requests that a test made."""

    def __init__(self, rows, beams=None):
        self.rows = rows
        self.clients = None
        self.think_time = 0
        self.beams = beams

    def requests(self):
        at = 0
        for number, (gap, prompt, output, width, beam) in enumerate(self.rows):
            at += gap
            content = (number % 3, number % 2, *range(number % 5))
            ranked = {"priority": number * 7 % 3, "tenant": number * 7 % 3}
            named = {"content": content, "content_grain": 6, **ranked}
            if beam:
                yield Request(number, at, prompt, output, beam_width=width, **named)
            else:
                yield Request(number, at, prompt, output, n=width, **named)


def build(allocator_name: str, scheduler_kind: str, slots: int, **fields):
    kind, allocator_fields, *layers = (ALLOCATORS | RARE_ALLOCATORS)[allocator_name]
    capacity = Capacity(num_slots=slots, max_model_len=64)
    if layers:
        capacity = Capacity(num_slots=slots, max_model_len=64, layers=layers[0], kv_bytes=13 * slots)
    memory = allocator[kind](capacity, **allocator_fields)
    if "order" in fields:
        fields["order"] = ORDERS[fields["order"]]()
    if "victim" in fields:
        fields["victim"] = victim[fields["victim"]]
    return memory, scheduler[scheduler_kind](memory, **fields)


def both(
    workload: Given, allocator_name: str, scheduler_kind: str, clock: str, slots: int, link=None, **fields
):
    tables = {"requests": [], "steps": [], "memory": []}
    recorder = Recorder(lambda table, columns: tables[table].append(columns))
    memory, policy = build(allocator_name, scheduler_kind, slots, **fields)
    transfers = Transfers(MODEL, DEVICE, memory.block_size, **(link or {}))
    summary = simulate(
        workload,
        scheduler=policy,
        timing=TIMINGS[clock],
        transfers=transfers,
        recorder=recorder,
        max_model_len=64,
    )
    memory.check_integrity()
    assert memory.usage().token_states == memory.usage().reserved == memory.usage().internal == 0
    joined = {
        table: {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        if chunks
        else {}
        for table, chunks in tables.items()
    }
    _, policy = build(allocator_name, scheduler_kind, slots, **fields)
    naive = run_naively(list(workload.requests()), policy, TIMINGS[clock], transfers, 64, workload.beams)
    return summary, joined, naive


def assert_equal(summary, tables, naive) -> None:
    requests = tables["requests"]
    names = ("arrival_time", "first_scheduled_time", "first_token_time", "finish_time")
    as_ns = {name: [-1 if np.isnan(t) else round(t * 1e9) for t in requests[name]] for name in names}
    rows = list(
        zip(
            requests["request_id"], as_ns["arrival_time"], requests["prompt_tokens"], requests["output_tokens"],
            requests["status"], as_ns["first_scheduled_time"], as_ns["first_token_time"], as_ns["finish_time"],
            requests["preemptions"], requests["reason"], requests["cached_tokens"], strict=True,
        )
    )  # fmt: skip
    assert sorted(rows) == sorted(naive.requests)
    steps = tables["steps"]
    if naive.steps:
        for column, values in zip(
            ("time", "duration", "prefill_tokens", "decode_seqs", "running", "waiting"),
            zip(*naive.steps, strict=True),
            strict=True,
        ):
            expected = np.array(values) / 1e9 if column in ("time", "duration") else np.array(values)
            np.testing.assert_array_equal(steps[column], expected, err_msg=column)
    assert summary["steps"] == len(naive.steps)
    for column, values in zip(
        ("time", None, "token_states", "reserved", "internal", "external", "free"),
        zip(*naive.memory, strict=True),
        strict=False,  # the running and waiting requests behind them are those of the steps
    ):
        if column is not None:
            expected = np.array(values) / 1e9 if column == "time" else np.array(values)
            np.testing.assert_array_equal(tables["memory"][column], expected, err_msg=column)
    for name, value in naive.counters.items():
        assert summary[name] == value, name
    last_arrival = max(row[1] for row in naive.requests)
    for name, value in naive.averages(last_arrival).items():
        if value is None:
            assert np.isnan(summary[name])
        else:
            assert summary[name] == value, name
    assert summary["requests_finished"] + summary["requests_rejected"] == len(naive.requests)


MS = 1_000_000
single = st.tuples(
    st.sampled_from([0, 0, 1, MS, 3 * MS, 10 * MS, 37 * MS, 400 * MS]),
    st.integers(1, 70), st.integers(1, 60), st.just(1), st.just(False),
)  # fmt: skip
group = st.tuples(
    st.sampled_from([0, 1, 3 * MS, 37 * MS, 400 * MS]), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4),
    st.booleans(),
)  # fmt: skip


@pytest.mark.parametrize("scheduler_kind", scheduler.kinds)
@pytest.mark.parametrize("allocator_name", ALLOCATORS)
@settings(max_examples=12)
@given(
    rows=st.lists(single, min_size=1, max_size=14),
    slots=st.sampled_from([64, 96, 150, 400]),
    clock=st.sampled_from(list(TIMINGS)),
    max_num_seqs=st.sampled_from([1, 3, 32]),
    preemption=st.sampled_from(MODES),
    who=st.sampled_from(victim.kinds),
    first=st.sampled_from(["fcfs", "fcfs", "sjf", "ljf"]),
)
def test_single_sequences(
    scheduler_kind, allocator_name, rows, slots, clock, max_num_seqs, preemption, who, first
):
    fields = {"max_num_seqs": max_num_seqs, "preemption": preemption, "victim": who, "order": first}
    assert_equal(*both(Given(rows), allocator_name, scheduler_kind, clock, slots, **fields))


@pytest.mark.parametrize("scheduler_kind", scheduler.kinds)
@pytest.mark.parametrize("first", RANKED)
@settings(max_examples=12)
@given(
    rows=st.lists(st.one_of(single, single, single, group), min_size=1, max_size=14),
    allocator_name=st.sampled_from(["paged 1", "paged 4", "paged 4 little host"]),
    slots=st.sampled_from([96, 150, 400]),
    clock=st.sampled_from(list(TIMINGS)),
    max_num_seqs=st.sampled_from([1, 4, 32]),
    preemption=st.sampled_from(["auto", "swap"]),
)
def test_orders(scheduler_kind, first, rows, allocator_name, slots, clock, max_num_seqs, preemption):
    fields = {"max_num_seqs": max_num_seqs, "preemption": preemption, "order": first}
    workload = Given(rows, beams=(0.1, 1))
    assert_equal(*both(workload, allocator_name, scheduler_kind, clock, slots, **fields))


@pytest.mark.parametrize("scheduler_kind", scheduler.kinds)
@pytest.mark.parametrize(
    "allocator_name",
    [
        "paged 1",
        "paged 4",
        "paged 16 no watermark",
        "paged 4 little host",
        "token",
        "paged 4 cached",
        "paged 5 cached little host",
        "multi size",
        "adaptive",
        "prefix 4",
        "prefix 16 of 0.10.0",
        "prefix 8 without caching",
        "prefix 4 full and windows",
        "prefix 2 windows of 0.10.0",
        "prefix 8 windows without caching",
        "prefix 4 of four kinds of layers",
        "jenga 4 of four kinds of layers",
        "radix 1",
        "radix 4 lfu",
    ],
)
@settings(max_examples=12)
@given(
    rows=st.lists(st.one_of(single, group), min_size=1, max_size=8),
    slots=st.sampled_from([96, 150, 400]),
    clock=st.sampled_from(["fixed", "roofline"]),
    preemption=st.sampled_from(MODES),
    turnover=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_groups(scheduler_kind, allocator_name, rows, slots, clock, preemption, turnover):
    workload = Given(rows, beams=(turnover, 1))
    assert_equal(*both(workload, allocator_name, scheduler_kind, clock, slots, preemption=preemption))


CHUNKED = {"vllm_v0": {"chunked_prefill": True}, "vllm_v1": {}, "aisimulate": {}, "sarathi": {}}


@pytest.mark.parametrize("scheduler_kind", CHUNKED)
@pytest.mark.parametrize("allocator_name", ALLOCATORS)
@settings(max_examples=12)
@given(
    rows=st.lists(single, min_size=1, max_size=14),
    slots=st.sampled_from([64, 96, 150, 400]),
    clock=st.sampled_from(list(TIMINGS)),
    budget=st.sampled_from([1, 2, 5, 16, 40, 100]),
    max_num_seqs=st.sampled_from([1, 3, 32]),
    preemption=st.sampled_from(MODES),
    who=st.sampled_from(victim.kinds),
    first=st.sampled_from(["fcfs", "fcfs", "sjf", "priority"]),
)
def test_prompts_in_chunks(
    scheduler_kind, allocator_name, rows, slots, clock, budget, max_num_seqs, preemption, who, first
):
    fields = {"max_num_seqs": max_num_seqs, "preemption": preemption, "victim": who, "order": first}
    fields |= {"max_num_batched_tokens": budget, **CHUNKED[scheduler_kind]}
    assert_equal(*both(Given(rows), allocator_name, scheduler_kind, clock, slots, **fields))


@pytest.mark.parametrize("scheduler_kind", CHUNKED)
@pytest.mark.parametrize(
    "allocator_name",
    [
        "paged 1",
        "paged 4",
        "paged 4 little host",
        "token",
        "paged 4 cached",
        "paged 5 cached little host",
        "multi size",
        "multi size little host",
        "adaptive",
        "prefix 4",
        "prefix 16 of 0.10.0",
        "prefix 4 full and windows",
        "radix 1",
        "radix 4 lfu",
    ],
)
@settings(max_examples=12)
@given(
    rows=st.lists(st.one_of(single, group), min_size=1, max_size=8),
    slots=st.sampled_from([96, 150, 400]),
    clock=st.sampled_from(["fixed", "roofline"]),
    budget=st.sampled_from([4, 9, 16, 40]),
    preemption=st.sampled_from(MODES),
    turnover=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_groups_in_chunks(scheduler_kind, allocator_name, rows, slots, clock, budget, preemption, turnover):
    fields = {"max_num_batched_tokens": budget, "preemption": preemption, **CHUNKED[scheduler_kind]}
    workload = Given(rows, beams=(turnover, 1))
    assert_equal(*both(workload, allocator_name, scheduler_kind, clock, slots, **fields))


SWAPPING = [name for name, (kind, *_) in ALLOCATORS.items() if getattr(allocator[kind], "can_swap", False)]
BESIDE = {
    "ahead": {"asynchronous": True},
    "awaited": {"asynchronous": True, "prefetch": False},
    "layer by layer": {"asynchronous": True, "layer_wise": True},
    "awaited layer by layer": {"asynchronous": True, "prefetch": False, "layer_wise": True},
    "not at all": {},
}


@pytest.mark.parametrize("scheduler_kind", scheduler.kinds)
@pytest.mark.parametrize("beside", BESIDE)
@settings(max_examples=8)
@given(
    rows=st.lists(st.one_of(single, group), min_size=2, max_size=10),
    memory=st.sampled_from(SWAPPING),
    slots=st.sampled_from([64, 96, 150, 400]),
    clock=st.sampled_from(["fixed", "roofline"]),
    bandwidth=st.sampled_from([1e-4, 1e-3, 1e-2]),  # a block of four slots takes 10, 1 or 0.1 ms
    budget=st.sampled_from([None, 9, 40]),
    max_num_seqs=st.sampled_from([4, 32]),
    preemption=st.sampled_from(["swap", "swap", "hybrid", "partial"]),
    who=st.sampled_from(["latest", "earliest", "cheapest_to_recover"]),
    precision=st.sampled_from([None, "int8"]),
)
def test_swaps_beside_the_computation(
    scheduler_kind,
    beside,
    rows,
    memory,
    slots,
    clock,
    bandwidth,
    budget,
    max_num_seqs,
    preemption,
    who,
    precision,
):
    fields = {"preemption": preemption, "victim": who, "max_num_seqs": max_num_seqs}
    if budget and scheduler_kind in CHUNKED:
        fields |= {"max_num_batched_tokens": budget, **CHUNKED[scheduler_kind]}
    link = {"host_bandwidth_gb_per_s": bandwidth, "quantization": precision, **BESIDE[beside]}
    workload = Given(rows, beams=(0.1, 1))
    assert_equal(*both(workload, memory, scheduler_kind, clock, slots, link, **fields))


def test_a_growth_whose_sequences_have_all_left_changes_no_books():
    """Windows that move in a stretch, in which a tick of the calendar is left without members by a preemption."""
    made = [(0, 1, 5, 1, False), (0, 47, 7, 1, False), (0, 47, 4, 1, False), (0, 41, 3, 1, False)]
    fields = {"max_num_seqs": 32, "victim": "most_blocks"}
    assert_equal(*both(Given(made), "prefix 4 full and windows", "lightllm", "fixed", 96, **fields))


RARE = {
    "a page that another leaves later in the plan": (
        [(0, 12, 8), (0, 16, 1), (0, 8, 1), (0, 32, 1)], "prefix 3 four windows", 150, "vllm_v0",
        {"victim": "fewest_blocks", "chunked_prefill": True, "max_num_batched_tokens": 16},
    ),
    "chunks give back between decodes": (
        [(0, 32, 24), (0, 9, 16), (1, 1, 58), (0, 1, 14), (400 * MS, 8, 1)], "prefix 1 full and window", 150, "vllm_v0",
        {"victim": "lowest_priority", "order": "sjf", "chunked_prefill": True, "max_num_batched_tokens": 40},
    ),
    "a growth evicts what the head would hit": (
        [(0, 1, 39), (0, 16, 24)], "prefix 16 window and full", 64, "vllm_v1",
        {"max_num_batched_tokens": 5, "reserve_full_prompt": False, "long_prefill_token_threshold": 7},
    ),
    "who gives a page back first": (
        [
            (0, 1, 1), (0, 1, 1), (0, 2, 32), (400 * MS, 16, 16), (0, 16, 5), (0, 16, 5), (0, 1, 16), (0, 24, 5),
            (0, 1, 1), (0, 1, 1), (0, 16, 16), (400 * MS, 15, 1), (0, 39, 1), (0, 22, 1), (0, 1, 5),
        ],
        "jenga 3 of three kinds of layers", 150, "trtllm", {"order": "vtc", "capacity": "max_utilization"},
    ),
    "pages that give way to another kind": (
        [
            (0, 1, 1), (0, 1, 1), (0, 1, 38), (0, 1, 47), (0, 1, 1), (0, 1, 5), (0, 1, 1), (0, 16, 1), (0, 48, 1),
            (0, 5, 15),
        ],
        "jenga 3 of three kinds of layers", 64, "static", {"order": "sjf predicted", "max_num_seqs": 4},
    ),
    "one that stands in two levels gives way once": (
        [(0, 10, 20), (0, 24, 8), (0, 15, 8), (37 * MS, 58, 5), (0, 7, 8)], "jenga 1", 120, "nano_vllm",
        {"order": "mlfq promoting", "max_num_seqs": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RARE)
def test_what_random_runs_find_once_in_a_thousand(case):
    rows, name, slots, kind, fields = RARE[case]
    made = [(*row, 1, False) for row in rows]
    for clock in TIMINGS:
        assert_equal(*both(Given(made), name, kind, clock, slots, **fields))


def test_memory_that_a_swap_in_took_ahead_is_not_counted_on():
    """A step that only grew its batch, and whose plan then gave the last blocks to a swap-in."""
    rows = [
        (10, 48, 1, 1), (3, 47, 53, 1), (0, 27, 30, 1), (1, 14, 24, 2), (37, 19, 58, 1), (37, 6, 19, 3),
        (10, 28, 28, 1), (1, 14, 46, 1), (37, 17, 21, 1), (10, 24, 49, 1), (37, 28, 38, 1), (1, 39, 46, 1),
        (400, 43, 34, 1), (400, 27, 4, 1),
    ]  # fmt: skip
    made = [(gap * MS, prompt, output, width, width == 3) for gap, prompt, output, width in rows]
    link = {"asynchronous": True, "host_bandwidth_gb_per_s": 1.16343e-4}
    fields = {"preemption": "swap", "victim": "earliest", "max_num_seqs": 5}
    told = both(Given(made, beams=(0, 1)), "paged 16 no watermark", "vidur", "linear", 96, link, **fields)
    assert_equal(*told)


OPTIONS = {
    "sglang chunks": ("sglang", {"chunked_prefill_size": 8, "max_num_batched_tokens": 30}),
    "sglang mixed chunks": ("sglang", {"chunked_prefill_size": 8, "mixed_chunk": True}),
    "sglang bold": ("sglang", {"schedule_conservativeness": 0.1, "policy": "lof", "chunked_prefill_size": None}),
    "sglang bold and mixed": ("sglang", {"schedule_conservativeness": 0.05, "mixed_chunk": True}),
    "sglang random": ("sglang", {"policy": "random", "schedule_conservativeness": 0.3}),
    "sglang depth first": ("sglang", {"policy": "dfs-weight", "max_num_seqs": 4}),
    "sglang of long outputs": ("sglang", {"max_new_tokens": 40}),
    "sglang of short outputs": ("sglang", {"max_new_tokens": 5}),
    "lightllm estimating": ("lightllm", {"busy_share": 0.7, "estimated_output": 5}),
    "lightllm always estimating": ("lightllm", {"busy_share": 1.0, "estimated_output": 1}),
    "lightllm of long outputs": ("lightllm", {"max_new_tokens": 40, "max_num_batched_tokens": 70}),
    "lightllm of short outputs": ("lightllm", {"max_new_tokens": 5}),
    "trtllm chunks": ("trtllm", {"chunked_context": True, "max_num_batched_tokens": 9}),
    "trtllm at most": ("trtllm", {"capacity": "max_utilization"}),
    "trtllm at most in chunks": (
        "trtllm", {"capacity": "max_utilization", "chunked_context": True, "max_num_batched_tokens": 16},
    ),
    "trtllm of long outputs": ("trtllm", {"max_new_tokens": 40, "max_num_batched_tokens": 64}),
    "trtllm of short outputs": ("trtllm", {"max_new_tokens": 5}),
    "nano_vllm chunks": ("nano_vllm", {"max_num_batched_tokens": 10}),
    "nano_vllm few": ("nano_vllm", {"max_num_batched_tokens": 40, "max_num_seqs": 2}),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=20)
@given(
    rows=st.lists(single, min_size=1, max_size=14),
    allocator_name=st.sampled_from(list(ALLOCATORS)),
    slots=st.sampled_from([64, 96, 150, 400]),
    clock=st.sampled_from(list(TIMINGS)),
    preemption=st.sampled_from(["auto", "swap"]),
    first=st.sampled_from(["fcfs", "fcfs", "fcfs", "sjf", "mlfq", "vtc"]),
)
def test_options(options, rows, allocator_name, slots, clock, preemption, first):
    kind, fields = OPTIONS[options]
    workload = Given(rows, beams=(0.1, 1))
    assert_equal(
        *both(workload, allocator_name, kind, clock, slots, preemption=preemption, order=first, **fields)
    )


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=8)
@given(
    rows=st.lists(st.one_of(single, group), min_size=1, max_size=8),
    allocator_name=st.sampled_from(["paged 1", "paged 4", "paged 16 no watermark", "paged 4 little host"]),
    slots=st.sampled_from([96, 150, 400]),
    preemption=st.sampled_from(["auto", "swap"]),
    turnover=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_groups_with_options(options, rows, allocator_name, slots, preemption, turnover):
    kind, fields = OPTIONS[options]
    workload = Given(rows, beams=(turnover, 1))
    assert_equal(*both(workload, allocator_name, kind, "fixed", slots, preemption=preemption, **fields))


def test_branches_grow_in_the_order_of_their_requests():
    """All branches of a group that V1 admits again get its new place; blocks of two sizes tell who grew first."""
    rows = [
        (0, 34, 34, 3, False), (0, 6, 22, 2, True), (3, 24, 29, 1, True), (0, 19, 21, 1, False),
        (0, 38, 17, 1, False), (10, 38, 31, 3, True), (0, 1, 27, 1, False), (10, 31, 1, 2, False),
        (0, 11, 21, 2, True), (1, 24, 21, 1, True),
    ]  # fmt: skip
    made = [(gap * MS, *rest) for gap, *rest in rows]
    fields = {"preemption": "partial", "victim": "lowest_priority", "max_num_seqs": 4}
    for turnover in (0.0, 0.1, 0.7):
        workload = Given(made, beams=(turnover, 1))
        assert_equal(*both(workload, "adaptive", "vllm_v1", "linear", 96, **fields))
