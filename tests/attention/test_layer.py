"""The layer: the first lines that a newcomer writes, and everything that they may get wrong."""

from __future__ import annotations

import re

import pytest
import torch

from attention import BlockAllocator, OutOfBlocks, PagedAttention, PagedKVCache
from attention.plain import plain_attention


def a_layer(num_heads=8, hidden_dim=64, **options):
    torch.manual_seed(0)
    return PagedAttention(hidden_dim, num_heads, 4, dtype=torch.float64, **options)


def a_cache(layer, total_blocks=16, **options):
    allocator = BlockAllocator(total_blocks, layer.block_size, layer.hidden_dim)
    return PagedKVCache(layer.block_size, layer.hidden_dim, allocator, **options)


def x(batch_size, num_tokens, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, num_tokens, 64, generator=random, dtype=torch.float64)


def test_the_first_example():
    allocator = BlockAllocator(total_blocks=128, block_size=16, hidden_dim=512)
    kv_cache = PagedKVCache(block_size=16, hidden_dim=512, allocator=allocator)
    attention = PagedAttention(hidden_dim=512, num_heads=8, block_size=16)
    output = attention(torch.randn(1, 1, 512), kv_cache)
    assert output.shape == (1, 1, 512)
    assert not output.requires_grad
    assert allocator.num_free == 127


def test_the_token_behind_the_last_slot_changes_nothing():
    allocator = BlockAllocator(total_blocks=128, block_size=16, hidden_dim=512)
    kv_cache = PagedKVCache(block_size=16, hidden_dim=512, allocator=allocator)
    attention = PagedAttention(hidden_dim=512, num_heads=8, block_size=16)
    attention(torch.randn(1, 2048, 512), kv_cache)
    k, v, table = kv_cache.k.clone(), kv_cache.v.clone(), kv_cache.block_table(0)
    with pytest.raises(OutOfBlocks, match="asked for 1 blocks, 0 of 128 are free"):
        attention(torch.randn(1, 1, 512), kv_cache)
    assert (kv_cache.length(0), kv_cache.block_table(0)) == (2048, table)
    assert torch.equal(kv_cache.k, k)
    assert torch.equal(kv_cache.v, v)


