"""Pools in front of a tiered store, which hears of every block that is handed out, and of what it held."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import islice
from typing import TYPE_CHECKING

from sim.page_pool import PagePool
from sim.prefix_pool import PrefixPool

if TYPE_CHECKING:
    from sim.radix_tree import RadixTree
    from sim.tiered_store import TieredStore


class OffloadingPool(PrefixPool):
    """A pool found by keys whose evictions go to a tiered store."""

    __slots__ = ("store",)

    def __init__(self, num_blocks: int, store: TieredStore, *, keyless_first: bool) -> None:
        super().__init__(num_blocks, keyless_first=keyless_first)
        self.store = store

    def take(self, count: int = 1) -> list[int]:
        """Hand out the blocks at the head of the queue; the store hears of them before they lose their content."""
        if not self.store.idle and count <= len(self.free):
            keys = self.keys
            head = list(islice(self.free, count))
            self.store.evict([(key, block) for block in head if (key := keys[block]) is not None])
            self.store.reuse(head)
        return super().take(count)


class OffloadingPagePool(PagePool):
    """Pages under a radix tree whose evictions go to a tiered store."""

    __slots__ = ("depths", "keys", "store")

    def __init__(self, num_blocks: int, tree: RadixTree, store: TieredStore) -> None:
        super().__init__(num_blocks, tree)
        self.store = store
        self.keys: list[Hashable] = [None] * num_blocks
        self.depths = [0] * num_blocks  # of pages in their prompts

    def name(self, fresh: Iterable[tuple[Hashable, int]], depth: int) -> None:
        """Note the keys of pages that enter the tree from a depth on."""
        keys, depths = self.keys, self.depths
        for at, (key, page) in enumerate(fresh, depth):
            keys[page] = key
            depths[page] = at

    def forget(self, pages: Iterable[int]) -> None:
        """What is evicted goes to the store, of each leaf the end first."""
        pages = list(pages)
        super().forget(pages)
        if not self.store.idle:
            keys, depths = self.keys, self.depths
            begin = 0
            for end in range(1, len(pages) + 1):
                if end == len(pages) or depths[pages[end]] != depths[pages[end - 1]] + 1:
                    self.store.evict([(keys[page], page) for page in reversed(pages[begin:end])])
                    begin = end
            self.store.reuse(pages)
