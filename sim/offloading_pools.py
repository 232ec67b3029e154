"""Pools in front of a tiered store, which hears of every block that is handed out, and of what it held."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from sim.free_queue import FreeQueue
from sim.page_pool import PagePool
from sim.prefix_pool import PrefixPool

if TYPE_CHECKING:
    from sim.radix_tree import RadixTree
    from sim.tiered_store import TieredStore


class OffloadingQueue(FreeQueue):
    """Free blocks that a tiered store hears of before they lose their content."""

    __slots__ = ("store",)

    def __init__(self, blocks: Iterable[int], store: TieredStore) -> None:
        super().__init__(blocks)
        self.store = store

    def take(self, count: int) -> list[int]:
        """The first `count`, which have to be there."""
        blocks = super().take(count)
        if not self.store.idle:
            self.store.evict(blocks)
        return blocks


class OffloadingPool(PrefixPool):
    """A pool found by keys whose evictions go to a tiered store."""

    __slots__ = ()

    def __init__(self, num_blocks: int, store: TieredStore, *, keyless_first: bool) -> None:
        super().__init__(num_blocks, keyless_first=keyless_first)
        self.free = OffloadingQueue(range(num_blocks), store)


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