@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
@pytest.mark.parametrize("options", [{}, {"rope_theta": 1e4}, {"sliding_window": 3}, {"soft_cap": 2.0}])
def test_it_computes_attention_over_what_it_projects(num_kv_heads, options):
    layer = a_layer(num_kv_heads=num_kv_heads, **options)
    tokens = x(2, 11)
    out = layer(tokens, a_cache(layer))
    for row, mine in zip(tokens, out, strict=True):
        q, k, v = (project(row).view(11, -1, 8) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
        if "rope_theta" in options:
            q, k = turned(q), turned(k)
        plain, _ = plain_attention(q, k, v, 8**-0.5, options.get("sliding_window"), options.get("soft_cap"))
        torch.testing.assert_close(mine, layer.o_proj(plain.flatten(1)), rtol=0, atol=1e-12)


def turned(heads):
    """Rotary embedding by complex numbers."""
    pairs = torch.complex(heads[..., :4], heads[..., 4:])
    angles = torch.arange(len(heads), dtype=torch.float64)[:, None] * 1e4 ** (
        -torch.arange(4, dtype=torch.float64) / 4
    )
    pairs = pairs * torch.exp(1j * angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("options", [{}, {"rope_theta": 1e4}])
@pytest.mark.parametrize("parts", [(1, 1), (3, 1, 7), (11,)])
def test_calls_go_on_where_the_last_one_ended(options, parts):
    layer = a_layer(num_kv_heads=2, **options)
    tokens = x(3, sum(parts))
    whole, piecewise = a_cache(layer, 64), a_cache(layer, 64)
    pieces = [layer(part, piecewise) for part in tokens.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(tokens, whole), rtol=0, atol=1e-12)


def test_sequences_of_its_own_and_named_ones():
    layer = a_layer()
    cache = a_cache(layer, 32)
    first = layer(x(2, 3), cache)
    named = cache.new()
    torch.testing.assert_close(layer(x(1, 3), cache, seq_ids=[named])[0], first[0])
    branch = cache.fork(named)
    both = layer(x(2, 1, seed=5), cache, seq_ids=[branch, named])
    assert (cache.length(branch), cache.length(named), cache.length(0)) == (4, 4, 3)
    alone = layer(x(2, 1, seed=5), cache)
    torch.testing.assert_close(both[0], alone[0], rtol=0, atol=1e-12)


def test_layers_share_tables():
    layers = [a_layer(num_kv_heads=2, rope_theta=1e4, layer=index) for index in range(3)]
    shared = a_cache(layers[0], num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float64)
    own = [a_cache(layer) for layer in layers]
    sequences = [shared.new(), shared.new()]
    for counts, seed in (((5, 5), 1), ((1, 1), 2)):
        metadata = shared.extend(sequences, counts)
        tokens = x(2, counts[0], seed)
        flat, deep = tokens.flatten(0, 1), tokens
        for layer, cache in zip(layers, own, strict=True):
            flat = layer.attend(flat, shared, metadata)
            layer.layer = 0
            deep = layer(deep, cache)
            layer.layer = layers.index(layer)
        torch.testing.assert_close(flat, deep.flatten(0, 1), rtol=0, atol=1e-12)
    assert shared.allocator.num_free == 16 - 4


def test_positions_turn_what_they_say():
    layer = a_layer(rope_theta=1e4)
    shifted = layer(x(1, 4), a_cache(layer), positions=torch.arange(100, 104)[None])
    torch.testing.assert_close(
        shifted, layer(x(1, 4), a_cache(layer)), rtol=0, atol=1e-9
    )  # only distances count
    stretched = layer(x(1, 4), a_cache(layer), positions=torch.arange(0, 8, 2)[None])
    assert (stretched - shifted).abs().max() > 1e-3


def test_positions_that_go_on_are_allowed_without_rotary_embedding():
    layer = a_layer()
    cache = a_cache(layer)
    layer(x(1, 2), cache, positions=torch.tensor([[0, 1]]))
    layer(x(1, 1), cache, positions=torch.tensor([[2]]))
    assert cache.length(0) == 3


LAYERS = {
    "num_heads: got 7, expected a divisor of hidden_dim 64": {"num_heads": 7},
    "num_kv_heads: got 3, expected a divisor of num_heads 8": {"num_kv_heads": 3},
    "impl: got 'fast', expected one of auto, reference, torch, triton": {"impl": "fast"},
    "sliding_window: got 1.5, expected an integer >= 1, or None": {"sliding_window": 1.5},
    "soft_cap: got -1, expected a number above 0, or None": {"soft_cap": -1},
    "rope_theta: got heads of 1, expected an even width": {"num_heads": 64, "rope_theta": 1e4},
}


@pytest.mark.parametrize("message", LAYERS)
def test_sizes_that_do_not_go_together_are_told(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        a_layer(**LAYERS[message])


def other_cache(layer):
    return PagedKVCache(8, 64, BlockAllocator(4, 8, 64))


CALLS = {
    "x: got shape [1, 64], expected [batch_size, num_tokens, 64]": {"x": x(1, 1)[0]},
    "x: got shape [1, 0, 64], expected [batch_size, num_tokens, 64]": {"x": x(1, 0)},
    "x: got torch.float32 on cpu, expected torch.float64 on cpu as the weights": {"x": x(1, 1).float()},
    "x: got a batch of 2, expected 1 as before; reset() begins anew": {"x": x(2, 1)},
    "cache: got block_size 8, expected 4 as the layer": {"cache": other_cache},
    "cache: got K and V of [4, 16] heads": {
        "cache": lambda layer: a_cache(layer, num_kv_heads=4, head_dim=16)
    },
    "seq_ids: got 2, expected 1, one for each row of x": {"seq_ids": [0, 1]},
    "seq_ids: got 9, expected one of 0": {"seq_ids": [9]},
    "positions: got shape [1], expected [1, 1]": {"positions": torch.tensor([0])},
    "positions: got [[9]], expected [[1]], where the sequences go on": {"positions": torch.tensor([[9]])},
    "impl: got 'triton', but ": {"impl": "triton"},
}


@pytest.mark.parametrize("message", CALLS)
def test_mistakes_are_told_and_change_nothing(message):
    layer = a_layer()
    cache = a_cache(layer)
    layer(x(1, 1), cache)
    call = {"x": x(1, 1), "cache": cache} | CALLS[message]
    layer.impl = call.pop("impl", "auto")
    if callable(call["cache"]):
        call["cache"] = call["cache"](layer)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(**call)
    assert (cache.length(0), list(cache.sequences)) == (1, [0])
    assert not call["cache"].has_rows or call["cache"] is cache


def test_a_first_call_that_fails_leaves_no_sequences():
    layer = a_layer()
    cache = a_cache(layer, total_blocks=2)
    with pytest.raises(OutOfBlocks):
        layer(x(3, 4), cache)
    assert not cache.sequences
    layer(x(2, 4), cache)
