"""The page pool under a radix tree: pages of the tree that nobody holds are free, and stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from sim.block_pool import BlockPool, OutOfBlocks
from sim.errors import IntegrityError
from sim.radix_tree import RadixTree


class PagePool(BlockPool):
    """Pages that are free, held, or cached in a radix tree; those in the tree are evicted when others run out."""

    __slots__ = ("cached", "tree")

    def __init__(self, num_blocks: int, tree: RadixTree) -> None:
        super().__init__(num_blocks)
        self.tree = tree
        self.cached = bytearray(num_blocks)  # pages that are in the tree

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, by eviction too."""
        return len(self.free) + self.tree.evictable

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_blocks - self.num_free

    def take(self, count: int = 1) -> list[int]:
        """Hand out pages, after evicting from the tree as many as are missing. Raises OutOfBlocks."""
        missing = count - len(self.free)
        if missing > 0:
            if missing > self.tree.evictable:
                raise OutOfBlocks(f"asked for {count} blocks, {self.num_free} of {self.num_blocks} are free")
            evicted = self.tree.evict(missing)
            self.forget(evicted)
            self.free += evicted
        return super().take(count)

    def forget(self, pages: Iterable[int]) -> None:
        """Note that these pages are not in the tree any more."""
        for page in pages:
            self.cached[page] = 0

    def touch(self, pages: Sequence[int]) -> None:
        """Add a reference to each of these pages of the tree."""
        references = self.references
        for page in pages:
            if references[page]:
                self.extra_references += 1
            references[page] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each page; those without any are free again, or cached. Raises ValueError."""
        references, cached = self.references, self.cached
        if not self.extra_references and 0 not in map(references.__getitem__, blocks):  # each is held once
            for page in blocks:
                references[page] = 0
            self.free += [page for page in blocks if not cached[page]]
            return
        for page in blocks:
            count = references[page]
            if count == 0:
                raise ValueError(f"double free of block {page}")
            references[page] = count - 1
            if count > 1:
                self.extra_references -= 1
            elif not cached[page]:
                self.free.append(page)

    def keep(self, pages: Iterable[int]) -> None:
        """Note that these pages are in the tree now."""
        for page in pages:
            self.cached[page] = 1

    def unheld(self) -> Iterable[int]:
        """Free pages, and cached ones without a reference."""
        references = self.references
        return chain(
            self.free, (page for page, there in enumerate(self.cached) if there and not references[page])
        )

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare counts, tables and tree. Raises IntegrityError with the equation that failed."""
        super().check_integrity(tables)
        self.tree.check_integrity()
        there = bytearray(self.num_blocks)
        for node in self.tree.nodes():
            for page in node.pages:
                if there[page]:
                    raise IntegrityError(f"page {page} is in the tree twice")
                there[page] = 1
                if node.locks != self.references[page]:
                    raise IntegrityError(
                        f"page {page}: locks({node.locks}) != references({self.references[page]})"
                    )
        if there != self.cached:
            raise IntegrityError(
                f"pages in the tree({sum(there)}) != pages noted as cached({sum(self.cached)})"
            )
