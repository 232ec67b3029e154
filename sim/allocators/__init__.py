"""Allocators: who owns which KV slots. Importing the package registers the built-in ones."""

from sim.allocators.adaptive import AdaptiveAllocator
from sim.allocators.base import Allocator, allocator
from sim.allocators.cached_paged import CachedPagedAllocator
from sim.allocators.capacity import Admission, Capacity, MemoryUsage
from sim.allocators.contiguous import ContiguousAllocator
from sim.allocators.jenga import JengaAllocator
from sim.allocators.multi_size import MultiSizeAllocator
from sim.allocators.nano_vllm import NanoAllocator
from sim.allocators.paged import PagedAllocator
from sim.allocators.prefix import PrefixAllocator
from sim.allocators.radix import RadixAllocator
from sim.allocators.token import TokenAllocator
from sim.allocators.vattention import VAttentionAllocator

__all__ = [
    "AdaptiveAllocator", "Admission", "Allocator", "CachedPagedAllocator", "Capacity",
    "ContiguousAllocator", "JengaAllocator", "MemoryUsage", "MultiSizeAllocator", "NanoAllocator",
    "PagedAllocator", "PrefixAllocator", "RadixAllocator", "TokenAllocator", "VAttentionAllocator",
    "allocator",
]  # fmt: skip
