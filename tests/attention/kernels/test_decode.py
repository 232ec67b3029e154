"""Decode: one query token per sequence, split over its history and merged."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.kernels import launch
from attention.kernels.configurations import Configuration
from tests.attention.kernels.cases import NOWHERE, case

RAGGED = (1, 33, 0, 150, 16, 70)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("block_size", [1, 5, 16, 100, 256])
def test_every_block_size_and_group(device, block_size, group):
    paged = case(
        device, RAGGED, block_size=block_size, heads=2 * group, kv_heads=2, head_dim=16, seed=block_size
    )
    paged.check(num_splits=1 if (block_size + group) % 2 else 3)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 20, 40])
def test_any_number_of_splits(device, num_splits):
    case(device, (5, 100, 0, 300)).check(num_splits=num_splits)


def test_more_shares_than_are_merged_at_a_time(device):
    case(device, (5, 700), heads=2, kv_heads=1, sharpness=3.0).check(num_splits=40)


def test_splits_are_chosen_from_what_is_known_at_launch(device):
    paged = case(device, (1, 300), heads=2, kv_heads=1, head_dim=16)
    paged.check(num_splits=None)
    paged.check(num_splits=None, max_seq_len=1)  # a bound that is too low may be slow, never wrong
    paged.check(num_splits=None, max_seq_len=100_000)


@pytest.mark.parametrize("window", [1, 7, 32, 1000])
def test_a_window_reads_nothing_outside(device, window):
    paged = case(device, (1, 17, 130, 0, 290), sliding_window=window, block_size=7 if window == 7 else 16)
    paged.check(num_splits=1)
    paged.check(num_splits=4)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0, 2000.0])
def test_soft_cap(device, soft_cap):
    case(device, (1, 40, 130), soft_cap=soft_cap, sharpness=3.0).check(num_splits=2)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.5])
def test_any_scale(device, scale):
    case(device, (40, 130, 3), (5, 1, 3), scale=scale).check(num_splits=2)
    case(device, (40, 3), scale=scale, soft_cap=2.0).check(num_splits=1)


@pytest.mark.parametrize("sharpness", [3.0, 10.0])
def test_sharp_scores(device, sharpness):
    paged = case(device, RAGGED, sharpness=sharpness, scale=0.2)
    out, _ = paged.run(num_splits=2)
    want, _ = paged.expected()
    values = max(v.abs().max().item() for _, v in paged.histories if len(v))
    assert (out.cpu().double() - want).abs().max().item() <= 1e-5 * values * max(1.0, sharpness / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_short_types_at_most_twice_the_error_of_sdpa(device, dtype, num_splits):
    case(device, (1, 90, 200, 64), dtype=dtype, head_dim=64, heads=8).check(num_splits=num_splits)


@pytest.mark.parametrize("head_dim", [24, 72, 128, 256])
def test_head_dims(device, head_dim):
    case(device, (40, 3), head_dim=head_dim, heads=3, kv_heads=1).check(num_splits=2)


def test_many_heads_of_one_kv_head_are_cut_into_chunks(device):
    case(device, (70, 5), heads=71, kv_heads=1, head_dim=16).check(num_splits=2)


def test_shared_blocks(device):
    case(device, (80, 40, 32, 7), shared=2).check(num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_nothing_to_see_gives_zeros(device, num_splits):
    paged = case(device, (0, 0))
    out, lse = paged.run(num_splits=num_splits)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_one_split_is_the_same_in_any_batch(device):
    paged = case(device, (150, 90, 30))
    out, lse = paged.run(num_splits=1)
    for row in range(3):
        keep = slice(row, row + 1)
        one = dataclasses.replace(
            paged, q=paged.q[keep], block_tables=paged.block_tables[keep], seq_lens=paged.seq_lens[keep],
            histories=paged.histories[keep],
        )  # fmt: skip
        alone, lse_alone = one.run(num_splits=1)
        assert torch.equal(alone, out[keep])
        assert torch.equal(lse_alone, lse[keep])


def test_query_start_loc_tells_the_row(device):
    paged = case(device, (20, 50, 7), (1, 0, 1))
    paged.check(num_splits=1)
    paged.check(num_splits=2)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_of_sequences_with_other_numbers_of_queries_are_left_alone(device, splits):
    paged = case(device, (20, 50, 7, 30), (1, 3, 0, 1))
    out, lse = torch.full_like(paged.q, 7.0), torch.full(paged.q.shape[:2], 7.0, device=device)
    launch._decode(dataclasses.replace(paged.call(), num_splits=splits), out, lse, None)
    want, _ = paged.expected()
    assert (out[[0, 4]].cpu() - want[[0, 4]]).abs().max().item() <= 1e-5
    assert bool((out[1:4] == 7.0).all())
    assert bool((lse[1:4] == 7.0).all())


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("block_size", [48, 64, 256])
def test_any_tile(device, tile, block_size):
    paged = case(device, (300, 5), heads=3, kv_heads=1, head_dim=16, block_size=block_size)
    out, _ = launch.attend(paged.call(), {"decode": Configuration(tile, 16, 4, 3)})
    want, _ = paged.expected()
    assert (out.cpu() - want).abs().max().item() <= 1e-5


@pytest.mark.parametrize(
    "layout", ["heads first", "beside each other", "odd rows", "odd start", "dims apart"]
)
def test_strided_caches(device, layout):
    paged = case(device, (40, 3, 0), index=torch.int64)
    dense = torch.stack([paged.k_cache, paged.v_cache])  # [2, num_blocks, block_size, kv_heads, head_dim]
    if layout == "heads first":
        caches = dense.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "beside each other":
        caches = dense.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "odd rows":
        caches = torch.nn.functional.pad(dense, (0, 1), value=math.nan)[..., :-1]
    elif layout == "odd start":
        caches = torch.nn.functional.pad(dense, (1, 7), value=math.nan)[..., 1:-7]
    else:
        caches = dense.transpose(2, 4).contiguous().transpose(2, 4)
    assert not caches[0].is_contiguous() or layout == "beside each other"
    qkv = torch.full((3, 9, 32), math.nan, device=device)
    qkv[:, :4] = paged.q
    strided = dataclasses.replace(paged, q=qkv[:, :4], k_cache=caches[0], v_cache=caches[1])
    strided.check(num_splits=2)


def test_a_length_beyond_the_table_reads_nothing_behind_it(device):
    paged = case(device, (32, 32))
    wide = torch.full((2, 5), NOWHERE, dtype=torch.int32, device=device)
    wide[:, :2] = paged.block_tables[:, :2]
    beyond = dataclasses.replace(paged, block_tables=wide[:, :2], seq_lens=paged.seq_lens + 40)
    out, _ = beyond.run(num_splits=2)
    want, _ = paged.expected()
    assert (out.cpu().double() - want).abs().max().item() <= 1e-5


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=3),
    block_size=st.integers(1, 256),
    group=st.integers(1, 9),
    num_splits=st.integers(1, 9),
    window=st.none() | st.integers(1, 130),
    soft_cap=st.none() | st.floats(0.3, 50),
    head_dim=st.sampled_from([16, 24, 40]),
    seed=st.integers(0, 2**31),
)
def test_drawn_cases(device, lengths, block_size, group, num_splits, window, soft_cap, head_dim, seed):
    options = {"sliding_window": window, "soft_cap": soft_cap}
    paged = case(
        device, lengths, block_size=block_size, heads=group, kv_heads=1, head_dim=head_dim, seed=seed,
        **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    paged.check(num_splits=num_splits)
