"""Pools in front of a tiered store, which hears of every block that is handed out, and of what it held."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from sim.pools.cached_runs import CachedRunPool, RunQueue
from sim.pools.free_queue import FreeQueue
from sim.pools.page_pool import PagePool
from sim.pools.prefix_pool import UNASKED, PrefixPool
from sim.prefixes.radix_tree import RadixTree
from sim.tiers.tiered_store import TieredStore


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
    """A pool found by keys whose evictions go to a tiered store.

    Keys that one request alone has are noted, as the store knows blocks by them, and are not found before it gives
    way and may ask for them.
    """

    __slots__ = ()

    def __init__(self, num_blocks: int, store: TieredStore, *, keyless_first: bool) -> None:
        super().__init__(num_blocks, keyless_first=keyless_first)
        self.free = OffloadingQueue(range(num_blocks), store)

    def register_table(self, blocks: Sequence[int], keys: Sequence[Hashable]) -> None:
        """`register` for those of these blocks that have no key yet; a range of keys is only noted."""
        if not isinstance(keys, range):
            super().register_table(blocks, keys)
            return
        known = self.keys
        noted = 0
        for block, key in zip(blocks, keys, strict=False):
            if known[block] is None:
                known[block] = key
                noted += 1
        self.num_keyed += noted

    def reveal(self, blocks: Iterable[int], keys: Iterable[Hashable]) -> None:
        """Let those of these blocks be found that have these keys."""
        for block, key in zip(blocks, keys, strict=False):
            if self.keys[block] == key and not self._is_found(block, key):
                self.keys[block] = None
                self.num_keyed -= 1
                self.register(block, key)

    def _is_found(self, block: int, key: Hashable) -> bool:
        found = self._found.get(key)
        return block in found if isinstance(found, list) else found == block

    def _num_hidden(self) -> int:
        """Those that are noted only, which are held or will never be asked for."""
        return sum(
            [
                isinstance(key, int) and key < 0 and key != UNASKED and not self._is_found(block, key)
                for block, key in enumerate(self.keys)
            ]
        )


class OffloadingRunQueue(RunQueue):
    """Free pages that a tiered store hears of before they lose their content."""

    __slots__ = ("store",)

    def __init__(self, num_pages: int, longest: int, store: TieredStore) -> None:
        super().__init__(num_pages, longest)
        self.store = store

    def lose(self, count: int) -> list[int]:
        """Let pages be empty ones."""
        lost = super().lose(count)
        if not self.store.idle:
            self.store.lose(lost)
        return lost


class OffloadingRunPool(OffloadingPool, CachedRunPool):
    """An `OffloadingPool` of runs of pages."""

    __slots__ = ("store",)

    def __init__(self, num_blocks: int, longest: int, store: TieredStore) -> None:
        CachedRunPool.__init__(self, num_blocks, longest)
        self.store = store
        self._open(OffloadingRunQueue(num_blocks, longest, store))

    def take_run(self, pages: int) -> range:
        """The store hears of what is handed out."""
        run = super().take_run(pages)
        if not self.store.idle:
            self.store.traffic.reuse(run)
        return run


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
