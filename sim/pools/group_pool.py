"""The pool of page groups under vAttention: mapped into the ranges of batch slots, and left there when freed."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import chain

from sim.errors import IntegrityError
from sim.pools.block_pool import BlockPool, OutOfBlocks


class GroupPool(BlockPool):
    """Page groups that are mapped into ranges of virtual memory, one range a batch slot (`vattention.cu`).

    The groups of a range are mapped in order, so a range is known by the list of its groups. Who takes a range
    needs its first groups; those behind them are overcommitted: they can be unmapped for others, and count as
    free. With deferred reclamation all groups of a range stay when its holder leaves, and the next one finds them.
    There are as many ranges as have ever been in use together: one that never was has nothing that could be found.
    """

    __slots__ = (
        "_inactive",
        "_loose",
        "deferred",
        "mapped",
        "needed",
        "num_mapped",
        "num_unmapped",
        "overcommitted",
    )

    def __init__(self, num_blocks: int, *, deferred: bool = True) -> None:
        super().__init__(num_blocks)
        self.deferred = deferred
        self.mapped: list[list[int]] = []  # groups of each range
        self.needed: list[int] = []  # how many of them its holder needs
        self.overcommitted = 0
        self.num_mapped = 0  # groups mapped so far
        self.num_unmapped = 0
        self._inactive: list[int] = []  # ranges without a holder, ascending
        self._loose: list[
            int
        ] = []  # heap of ranges with overcommitted groups, the highest first; may be outdated

    @property
    def num_free(self) -> int:
        """Groups that can be had: those that are mapped nowhere, and those overcommitted."""
        return len(self.free) + self.overcommitted

    @property
    def num_used(self) -> int:
        """Groups that somebody needs."""
        return self.num_blocks - self.num_free

    def enter(self, count: int) -> int:
        """A range for a newcomer that needs so many groups; it holds none of them yet.

        Best fit with vAttention's quirk: the search starts from the first range, and moves on only to one with
        enough groups that has fewer than the choice so far; so a first range without any always wins.
        """
        inactive, mapped = self._inactive, self.mapped
        if not inactive:
            mapped.append([])
            self.needed.append(0)
            return len(mapped) - 1
        chosen, fewest = inactive[0], len(mapped[inactive[0]])
        for each in inactive:
            if count <= len(mapped[each]) < fewest:
                chosen, fewest = each, len(mapped[each])
        inactive.remove(chosen)
        return chosen

    def extend(self, place: int, count: int) -> list[int]:
        """Have the first `count` groups of a range mapped; those that its holder did not need before.

        Groups that are there already are taken as they are; the others come from those mapped nowhere, then from
        ranges that do not need them. Raises OutOfBlocks and changes nothing if there are too few.
        """
        groups, before = self.mapped[place], self.needed[place]
        if count - before > self.num_free:
            raise OutOfBlocks(
                f"asked for {count - before} groups, {self.num_free} of {self.num_blocks} are free"
            )
        found = min(len(groups), count)
        self.overcommitted -= found - before
        self.needed[place] = count  # so that nothing of it is taken from it
        while len(groups) < count:
            if not self.free:
                self._unmap_one()
            groups.append(self.free.pop())
            self.num_mapped += 1
        new = groups[before:count]
        references, fresh = self.references, self.fresh
        for group in new:
            references[group] = 1
            if fresh is not None:
                fresh[group] = 1
        return new

    def _unmap_one(self) -> None:
        """Unmap a group for others: the last one of the highest range that has more than it needs."""
        loose = self._loose
        while True:
            place = -loose[0]
            groups = self.mapped[place]
            if len(groups) > self.needed[place]:
                break
            heappop(loose)
        self.free.append(groups.pop())
        self.overcommitted -= 1
        self.num_unmapped += 1

    def leave(self, place: int) -> None:
        """The holder of a range is gone: its groups stay for the next one, or are unmapped at once."""
        groups, needed = self.mapped[place], self.needed[place]
        references = self.references
        for group in groups[:needed]:
            references[group] = 0
        self.needed[place] = 0
        self.overcommitted += needed
        insort(self._inactive, place)
        if self.deferred:
            heappush(self._loose, -place)
            return
        self.overcommitted -= len(groups)
        self.num_unmapped += len(groups)
        self.free += groups[::-1]
        groups.clear()

    def unheld(self) -> Iterable[int]:
        """Groups mapped nowhere, and those overcommitted."""
        spare = (groups[needed:] for groups, needed in zip(self.mapped, self.needed, strict=True))
        return chain(self.free, *spare)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare counts, ranges and tables. Raises IntegrityError with the equation that failed."""
        super().check_integrity(tables)
        mapped = sum(map(len, self.mapped))
        if mapped + len(self.free) != self.num_blocks:
            raise IntegrityError(
                f"mapped({mapped}) + mapped nowhere({len(self.free)}) != total({self.num_blocks})"
            )
        if mapped != self.num_mapped - self.num_unmapped:
            raise IntegrityError(
                f"mapped({mapped}) != ever mapped({self.num_mapped}) - unmapped({self.num_unmapped})"
            )
        spare = mapped - sum(self.needed)
        if spare != self.overcommitted:
            raise IntegrityError(f"mapped - needed({spare}) != overcommitted({self.overcommitted})")
