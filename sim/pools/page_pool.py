"""The page pool under a radix tree: pages of the tree that nobody holds are free, and stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from sim.errors import IntegrityError
from sim.pools.block_pool import OutOfBlocks
from sim.pools.uncounted_pool import UncountedPool
from sim.prefixes.radix_tree import RadixTree


class PagePool(UncountedPool):
    """Pages that are free, held, or cached in a radix tree; those in the tree are evicted when others run out.

    Who holds a page of the tree has locked it there, so the tree has the references of its pages and nothing is
    counted per page. Pages may be taken on account (`owe`) and drawn later, when somebody looks which they are.
    """

    __slots__ = ("_more", "owed", "tree")

    def __init__(self, num_blocks: int, tree: RadixTree) -> None:
        self.tree = tree
        self.owed = 0  # pages on the stack that are somebody's already
        super().__init__(num_blocks)

    @property
    def extra_references(self) -> int:
        """References beyond the first of every page."""
        return self.tree.extra_locks + self._more

    @extra_references.setter
    def extra_references(self, count: int) -> None:
        """Those of pages that are not in the tree."""
        self._more = count - self.tree.extra_locks

    @property
    def references(self) -> list[int]:
        """References of every page, counted anew."""
        counts = super().references
        for node in self.tree.nodes():
            if node.locks:
                for page in node.pages:
                    counts[page] = node.locks
        return counts

    @references.setter
    def references(self, counts: list[int]) -> None:
        """None at first."""

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, by eviction too."""
        return len(self.free) - self.owed + self.tree.evictable

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_blocks - self.num_free

    def _make_free(self, count: int) -> None:
        """Evict as many pages from the tree as are missing."""
        missing = count + self.owed - len(self.free)
        if missing > 0:
            if missing > self.tree.evictable:
                raise OutOfBlocks(f"asked for {count} blocks, {self.num_free} of {self.num_blocks} are free")
            evicted = self.tree.evict(missing)
            self.forget(evicted)
            self.free += evicted

    def take(self, count: int = 1) -> list[int]:
        """Hand out pages, after evicting from the tree as many as are missing. Raises OutOfBlocks."""
        self._make_free(count)
        return super().take(count)

    def owe(self, count: int) -> None:
        """Take pages as `take` does, and hand them out when they are drawn. Raises OutOfBlocks."""
        self._make_free(count)
        self.owed += count

    def draw(self, count: int) -> list[int]:
        """Pages that are owed."""
        assert count <= self.owed
        self.owed -= count
        return super().take(count)

    def forget(self, pages: Iterable[int]) -> None:
        """These pages are not in the tree any more."""

    def keep(self, table: list[int], first: int, stop: int) -> None:
        """These pages of a table are in the tree from now on: references to them are locks."""
        extra = self._extra
        if extra:
            for page in table[first:stop]:
                self._more -= extra.pop(page, 0)

    def unheld(self) -> Iterable[int]:
        """Free pages, and cached ones without a reference."""
        return chain(self.free, *[node.pages for node in self.tree.nodes() if not node.locks])

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare counts, tables and tree. Raises IntegrityError with the equation that failed."""
        super().check_integrity(tables)
        if self.owed:
            raise IntegrityError(f"pages owed({self.owed}) != 0 where every table is complete")
        self.tree.check_integrity()
        there = bytearray(self.num_blocks)
        for node in self.tree.nodes():
            for page in node.pages:
                if there[page]:
                    raise IntegrityError(f"page {page} is in the tree twice")
                there[page] = 1
        for page in self._extra:
            if there[page]:
                raise IntegrityError(f"page {page} of the tree has references beside its locks")
