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
            self.store.evict(list(islice(self.free, count)))
        return super().take(count)


class OffloadingPagePool(PagePool):
    """Pages under a radix tree whose evictions go to a tiered store."""

    __slots__ = ("depths", "keys", "store")

    def __init__(self, num_blocks: int, tree: RadixTree, store: TieredStore) -> None:
        super().__init__(num_blocks, tree)
        self.store = store
        self.keys: list[Hashable] = [None] * num_blocks
        self.depths = [0] * num_blocks  # of pages in their prompts

    def name(self, keys: Iterable[Hashable], pages: Iterable[int], depth: int) -> None:
        """Note the keys of pages that enter the tree from a depth on."""
        known, depths = self.keys, self.depths
        for at, (key, page) in enumerate(zip(keys, pages, strict=True), depth):
            known[page] = key
            depths[page] = at

    def forget(self, pages: Iterable[int]) -> None:
        """What is evicted goes to the store, of each leaf the end first."""
        pages = list(pages)
        super().forget(pages)
        if not self.store.idle:
            depths = self.depths
            leaves: list[list[int]] = []
            for page in pages:
                if leaves and depths[page] == depths[leaves[-1][-1]] + 1:
                    leaves[-1].append(page)
                else:
                    leaves.append([page])
            self.store.evict([page for leaf in leaves for page in reversed(leaf)])
        for page in pages:
            self.keys[page] = None
