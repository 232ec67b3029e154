"""Calibrated step times against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import Device, Model, Step, Transfers, UserError, timing
from sim.timing.profile import Curve, DecodeCost, DenseCost, MoveCost, PrefillCost, Profile
from tests.sim.test_timing import A100, OPT, near, step

PROFILE = Profile(
    device="a device", kind="cuda", date="2025-11-22", dtype="bfloat16", copy_gb_per_s=3000.0, read_gb_per_s=3000.0,
    decode=DecodeCost(base_us=5.0, us_per_sequence=0.1, ns_per_block=0.5, ms_per_kv_gb=0.4, ms_per_tflop=1.0),
    prefill=PrefillCost(
        base_us=6.0, us_per_sequence=0.5, ms_per_query_gb=0.3, ms_per_kv_gb=0.6, ms_per_tflop=2.0
    ),
    dense=DenseCost(base_us=10.0, ms_per_billion_weights={"1": 0.8, "8": 0.8, "64": 1.2, "512": 4.8}),
    copy=MoveCost(base_us=4.0, us_per_layer=1.0, us_per_block=0.2, ms_per_gb=0.7),
    swap_out=MoveCost(base_us=8.0, us_per_layer=2.0, us_per_block=0.4, ms_per_gb=20.0),
    swap_in=MoveCost(base_us=9.0, us_per_layer=3.0, us_per_block=0.3, ms_per_gb=25.0),
)  # fmt: skip

# OPT-13B: 40 layers of 40 heads of 128; a token has 20,480 bytes of K and V a layer; 12.85e9 weights.
KV, FLOPS = 20_480, 4 * 40 * 128


def calibrated(model: Model | None = OPT, device: Device | None = None, **fields):
    return timing["calibrated"](model, device, profile=PROFILE, **fields)


def test_a_decode_step_by_hand():
    """30 sequences over 9,000 tokens: 30 tokens lie 22/56 of the way from 0.8 to 1.2 ms per billion weights."""
    blocks = 9000 / 16 + 30 * 15 / 32  # the last block of each is half full
    attention = 5e-6 + 30 * 0.1e-6 + blocks * 0.5e-9 + 9000 * (KV * 0.4e-12 + FLOPS * 1e-15)
    dense = 10e-6 * 40 + 12.85e9 * (0.8 + 0.4 * 22 / 56) * 1e-12
    assert calibrated().decode_seconds(30, 9000) == near(dense + 40 * attention)
    uneven = calibrated()
    uneven.num_entries = 123  # blocks differ in size: those that the tables list
    assert uneven.decode_seconds(30, 9000) == near(dense + 40 * (attention + (123 - blocks) * 0.5e-9))
    late = calibrated(step_overhead_ms=2.0)
    assert late.decode_seconds(30, 9000) == near(0.002 + dense + 40 * attention)


def test_a_fused_step_by_hand():
    """Chunks of 100 after 400 and of 20 from the start, beside 8 decodes over 2,000 tokens."""
    pairs = 100 * 400 + 100 * 101 / 2 + 20 * 21 / 2
    query_bytes = 120 * 2 * 40 * 128 * 2
    prefill = 6e-6 + 2 * 0.5e-6 + query_bytes * 0.3e-12 + 520 * KV * 0.6e-12 + pairs * FLOPS * 2e-15
    blocks = 2000 / 16 + 8 * 15 / 32
    decode = 5e-6 + 8 * 0.1e-6 + blocks * 0.5e-9 + 2000 * (KV * 0.4e-12 + FLOPS * 1e-15)
    dense = 10e-6 * 40 + 12.85e9 * (1.2 + 3.6 * 64 / 448) * 1e-12  # 128 tokens
    both = step(decodes=8, context=2000, chunks=((400, 100), (0, 20)))
    assert calibrated().seconds(both) == near(dense + 40 * (prefill + decode))
    only = calibrated().seconds(step(chunks=((400, 100), (0, 20))))
    assert only == near(10e-6 * 40 + 12.85e9 * (1.2 + 3.6 * 56 / 448) * 1e-12 + 40 * prefill)


def test_past_the_last_point_the_curve_goes_on_in_proportion():
    curve = PROFILE.dense.curve()
    assert [curve(tokens) * 1e12 for tokens in (1, 3, 8, 36, 512, 1024)] == near(
        [0.8, 0.8, 0.8, 1.0, 4.8, 9.6]
    )
    assert Curve([(4, 2.0)])(1) == 2.0


def test_small_blocks_cost_more():
    """Blocks of 1 instead of 16: every token is a block, and none is half full."""
    more = calibrated(block_size=1).decode_seconds(30, 9000) - calibrated().decode_seconds(30, 9000)
    assert more == near(40 * 0.5e-9 * (9000 - 9000 / 16 - 30 * 15 / 32))


def test_a_refined_cost_holds_from_then_on():
    clock = calibrated()
    before = clock.decode_seconds(30, 9000)
    clock.refine(replace(PROFILE.decode, base_us=7.0))
    assert clock.decode_seconds(30, 9000) - before == near(40 * 2e-6)
    assert clock.seconds(step(decodes=30, context=9000)) == clock.decode_seconds(30, 9000)


def test_two_devices_share_heads_and_weights():
    pair = replace(A100, count=2)
    bases = 40 * (10e-6 + 5e-6 + 30 * 0.1e-6 + (9000 / 16 + 30 * 15 / 32) * 0.5e-9)
    alone = calibrated().decode_seconds(30, 9000)
    assert calibrated(device=A100).decode_seconds(30, 9000) == alone
    assert calibrated(device=pair).decode_seconds(30, 9000) == near(bases + (alone - bases) / 2)


def test_a_mixture_of_experts_reads_what_its_tokens_use():
    """Up to 8 times the weights of a token are read; one token's are computed with."""
    mixture = Model(
        name="moe", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, num_params=8e9,
        active_params=1e9, max_model_len=64,
    )  # fmt: skip
    clock = timing["calibrated"](mixture, None, profile=replace(PROFILE, decode=DecodeCost()))
    base = 2 * 10e-6
    assert clock.decode_seconds(1, 1) == near(base + 0.8e-3)
    assert clock.decode_seconds(3, 3) == near(base + 3 * 0.8e-3)
    assert clock.decode_seconds(20, 20) == near(base + 8 * 0.8e-3)
    assert clock.decode_seconds(1024, 1024) == near(base + 9.6e-3)


