"""Precision: how far off K and V of a transformer's own cache come back from a quantised swap."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.generation.kv import PagedKV
from attention.generation.transformer import Transformer, TransformerConfig
from attention.plain import exact, plain_attention
from attention.swap.grids import GRIDS
from attention.swap.quantization import Quantization
from attention.swap.swap_space import SwapSpace

BLOCK_SIZE = 16
NUM_SEQUENCES, NUM_TOKENS = 4, 256
SEED = 20230923


def cache_errors(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """By format: `value_error`, the largest of single K and V; `bound_share`, the largest share of its bound;
    `attention_error`, the largest of attention in the last layer.

    A transformer with random weights, heads of 128 and K and V of unit variance computes prompts of random tokens; its
    cache is swapped out in the format and in again.
    """
    config = TransformerConfig(hidden_dim=512, num_heads=4, num_kv_heads=2, seed=SEED, dtype=dtype)
    model = Transformer(config, device)
    tokens = torch.randint(
        config.vocab_size, (NUM_SEQUENCES * NUM_TOKENS,), generator=torch.Generator().manual_seed(SEED)
    ).to(device)
    found = {}
    for name in GRIDS:
        try:
            quantization = Quantization.named(name)
        except ValueError:  # torch has no such type
            continue
        kv = model.paged_kv(NUM_SEQUENCES * NUM_TOKENS // BLOCK_SIZE, BLOCK_SIZE)
        seq_ids = [kv.new() for _ in range(NUM_SEQUENCES)]
        metadata = kv.extend(seq_ids, [NUM_TOKENS] * NUM_SEQUENCES)
        model(tokens, metadata.positions, kv, metadata)
        before = _attention(kv, seq_ids)
        space = SwapSpace(kv.cache, kv.cache.allocator.total_blocks, quantization=quantization, measure=True)
        error = space.swap_out(seq_ids).error
        space.swap_in(seq_ids)
        space.synchronize()
        assert error is not None
        found[name] = {
            "value_error": error.max_error,
            "bound_share": error.share,
            "attention_error": float((_attention(kv, seq_ids) - before).abs().max()),
        }
    return found


def _attention(kv: PagedKV, seq_ids: list[int]) -> Tensor:
    """By the formula over the last layer of the cache, for a drawn query of each sequence."""
    cache = kv.cache
    _, _, _, num_heads, head_dim = cache.k.shape
    random = torch.Generator().manual_seed(SEED)
    outs = []
    for seq_id in seq_ids:
        table = cache.block_table(seq_id)
        k, v = (part[-1, table].flatten(0, 1).to(exact(part.dtype)) for part in (cache.k, cache.v))
        q = torch.randn(1, num_heads, head_dim, generator=random).to(k)
        outs.append(plain_attention(q, k, v, head_dim**-0.5)[0])
    return torch.cat(outs)
