"""The page pool of a prefix cache over blocks of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sim.pools.block_pool import OutOfBlocks
from sim.pools.free_queue import FreeQueue
from sim.pools.prefix_pool import PrefixPool
from sim.pools.run_pool import FreeRuns


class RunQueue(FreeQueue):
    """Free pages: those that hold nothing as aligned runs, those that hold something in the order of their reuse."""

    __slots__ = ("runs",)

    def __init__(self, num_pages: int, longest: int) -> None:
        super().__init__(())
        self.runs = FreeRuns(num_pages, longest)
        self.size = num_pages

    def __iter__(self) -> Iterator[int]:
        """Empty ones by address, then the others from the head on."""
        for first, pages in self.runs.chunks():
            yield from range(first, first + pages)
        yield from self._standing()

    def lose(self, count: int) -> list[int]:
        """Let the first `count` that hold something be empty ones, or all if there are fewer; which they were."""
        lost = super().take(min(count, self.size - self.runs.num_free))
        self.put_first(lost)
        return lost

    def put_first(self, blocks: Sequence[int]) -> None:
        """Put these to the empty ones."""
        begin = end = -1  # of those that follow one another
        for page in sorted(blocks):
            if page != end:
                if end > begin:
                    self.runs.give_row(begin, end)
                begin = page
            end = page + 1
        if end > begin:
            self.runs.give_row(begin, end)
        self.size += len(blocks)


class CachedRunPool(PrefixPool):
    """Pages that can be found again by a key of their content, handed out in aligned runs.

    A page is found, shared and freed for itself, whatever run it was handed out in: who begins as another did takes
    as many of its pages as they have in common. Freed pages that hold something queue up as in `PrefixPool`. Where no
    empty run is as long as one that is wanted, as many pages as the longest run has lose what they held, those at the
    head of the queue; pages of one table are freed together, so that most of them come back as the runs that they were.
    """

    __slots__ = ("_held", "runs")

    free: RunQueue

    def __init__(self, num_blocks: int, longest: int, tier: str = "device") -> None:
        super().__init__(num_blocks, tier)
        self._held = [1] * longest
        self._open(RunQueue(num_blocks, longest))

    def _open(self, queue: RunQueue) -> None:
        self.free = queue
        self.runs: FreeRuns = queue.runs  # of pages that hold nothing

    def take_run(self, pages: int) -> range:
        """An aligned run of so many pages, a power of two, or the longest shorter one.

        Raises OutOfBlocks if no page is free.
        """
        free = self.free
        if not free.size:
            raise OutOfBlocks(f"asked for a page, 0 of {self.num_blocks} are free")
        first = self.runs.find(pages)
        if first is None:
            self.lose(self.runs.longest)
            run = self.runs.take_run(pages)
            first, pages = run.start, len(run)
        free.size -= pages
        end = first + pages
        self.references[first:end] = self._held[:pages]
        if self.fresh is not None:
            self.fresh[first:end] = b"\1" * pages
        return range(first, end)

    def lose(self, count: int) -> None:
        """Let so many pages at the head of the queue lose what they hold, or all that are there."""
        lost = self.free.lose(count)
        if self.num_keyed:
            self._forget_keys(lost)

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` pages, in runs as long as they fit. Raises OutOfBlocks and takes none if too few."""
        if count > self.free.size:
            raise OutOfBlocks(f"asked for {count} pages, {self.free.size} of {self.num_blocks} are free")
        pages: list[int] = []
        while len(pages) < count:
            pages += self.take_run(self.runs.run_of(count - len(pages)))
        return pages
