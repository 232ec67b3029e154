"""Prefill: many query tokens per sequence, ragged, in chunks, mixed with decode."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.kernels.cases import Case, case


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("block_size", [1, 5, 16, 100, 256])
def test_every_block_size_and_group(device, block_size, group):
    paged = case(
        device, (1, 33, 90, 17, 64), (1, 33, 20, 0, 5), block_size=block_size, heads=2 * group, kv_heads=2,
        head_dim=16, seed=block_size,
    )  # fmt: skip
    paged.check()


def test_whole_prompts_of_one_length(device):
    case(device, (45, 45), (45, 45)).check()


def test_one_token_rows_of_a_mixed_batch_go_through_decode(device):
    paged = case(device, (300, 40, 9, 0, 200), (1, 40, 1, 1, 7))
    paged.check(num_splits=1)
    paged.check(num_splits=5)


def test_chunks_give_what_the_whole_prompt_gives(device):
    whole = case(device, (77,), (77,), head_dim=16)
    out, lse = whole.run()
    for start, stop in ((0, 30), (30, 31), (31, 77)):
        chunk = Case(
            whole.q[start:stop], whole.k_cache, whole.v_cache, whole.block_tables,
            torch.tensor([stop], dtype=torch.int32, device=device),
            torch.tensor([0, stop - start], dtype=torch.int32, device=device), whole.histories,
        )  # fmt: skip
        part, part_lse = chunk.run()
        assert (part - out[start:stop]).abs().max().item() <= 1e-5
        assert (part_lse - lse[start:stop]).abs().max().item() <= 1e-5


@pytest.mark.parametrize("window", [1, 9, 40, 1000])
def test_a_window_reads_nothing_outside(device, window):
    case(
        device, (100, 33, 150), (7, 33, 1), sliding_window=window, block_size=5 if window == 9 else 16
    ).check()


def test_soft_cap(device):
    case(device, (50, 20), (20, 20), soft_cap=2.0, sharpness=3.0).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types_at_most_twice_the_error_of_sdpa(device, dtype):
    case(device, (90, 200, 64), (90, 30, 2), dtype=dtype, head_dim=64, heads=8).check()


@pytest.mark.parametrize("head_dim", [24, 72, 256])
def test_head_dims(device, head_dim):
    case(device, (40, 18), (25, 18), head_dim=head_dim, heads=3, kv_heads=1).check()


def test_many_heads_of_one_kv_head_are_cut_into_chunks(device):
    case(device, (20, 9), (5, 9), heads=71, kv_heads=1, head_dim=16).check()


def test_shared_blocks_and_many_sequences(device):
    lengths = [40 + index % 7 for index in range(140)]  # more than are looked up at a time
    query_lens = [index % 3 for index in range(140)]
    case(device, lengths, query_lens, shared=2, heads=1, kv_heads=1, head_dim=16).check(num_splits=1)


def test_more_queries_than_tokens_see_nothing_before_the_first(device):
    paged = case(device, (3, 20), (5, 20), head_dim=16)
    out, lse = paged.run()
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert torch.equal(lse[:2], torch.full_like(lse[:2], -math.inf))
    assert out.isfinite().all()


@settings(max_examples=15)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=3),
    block_size=st.integers(1, 256),
    group=st.integers(1, 9),
    window=st.none() | st.integers(1, 90),
    soft_cap=st.none() | st.floats(0.3, 50),
    seed=st.integers(0, 2**31),
)
def test_drawn_cases(device, shapes, block_size, group, window, soft_cap, seed):
    options = {"sliding_window": window, "soft_cap": soft_cap}
    lengths = [context + queries for context, queries in shapes]
    query_lens = [queries for _, queries in shapes]
    paged = case(
        device, [*lengths, 5], [*query_lens, 2], block_size=block_size, heads=group, kv_heads=1, head_dim=16,
        seed=seed, **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    paged.check()
