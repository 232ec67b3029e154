"""The page pool under blocks of several sizes: pages of one size, handed out in aligned runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.allocators.placement import Buddy
from sim.block_pool import BlockPool, OutOfBlocks


class RunPool(BlockPool):
    """Pages that are taken in runs of a power of two, aligned to their length, from a buddy system.

    References are counted by page, so that a run may be shared in part and come back in parts. `longest` is the
    most pages of a run.
    """

    __slots__ = ("_buddy", "longest")

    def __init__(self, num_blocks: int, longest: int, tier: str = "device") -> None:
        super().__init__(num_blocks, tier)
        self.free = []  # the buddy system has them
        self.longest = longest
        self._buddy = Buddy(num_blocks, longest)

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return self._buddy.num_free

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_blocks - self._buddy.num_free

    def take_run(self, pages: int) -> list[int]:
        """An aligned run of so many pages, a power of two, or the longest shorter one that is free.

        Raises OutOfBlocks if no page is free.
        """
        buddy = self._buddy
        pages = min(pages, buddy.largest())
        if not pages:
            raise OutOfBlocks(f"asked for a page, 0 of {self.num_blocks} are free")
        first = buddy.take(pages)
        references, fresh = self.references, self.fresh
        run = list(range(first, first + pages))
        for page in run:
            references[page] = 1
            if fresh is not None:
                fresh[page] = 1
        return run

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` pages, in runs as long as they fit. Raises OutOfBlocks and takes none if too few."""
        if count > self.num_free:
            raise OutOfBlocks(f"asked for {count} pages, {self.num_free} of {self.num_blocks} are free")
        pages: list[int] = []
        while len(pages) < count:
            pages += self.take_run(run_of(count - len(pages), self.longest))
        return pages

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each page; those without any are free again. Raises ValueError on a double free."""
        references = self.references
        begin = end = -1  # pages in a row that are free now
        for page in blocks:
            count = references[page]
            if count == 0:
                raise ValueError(f"double free of page {page}")
            references[page] = count - 1
            if count > 1:
                self.extra_references -= 1
            elif page == end:
                end += 1
            else:
                self._give(begin, end)
                begin, end = page, page + 1
        self._give(begin, end)

    def _give(self, begin: int, end: int) -> None:
        """Give pages in a row back as aligned runs."""
        while begin < end:
            aligned = begin & -begin or self.longest
            pages = min(aligned, run_of(end - begin, self.longest))
            self._buddy.give(begin, pages)
            begin += pages

    def unheld(self) -> Iterable[int]:
        """Every page that nobody holds."""
        for first, pages in self._buddy.chunks():
            yield from range(first, first + pages)


def run_of(pages: int, longest: int) -> int:
    """The longest run that is no longer than so many pages, at least one."""
    return min(longest, 1 << max(1, pages).bit_length() - 1)
