"""Moves: writing by slots and copying blocks, bit for bit what indexing does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.kernels.moving import copy_blocks, runs, write

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def values(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 50).to(dtype).to(device)


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(DTYPES),
    block_size=st.integers(1, 40),
    kv_heads=st.integers(1, 5),
    head_dim=st.sampled_from([8, 16, 72, 80]),
    slots=st.lists(st.integers(0, 59), max_size=6, unique=True),
    dropped=st.lists(st.integers(0, 5), max_size=2),
)
def test_tokens_land_in_their_slots_and_nowhere_else(
    device, dtype, block_size, kv_heads, head_dim, slots, dropped
):
    num_blocks = -(-60 // block_size)
    k_cache = values(device, dtype, num_blocks, block_size, kv_heads, head_dim)
    v_cache = values(device, dtype, num_blocks, kv_heads, block_size, head_dim).transpose(1, 2)
    qkv = values(device, dtype, len(slots), 3 * kv_heads, head_dim)
    k, v = qkv[:, kv_heads : 2 * kv_heads], qkv[:, 2 * kv_heads :]
    slots = [-1 if row in dropped else slot for row, slot in enumerate(slots)]
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            want_k[slot // block_size, slot % block_size] = k[row]
            want_v[slot // block_size, slot % block_size] = v[row]
    write(k, v, k_cache, v_cache, torch.tensor(slots, dtype=torch.int64, device=device))
    assert torch.equal(k_cache, want_k)
    assert torch.equal(v_cache, want_v)


def test_a_slot_outside_the_cache_drops_its_token(device):
    caches = values(device, torch.float32, 2, 3, 4, 1, 16)
    before = caches.clone()
    k = values(device, torch.float32, 3, 1, 16)
    write(k, k, caches[0], caches[1], torch.tensor([12, -1, 2**20], dtype=torch.int32, device=device))
    assert torch.equal(caches, before)


def test_many_heads_take_several_programs(device):
    cache = values(device, torch.float16, 2, 3, 4, 40, 256)
    k, v = values(device, torch.float16, 2, 5, 40, 256)
    slots = torch.tensor([3, 0, 11, 7, 5], dtype=torch.int32, device=device)
    write(k, v, cache[0], cache[1], slots)
    assert torch.equal(cache[0].flatten(0, 1)[slots.long()], k)
    assert torch.equal(cache[1].flatten(0, 1)[slots.long()], v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_copied_in_every_tensor(device, dtype):
    layers = values(device, dtype, 3, 6, 7, 2, 24)
    heads_first = values(device, dtype, 6, 2, 7, 24).transpose(1, 2)
    odd = values(device, dtype, 6, 7 * 24 + 1)[:, 1:]
    scales = values(device, torch.float32, 6, 7, 2)
    caches = [*layers, heads_first, odd, scales]
    pairs = torch.tensor([[0, 3], [1, 4], [0, 5]], device=device)
    want = [cache.clone() for cache in caches]
    for cache in want:
        cache[pairs[:, 1]] = cache[pairs[:, 0]]
    copy_blocks(caches, pairs)
    for cache, expected in zip(caches, want, strict=True):
        assert torch.equal(cache, expected)


def test_no_pairs_copy_nothing(device):
    cache = values(device, torch.float32, 2, 4, 1, 8)
    before = cache.clone()
    copy_blocks([cache], torch.empty(0, 2, dtype=torch.int64, device=device))
    assert torch.equal(cache, before)


def test_layers_of_one_storage_are_one_launch(device):
    k = values(device, torch.float32, 4, 3, 2, 1, 8)
    v = values(device, torch.float32, 4, 3, 2, 1, 8)
    other = values(device, torch.float32, 3, 2, 1, 8)
    alternating = [tensor for layer in range(4) for tensor in (k[layer], v[layer])]
    assert [count for _, _, count in runs([*k, *v, other])] == [4, 4, 1]
    assert [count for _, _, count in runs(alternating)] == [1] * 8
    assert [(distance, count) for _, distance, count in runs([k[3], k[1]])] == [(-2 * k.stride(0), 2)]
