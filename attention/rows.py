"""Rows: the Q, K and V that stand for tokens in a probe, drawn at random or computed by a transformer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attention.generation.transformer import Transformer

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16  # the smallest that the kernels of a GPU take
SEED = 20230923
NUM_ROWS = 4093
"""Different K and V, Q; identities take them in turn. A prime, so that no stride of identities hits few."""
SEQUENCE_TOKENS = 256
BLOCK_SIZE = 16

Rows = tuple[Tensor, Tensor, Tensor]
"""Q `[num_rows, num_heads, head_dim]`, K and V `[num_rows, num_kv_heads, head_dim]`."""


@functools.cache
def random_rows() -> Rows:
    """A fixed random table: N(0, 1), always the same."""
    random = torch.Generator().manual_seed(SEED)
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (torch.randn(NUM_ROWS, number, HEAD_DIM, generator=random) for number in heads)
    return q, k, v


@functools.cache
def model_rows() -> Rows:
    """What the last of two layers of a transformer with random weights has in its paged cache, always the same."""
    from attention.generation.transformer import Transformer, TransformerConfig

    config = TransformerConfig(
        hidden_dim=NUM_HEADS * HEAD_DIM, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, seed=SEED
    )
    return rows_of(Transformer(config), NUM_ROWS)


ROWS: dict[str, Callable[[], Rows]] = {"random": random_rows, "model": model_rows}


def rows_of(model: Transformer, num_rows: int) -> Rows:
    """Q of so many random tokens in a model's last layer, and the K and V that its paged cache has of them.

    Tokens stand in sequences of `SEQUENCE_TOKENS`, computed as prompts.
    """
    from attention.generation.kv import KVMetadata, PagedKV

    queries: list[Tensor] = []

    class Watched(PagedKV):
        """Keeps the queries of the last layer."""

        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, metadata: KVMetadata) -> Tensor:
            if layer == model.config.num_layers - 1:
                queries.append(q)
            return super().attend(layer, q, k, v, metadata)

    counts = [min(SEQUENCE_TOKENS, num_rows - first) for first in range(0, num_rows, SEQUENCE_TOKENS)]
    made = model.paged_kv(len(counts) * (SEQUENCE_TOKENS // BLOCK_SIZE), BLOCK_SIZE)
    kv = Watched(made.cache)
    seq_ids = [kv.new() for _ in counts]
    metadata = kv.extend(seq_ids, counts)
    random = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.config.vocab_size, (num_rows,), generator=random).to(kv.device)
    model(tokens, metadata.positions, kv, metadata)
    k, v = (
        torch.cat(
            [
                cache[-1, kv.cache.block_table(seq_id)].flatten(0, 1)[:count]
                for seq_id, count in zip(seq_ids, counts, strict=True)
            ]
        )
        for cache in (kv.cache.k, kv.cache.v)
    )
    return queries[0], k, v