def test_it_needs_a_model():
    with pytest.raises(UserError, match="timing calibrated needs a model"):
        calibrated(None)


@given(decodes=st.integers(1, 5000), data=st.data())
def test_a_decode_step_costs_the_same_to_the_bit(decodes, data):
    context = data.draw(st.integers(decodes, decodes * 5000))
    clock = calibrated(step_overhead_ms=0.3)
    assert clock.decode_seconds(decodes, context) == clock.seconds(step(decodes, context))


@given(
    decodes=st.integers(0, 300), mean=st.integers(1, 4000), chunks=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(1, 2000)), max_size=4
    )
)  # fmt: skip
def test_times_are_numbers_and_more_work_takes_no_less(decodes, mean, chunks):
    clock = calibrated()
    some = clock.seconds(step(decodes, decodes * mean, tuple(chunks)))
    more = clock.seconds(step(decodes, decodes * mean, (*chunks, (0, 100))))
    assert 0 <= some <= more < math.inf


@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        ({}, "ms_per_billion_weights: got no points"),
        ({"1": 1.0, "many": 2.0}, "got 'many' tokens, expected an integer >= 1"),
        ({"0": 1.0}, "got '0' tokens, expected an integer >= 1"),
        ({"1": 1.0, "4": 0.5, "2": 2.0}, "got 0.5 for 4 tokens, expected at least 2 as for 2 tokens"),
    ],
)
def test_a_curve_that_is_none_is_refused(points, complaint):
    with pytest.raises(UserError, match=complaint):
        DenseCost(ms_per_billion_weights=points)


def test_measured_transfers_by_hand():
    """3 blocks of 13.1 MB out, 2 in, 4 copied; a block counts once for each of 40 layers."""
    clock = Transfers(OPT, A100, 16, profile=PROFILE)
    moving = Step()
    moving.swapped_out_blocks, moving.swapped_in_blocks, moving.copied_blocks = 3, 2, 4
    size = 13_107_200
    swap_out = 8e-6 + 40 * 2e-6 + 3 * (40 * 0.4e-6 + size * 20e-12)
    swap_in = 9e-6 + 40 * 3e-6 + 2 * (40 * 0.3e-6 + size * 25e-12)
    copy = 4e-6 + 40 * 1e-6 + 4 * (40 * 0.2e-6 + size * 0.7e-12)
    assert clock.seconds(moving) == near(swap_out + swap_in + copy)
    moving.swapped_out_blocks = moving.swapped_in_blocks = 0
    assert clock.seconds(moving) == near(copy)
    with pytest.raises(UserError, match=r"transfers\.profile needs a model"):
        Transfers(None, A100, 16, profile=PROFILE)
