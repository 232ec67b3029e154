"""Real paged attention in torch, over the simulator's own block pool.

    from attention import BlockAllocator, PagedAttention, PagedKVCache, paged_attention

torch is imported when one of these names is first used, so that the simulator can hold a probe without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attention.cache import AttentionMetadata, BlockAllocator, OutOfBlocks, PagedKVCache
    from attention.functional import copy_blocks, paged_attention, write
    from attention.layer import PagedAttention

_HOMES = {
    "AttentionMetadata": "attention.cache",
    "BlockAllocator": "attention.cache",
    "OutOfBlocks": "attention.cache",
    "PagedAttention": "attention.layer",
    "PagedKVCache": "attention.cache",
    "copy_blocks": "attention.functional",
    "paged_attention": "attention.functional",
    "write": "attention.functional",
}

__all__ = [
    "AttentionMetadata", "BlockAllocator", "OutOfBlocks", "PagedAttention", "PagedKVCache", "copy_blocks",
    "paged_attention", "write",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attention' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
