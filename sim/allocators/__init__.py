"""Allocators: who owns which KV slots. Importing the package registers the built-in ones."""

from sim.allocators.base import Admission, Allocator, Capacity, MemoryUsage, allocator
from sim.allocators.contiguous import ContiguousAllocator
from sim.allocators.jenga import JengaAllocator
from sim.allocators.paged import PagedAllocator
from sim.allocators.prefix import PrefixAllocator
from sim.allocators.radix import RadixAllocator

__all__ = [
    "Admission", "Allocator", "Capacity", "ContiguousAllocator", "JengaAllocator", "MemoryUsage",
    "PagedAllocator", "PrefixAllocator", "RadixAllocator", "allocator",
]  # fmt: skip
