"""Generations through swap and recompute: what a model says does not depend on where its K and V have been."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from attention.cache import BlockAllocator, PagedKVCache
from attention.generation.agreement import compare
from attention.generation.beam_search import BeamSearch
from attention.generation.decoding import BetweenSteps, Decoded, decode
from attention.generation.kv import KV, ContiguousKV, PagedKV
from attention.generation.sampling import Greedy, Sampling
from attention.generation.search import DecodingRequest
from attention.generation.transformer import Transformer, TransformerConfig
from attention.swap.swap_space import SwapSpace

TOLERANCE = 1e-5
BLOCK_SIZE = 4
NUM_BLOCKS = 160


def continued(impl: str, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(property, error, bound) of a small float32 transformer that generates with sharing, over a paged cache.

    Greedy, sampled and searched by beams, the same requests four times: over plain K and V, over blocks, over
    blocks of which some are swapped out and in between steps, and over blocks of which some are freed and
    computed again. Infinite is the error where tokens differ; otherwise it is that of the scores, which are sums
    of log-probabilities.
    """
    model = Transformer(TransformerConfig(seed=7), device)
    plain = _decoded(model, ContiguousKV(model.config.num_layers, device))
    paged = _decoded(model, _blocks(model, impl, device))
    unexplained = compare(paged, plain).unexplained()
    yield "decoding with sharing: unexplained choices", float(len(unexplained)), 0.0
    swapped = _decoded(model, _blocks(model, impl, device), Swaps())
    yield "decoding through swap, the same to the bit", _difference(swapped, paged), 0.0
    recomputed = _decoded(model, _blocks(model, impl, device), recomputes)
    yield "decoding through recomputing", _difference(recomputed, paged), TOLERANCE


@dataclass(slots=True)
class Swaps:
    """Between steps, every second sequence leaves and comes back, at other blocks as others take theirs."""

    space: SwapSpace | None = field(default=None)

    def __call__(self, step: int, cache: PagedKVCache) -> None:
        """Called by `decode`."""
        self.space = self.space or SwapSpace(cache, NUM_BLOCKS)
        leaving = list(cache.sequences)[step % 2 :: 2]
        before = [cache.block_table(seq_id) for seq_id in leaving]
        self.space.swap_out(leaving)
        guest = cache.new()
        cache.extend([guest], BLOCK_SIZE)
        self.space.swap_in(leaving[::-1])
        cache.free(guest)
        assert not leaving or before != [cache.block_table(seq_id) for seq_id in leaving]


def recomputes(step: int, cache: PagedKVCache) -> dict[int, int]:
    """Between steps, every third sequence loses its K and V and gets a new name; `decode` computes them again."""
    names = {}
    for seq_id in list(cache.sequences)[step % 3 :: 3]:
        cache.free(seq_id)
        names[seq_id] = cache.new()
    return names


def _blocks(model: Transformer, impl: str, device: torch.device) -> PagedKV:
    config = model.config
    cache = PagedKVCache(
        BLOCK_SIZE, config.hidden_dim, BlockAllocator(NUM_BLOCKS, BLOCK_SIZE, config.hidden_dim),
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        dtype=config.dtype, device=device,
    )  # fmt: skip
    return PagedKV(cache, impl)


def _decoded(model: Transformer, kv: KV, between_steps: BetweenSteps | None = None) -> Decoded:
    requests = [
        DecodingRequest([5, 17, 99, 4, 31, 8, 77], 12, Greedy()),
        DecodingRequest([3, 141, 59, 26, 53], 12, Sampling(n=3, seed=1), request_id=1),
        DecodingRequest([2, 71, 82, 81, 82, 84, 59, 45, 23], 12, BeamSearch(3), request_id=2),
    ]
    return decode(model, kv, requests, between_steps=between_steps, keep_decisions=True)


def _difference(got: Decoded, expected: Decoded) -> float:
    worst = 0.0
    for ours, theirs in zip(got.outputs, expected.outputs, strict=True):
        if [output.tokens for output in ours] != [output.tokens for output in theirs]:
            return float("inf")
        for mine, other in zip(ours, theirs, strict=True):
            worst = max(worst, abs(mine.score - other.score))
    return worst
