"""Allocators: who owns which KV slots. Importing the package registers the built-in ones."""

from sim.allocators.base import Admission, Allocator, Capacity, MemoryUsage, allocator
from sim.allocators.contiguous import ContiguousAllocator
from sim.allocators.nano_vllm import NanoAllocator
from sim.allocators.paged import PagedAllocator
from sim.allocators.prefix import PrefixAllocator
from sim.allocators.radix import RadixAllocator
from sim.allocators.token import TokenAllocator
from sim.allocators.vattention import VAttentionAllocator

__all__ = [
    "Admission", "Allocator", "Capacity", "ContiguousAllocator", "MemoryUsage", "NanoAllocator",
    "PagedAllocator", "PrefixAllocator", "RadixAllocator", "TokenAllocator", "VAttentionAllocator",
    "allocator",
]  # fmt: skip
