"""Real paged attention in torch, over the simulator's own block pool.

    from attention import BlockAllocator, PagedAttention, PagedKVCache, paged_attention

The core stands in this folder: `functional` (attention through block tables), `cache` and `layer`. Around it:
`kernels` (Triton), `generation` (a transformer that decodes with it), `swap`, `validation`, `calibration`, and
`probe`, which runs it on the simulator's tables.

torch is imported when one of these names is first used, so that the simulator can hold a probe without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attention.cache import AttentionMetadata, BlockAllocator, OutOfBlocks, PagedKVCache
    from attention.functional import copy_blocks, paged_attention, write
    from attention.layer import PagedAttention
    from attention.swap.swap_space import SwapSpace
    from attention.swap.swapping import swap_in, swap_out

_HOMES = {
    "AttentionMetadata": "cache",
    "BlockAllocator": "cache",
    "OutOfBlocks": "cache",
    "PagedAttention": "layer",
    "PagedKVCache": "cache",
    "SwapSpace": "swap.swap_space",
    "copy_blocks": "functional",
    "paged_attention": "functional",
    "swap_in": "swap.swapping",
    "swap_out": "swap.swapping",
    "write": "functional",
}

__all__ = [
    "AttentionMetadata", "BlockAllocator", "OutOfBlocks", "PagedAttention", "PagedKVCache", "SwapSpace",
    "copy_blocks", "paged_attention", "swap_in", "swap_out", "write",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attention' has no attribute {name!r}")
    return getattr(import_module(f"attention.{_HOMES[name]}"), name)
