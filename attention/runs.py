"""Runs: blocks that follow each other in the cache, read as one larger block."""

from __future__ import annotations

import torch
from torch import Tensor


def longest_run(block_tables: Tensor, seq_lens: Tensor, cache: Tensor, most: int) -> int:
    """The largest power of two, at most `most`, of which all these tables are made of aligned runs.

    The entries of every table, taken so many at a time, then follow each other and begin at a multiple of their
    number; the last ones in use may be fewer, and their run is inside the cache. Shapes and meaning are those of
    `paged_attention`, whose `k_cache` is the cache.
    """
    run = 1
    while 2 * run <= most and breach(block_tables, seq_lens, cache, 2 * run) is None:
        run *= 2
    return run


def breach(block_tables: Tensor, seq_lens: Tensor, cache: Tensor, run: int) -> tuple[int, int] | None:
    """Row and column of the first entry in use that is not where an aligned run of so many blocks has it."""
    num_blocks, block_size = cache.shape[:2]
    columns = torch.arange(block_tables.shape[1], device=block_tables.device)
    used = columns * block_size < seq_lens[:, None]
    first = block_tables[:, columns // run * run]
    outside = (
        first + run > num_blocks
    )  # what is left behind the last whole run of the cache cannot be read at once
    wrong = used & ((first % run != 0) | outside | (block_tables != first + columns % run))
    places = wrong.nonzero()
    return (int(places[0, 0]), int(places[0, 1])) if len(places) else None


def folded(k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, run: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same caches in blocks that are `run` times as large, and tables with an entry for each of these.

    Nothing is copied. Raises ValueError for caches whose blocks do not lie one behind the other.
    """
    blocks = k_cache.shape[0] // run
    caches = []
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        size = cache.shape[1]
        if cache.stride(0) != size * cache.stride(1):
            raise ValueError(
                f"{name}: got a stride of {cache.stride(0)} from block to block, expected {size * cache.stride(1)} "
                f"where runs of {run} blocks are read at once"
            )
        shape, strides = (blocks, run * size, *cache.shape[2:]), (run * cache.stride(0), *cache.stride()[1:])
        caches.append(cache.as_strided(shape, strides, cache.storage_offset()))
    return caches[0], caches[1], (block_tables[:, ::run] // run).contiguous()
