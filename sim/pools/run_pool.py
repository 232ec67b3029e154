"""The page pool under blocks of several sizes: pages of one size, handed out in aligned runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sim.pools.block_pool import BlockPool, OutOfBlocks
from sim.pools.placement import Buddy


class FreeRuns(Buddy):
    """Free pages in runs of a power of two, aligned to their length; `longest` is the most pages of a run."""

    def __init__(self, num_pages: int, longest: int) -> None:
        super().__init__(num_pages, longest)
        self.longest = longest
        self._within = [1 << max(1, pages).bit_length() - 1 for pages in range(longest + 1)]

    def run_of(self, pages: int) -> int:
        """The longest run that is no longer than so many pages, at least one."""
        return self._within[pages] if pages < self.longest else self.longest

    def take_run(self, pages: int) -> range:
        """An aligned run of so many pages, a power of two, or the longest shorter one that is free.

        Raises IntegrityError if no page is free.
        """
        first = self.find(pages)
        if first is None:
            pages = self.largest()
            first = self.take(pages)
        return range(first, first + pages)

    def give_row(self, begin: int, end: int) -> None:
        """Take pages in a row back, as aligned runs."""
        longest, within = self.longest, self._within
        while begin < end:
            pages = end - begin
            pages = within[pages] if pages < longest else longest
            aligned = begin & -begin
            if 0 < aligned < pages:
                pages = aligned
            self.give(begin, pages)
            begin += pages


class RunPool(BlockPool):
    """Pages that are taken in runs of a power of two, aligned to their length, from a buddy system.

    References are counted by page, so that a run may be shared in part and come back in parts.
    """

    __slots__ = ("_held", "runs")

    def __init__(self, num_blocks: int, longest: int, tier: str = "device") -> None:
        super().__init__(num_blocks, tier)
        self.free = []  # the runs have them
        self.runs = FreeRuns(num_blocks, longest)
        self._held = [1] * num_blocks  # what the references of so many pages are where each has one

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return self.runs.num_free

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_blocks - self.runs.num_free

    def take_run(self, pages: int) -> range:
        """An aligned run of so many pages, a power of two, or the longest shorter one that is free.

        Raises OutOfBlocks if no page is free.
        """
        if not self.runs.num_free:
            raise OutOfBlocks(f"asked for a page, 0 of {self.num_blocks} are free")
        run = self.runs.take_run(pages)
        begin, end = run.start, run.stop
        self.references[begin:end] = self._held[: end - begin]
        if self.fresh is not None:
            self.fresh[begin:end] = b"\1" * len(run)
        return run

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` pages, in runs as long as they fit. Raises OutOfBlocks and takes none if too few."""
        if count > self.num_free:
            raise OutOfBlocks(f"asked for {count} pages, {self.num_free} of {self.num_blocks} are free")
        pages: list[int] = []
        while len(pages) < count:
            pages += self.take_run(self.runs.run_of(count - len(pages)))
        return pages

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each page; those without any are free again. Raises ValueError on a double free."""
        if self.extra_references:
            self._release_shared(blocks)
            return
        begin = end = -1
        for page in blocks:  # by pages in a row
            if page != end:
                if end > begin:
                    self._release_row(begin, end)
                begin = page
            end = page + 1
        if end > begin:
            self._release_row(begin, end)

    def _release_shared(self, blocks: Sequence[int]) -> None:
        """`release` of pages of which others may hold some."""
        references = self.references
        begin = end = -1
        shared = 0
        alone: list[int] = []  # of those in a row
        for page in blocks:
            if page != end:
                self._give_alone(begin, end, alone)
                alone, begin = [], page
            end = page + 1
            held = references[page]
            references[page] = held - 1
            if held > 1:
                shared += 1
            elif held:
                alone.append(page)
            else:
                raise ValueError(f"double free of page {page}")
        self._give_alone(begin, end, alone)
        self.extra_references -= shared

    def _give_alone(self, begin: int, end: int, alone: list[int]) -> None:
        """Give back a row that nobody holds, or those of its pages one by one."""
        if len(alone) == end - begin:
            if alone:
                self.runs.give_row(begin, end)
            return
        for page in alone:
            self.runs.give(page, 1)

    def _release_row(self, begin: int, end: int) -> None:
        references = self.references
        count = end - begin
        if references[begin:end] == self._held[:count]:
            references[begin:end] = [0] * count
            self.runs.give_row(begin, end)
            return
        shared = references[begin:end]
        if min(shared) > 1:
            references[begin:end] = [held - 1 for held in shared]
            self.extra_references -= count
            return
        for page in range(begin, end):
            held = references[page]
            if held == 0:
                raise ValueError(f"double free of page {page}")
            references[page] = held - 1
            if held > 1:
                self.extra_references -= 1
            else:
                self.runs.give(page, 1)

    def unheld(self) -> Iterable[int]:
        """Every page that nobody holds."""
        for first, pages in self.runs.chunks():
            yield from range(first, first + pages)
