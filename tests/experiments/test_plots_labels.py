"""Labels: policies named by what tells them apart, axes with units, numbers that read well."""

from __future__ import annotations

import doctest

import pytest

from experiments.plots import labels as plots_labels
from experiments.plots.labels import axis_label, number, policy_labels, setting, wrapped
from tests.experiments.fake_results import CONTIGUOUS, ORCA, PAGED, VLLM


def labels(*pairs: tuple[dict, dict]) -> list[str]:
    return policy_labels([{"allocator": allocator, "scheduler": scheduler} for allocator, scheduler in pairs])


def test_examples_hold() -> None:
    assert doctest.testmod(plots_labels).failed == 0


def test_quickstart_policies_have_their_short_names() -> None:
    oracle = CONTIGUOUS | {"reserve": "oracle"}
    assert labels((CONTIGUOUS, ORCA), (oracle, ORCA), (PAGED, VLLM)) == [
        "contiguous max",
        "contiguous oracle",
        "paged 16",
    ]


def test_a_scheduler_is_named_only_where_the_allocator_does_not_tell() -> None:
    assert labels((PAGED, ORCA), (PAGED, VLLM)) == ["orca", "vllm_v0"]
    assert labels((PAGED, VLLM), (PAGED, VLLM | {"preemption": "swap"})) == [
        "vllm_v0 recompute",
        "vllm_v0 swap",
    ]
    assert labels((PAGED, ORCA), (PAGED, VLLM), (CONTIGUOUS, ORCA)) == [
        "paged 16, orca",
        "paged 16, vllm_v0",
        "contiguous max",
    ]


def test_other_fields_carry_their_names_and_units() -> None:
    made = [{"timing": {"kind": "roofline", "step_overhead_ms": ms}} for ms in (5, 20)]
    assert policy_labels(made) == ["roofline step overhead 5 ms", "roofline step overhead 20 ms"]
    flags = [{"allocator": PAGED | {"prefix_caching": on}} for on in (True, False)]
    assert policy_labels(flags) == ["paged 16 prefix caching", "paged 16 no prefix caching"]
    traces = [{"workload": {"kind": "trace", "path": f"/somewhere/{name}.csv"}} for name in "ab"]
    assert policy_labels(traces) == ["trace a.csv", "trace b.csv"]


def test_seeds_axes_and_names_are_no_part_of_a_label() -> None:
    made = [{"name": name, "seed": seed, "allocator": PAGED} for name, seed in (("a", 0), ("b", 1))]
    assert policy_labels(made) == ["paged 16", "paged 16"]
    sizes = [{"allocator": PAGED | {"block_size": size}} for size in (8, 16)]
    assert policy_labels(sizes) == ["paged 8", "paged 16"]
    assert (
        policy_labels(sizes, ["allocator.block_size"])[0] == policy_labels(sizes, ["allocator.block_size"])[1]
    )


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("workload.arrivals.rate", "Request rate (requests/s)"),
        ("timing.step_overhead_ms", "Step overhead (ms)"),
        ("workload.sampling.n", "Samples per request"),
        ("scheduler.some_new_knob", "Some new knob"),
    ],
)
def test_axes_have_units(path: str, label: str) -> None:
    assert axis_label(path) == label


def test_settings_in_words() -> None:
    assert setting("workload.arrivals.rate", 1.0) == "1 request/s"
    assert setting("timing.step_overhead_ms", 20) == "step overhead 20 ms"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567.0, "1,234,567"),
        (0.0, "0"),
        (-0.5, "−0.5"),
        (1e-7, "1.00e-07"),
        (float("nan"), "–"),
        (99.96, "100"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_long_labels_break_at_commas_first() -> None:
    assert wrapped("paged 16", 0.9) == "paged 16"
    assert wrapped("paged 16, vllm_v0 swap", 1.0) == "paged 16\nvllm_v0 swap"


def test_blocks_of_several_sizes_are_told_from_the_least_to_the_largest() -> None:
    several = {"kind": "multi_size", "block_size": 8, "largest_block": 128}
    assert labels((PAGED, VLLM), (several, VLLM)) == ["paged 16", "multi_size 8 to 128"]
    assert labels((several, VLLM), (several | {"largest_block": 64}, VLLM)) == [
        "multi_size 8 to 128",
        "multi_size 8 to 64",
    ]


def test_switches_are_told_by_who_has_them() -> None:
    transfers = [
        {"asynchronous": False, "layer_wise": False, "prefetch": True},
        {"asynchronous": True, "layer_wise": False, "prefetch": False},
        {"asynchronous": True, "layer_wise": True, "prefetch": False},
        {"asynchronous": True, "layer_wise": False, "prefetch": True},
    ]
    told = policy_labels([{"allocator": PAGED, "transfers": each} for each in transfers])
    assert told == ["synchronous", "asynchronous", "asynchronous layer wise", "asynchronous prefetch"]
    cached = [PAGED | {"kind": "prefix", "prefix_caching": value} for value in (None, False)]
    assert labels(*((each, VLLM) for each in cached)) == [
        "prefix 16 prefix caching",
        "prefix 16 no prefix caching",
    ]
