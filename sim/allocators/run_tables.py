"""What tables have in common whose entries are runs of pages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from itertools import pairwise

from sim.allocators.base import Allocator
from sim.errors import IntegrityError, UserError
from sim.pools.cached_runs import CachedRunPool
from sim.pools.run_pool import RunPool
from sim.request import Request, Sequence


class RunTables(Allocator):
    """Tables of pages, in which a block is an aligned run of pages, of any size from one page on, doubling each time.

    The page is the smallest block; the kernel gets the pages, and as a hint the length of runs that all of a table is
    made of (`run_blocks` of `attention.functional.paged_attention`), which lets it load more than a page at once. So
    an entry of the table stands for a run. Where no run of the wanted size is to be had a shorter one does, so that
    nothing is refused for lack of a run. Pages are shared on fork and copied on write as blocks are elsewhere; pages
    behind the last token stay with the parent of a fork.
    """

    pool: RunPool | CachedRunPool

    def _open(self, largest_block: int) -> int:
        """Begin without entries; pages of the longest run. Raises UserError for a block that is no such run."""
        longest, rest = divmod(largest_block, self.block_size)
        if rest or longest & (longest - 1) or not longest:
            raise UserError(
                f"largest_block: got {largest_block}, expected block_size {self.block_size} times a power of two"
            )
        self.growth = None
        self.longest = self.longest_run = longest
        self._entries: dict[Sequence, int] = {}  # of each table
        self._num_entries = 0  # of those on the device
        return longest

    @abstractmethod
    def run(self, sequence: Sequence, missing: int) -> int:
        """Pages of the next block of a sequence that lacks so many."""

    @property
    def num_entries(self) -> int:
        """Runs in all tables."""
        return self._num_entries

    @property
    def headroom(self) -> int:
        """Runs of the longest size that pages come to which are free or given up: nobody's growth takes more."""
        return (self.pool.num_free + self.yielding) // self.longest

    def demand(self, sequence: Sequence, num_tokens: int) -> int:
        """Runs of the longest size that its next tokens may take, all of the headroom at most if its pages are free."""
        pages = -(-(sequence.num_tokens + num_tokens - sequence.capacity) // self.block_size)
        if pages <= 0:
            return 0
        headroom = self.headroom
        there = self.pool.num_free + self.yielding
        return min(headroom, pages // self.longest + 2) if pages <= there else headroom + 1

    def can_append(self, request: Request) -> bool:
        """A free page for every running branch, whether it needs one or not."""
        return self.pool.num_free + self.yielding >= len(request.sequences)

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Append runs until the table is long enough; none takes the last pages of the other branches."""
        pool, table, size = self.pool, sequence.block_table, self.block_size
        needed = -(-num_tokens // size)
        others = sum([_lacking(each, needed) for each in sequence.request.sequences if each is not sequence])
        entries = 0
        while (missing := needed - len(table)) > 0:
            wanted = self.run(sequence, missing)
            if others > 0:
                wanted = min(wanted, pool.runs.run_of(max(1, pool.num_free - others)))
            table += pool.take_run(wanted)
            entries += 1
        self._enter(sequence, entries)
        return len(table) * size

    def _enter(self, sequence: Sequence, entries: int) -> None:
        self._entries[sequence] = self._entries.get(sequence, 0) + entries
        self._num_entries += entries

    def _recount(self, sequence: Sequence) -> None:
        """Its table has as many entries as runs lie apart."""
        self._enter(sequence, self._runs(sequence.block_table) - self._entries[sequence])

    def _runs(self, table: list[int]) -> int:
        """Runs of pages that follow each other within aligned runs of the longest size: what an entry may name."""
        longest = self.longest
        breaks = [after != before + 1 or after % longest == 0 for before, after in pairwise(table)]
        return 1 + sum(breaks)

    def release(self, sequence: Sequence) -> None:
        """Drop the table's references."""
        super().release(sequence)  # type: ignore[safe-super]  # of the class beside it
        self._num_entries -= self._entries.pop(sequence, 0)

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """A further run for each sequence of each batch."""
        size, take_run, run, entries = self.block_size, self.pool.take_run, self.run, self._entries
        books = []
        for tick, sequences in batches:
            if self.yielding:  # free pages may be short
                Allocator.grow(self, [(tick, sequences)])
                self.entry_log.append((tick, self.num_held // size - self._num_entries))
                books.append((tick, self.num_held, self.num_internal))
                continue
            held, internal, done = self.num_held, self.num_internal, False
            for sequence in sequences:
                table = sequence.block_table
                table += take_run(run(sequence, 1))
                before, final = sequence.capacity, sequence.final_tokens
                sequence.capacity = capacity = len(table) * size
                held += capacity - before
                if capacity >= final:
                    internal += capacity - final
                    done = True
                entries[sequence] += 1
            self._num_entries += len(sequences)
            self.num_held, self.num_internal = held, internal
            if done:
                sequences[:] = [
                    sequence for sequence in sequences if sequence.capacity < sequence.final_tokens
                ]
            self.entry_log.append((tick, held // size - self._num_entries))
            books.append((tick, held, internal))
        return books

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share every page of the parent that holds a token; needs no memory."""
        filled = -(-parent.num_tokens // self.block_size)
        child.block_table = parent.block_table[:filled]
        self.pool.share(child.block_table)
        child.capacity = filled * self.block_size
        child.origin = parent.num_tokens
        self.sequences.add(child)
        self._enter(child, self._runs(child.block_table))

    def check_books(self) -> None:
        """Also the entries of the tables."""
        super().check_books()
        entries = sum(self._entries[sequence] for sequence in self.sequences)
        if entries != self._num_entries:
            raise IntegrityError(f"entries({self._num_entries}) != entries of all tables({entries})")
        for sequence in self.sequences:
            table, entries = sequence.block_table, self._entries[sequence]
            fewest = self._runs(table)
            if not fewest <= entries <= len(table):
                raise IntegrityError(
                    f"{sequence}: entries({entries}) are not from {fewest} runs to {len(table)} pages"
                )
        if not self.sequences <= self._entries.keys():
            raise IntegrityError(
                f"tables with entries({len(self._entries)}) != sequences({len(self.sequences)})"
            )


def _lacking(branch: Sequence, pages: int) -> int:
    """Pages to leave to a branch: a further one, or those that it lacks or does not share before it is admitted."""
    if branch.capacity:
        return 1 if branch.decodes is not None else max(1, pages - len(branch.block_table))
    return pages - branch.sibling[1] if branch.sibling else pages
