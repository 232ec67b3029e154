"""What allocators with blocks of several sizes share: tables of pages, which are taken in runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from itertools import pairwise
from typing import ClassVar

from sim.allocators.capacity import Capacity
from sim.allocators.paged import PagedAllocator
from sim.allocators.swapping import SwappingAllocator
from sim.errors import IntegrityError, UserError
from sim.pools.run_pool import RunPool
from sim.request import Request, Sequence


class RunsAllocator(PagedAllocator):
    """Paged memory in which a block is an aligned run of pages, of any size from one page on, doubling each time.

    The page is the smallest block; the kernel gets the pages, and as a hint the length of runs that all of a table is
    made of (`run_blocks` of `attention.functional.paged_attention`), which lets it load more than a page at once. So
    an entry of the table stands for a run. Where no run of the wanted size is free a shorter one does, so that
    nothing is refused for lack of a run. Pages are shared on fork, copied on write and swapped as blocks are
    elsewhere; pages behind the last token stay with the parent of a fork.
    """

    absent: ClassVar = {
        "prefix_caching": "blocks differ in size, and keys of prefixes would need the smallest as their grain"
    }
    reasons: ClassVar = {"can_offload": "blocks differ in size"}
    growth = None
    pool: RunPool

    def __init__(
        self,
        capacity: Capacity,
        block_size: int,
        largest_block: int,
        watermark: float,
        num_host_blocks: int | None,
    ) -> None:
        super().__init__(
            capacity, block_size=block_size, watermark=watermark, num_host_blocks=num_host_blocks
        )
        longest, rest = divmod(largest_block, block_size)
        if rest or longest & (longest - 1) or not longest:
            raise UserError(
                f"largest_block: got {largest_block}, expected block_size {block_size} times a power of two"
            )
        self.growth = None
        self.longest = self.longest_run = longest
        self.pool = RunPool(self.pool.num_blocks, longest)
        self._entries: dict[Sequence, int] = {}  # of each table
        self._num_entries = 0  # of those on the device

    @abstractmethod
    def run(self, sequence: Sequence, missing: int) -> int:
        """Pages of the next block of a sequence that lacks so many."""

    @property
    def num_entries(self) -> int:
        """Runs in all tables."""
        return self._num_entries

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Pages needed against pages there."""
        return (
            f"{num_tokens} tokens need {self._needed(request, num_tokens)} pages of {self.block_size} slots, "
            f"the pool has {self.pool.num_blocks} and keeps {self.watermark_blocks} as watermark"
        )

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
        """Append runs until the table is long enough; none takes the last pages of the other branches.

        Others give up or are waited for no more pages than it lacks, so that its runs are shorter then.
        """
        pool, table, size = self.pool, sequence.block_table, self.block_size
        needed = -(-num_tokens // size)
        others = sum([_lacking(each, needed) for each in sequence.request.sequences if each is not sequence])
        entries = 0
        if self.yielding or self._stopped:
            self.make_room(needed - len(table))
        while (missing := needed - len(table)) > 0:
            wanted = self.run(sequence, missing)
            if others > 0:
                wanted = min(wanted, pool.run_of(max(1, pool.num_free - others)))
            table += pool.take_run(wanted)
            entries += 1
        self._enter(sequence, entries)
        return len(table) * size

    def _admit_beside(self, sibling: Sequence, blocks: int, sequence: Sequence, num_tokens: int) -> int:
        """The shared pages are as many runs as lie apart."""
        self._enter(sequence, _runs(sibling.block_table[:blocks], self.longest))
        return super()._admit_beside(sibling, blocks, sequence, num_tokens)

    def _enter(self, sequence: Sequence, entries: int) -> None:
        self._entries[sequence] = self._entries.get(sequence, 0) + entries
        self._num_entries += entries

    def release(self, sequence: Sequence) -> None:
        """Drop the table's references."""
        super().release(sequence)
        self._num_entries -= self._entries.pop(sequence, 0)

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """A further run for each sequence of each batch."""
        size, take_run, run, entries = self.block_size, self.pool.take_run, self.run, self._entries
        books = []
        for tick, sequences in batches:
            if self.yielding:  # free pages may be short
                SwappingAllocator.grow(self, [(tick, sequences)])
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

    def append(self, sequence: Sequence) -> int:
        """A further run if the last is full, a copy of the next token's page if others share it, else nothing."""
        tokens, size, table = sequence.num_tokens, self.block_size, sequence.block_table
        if tokens >= sequence.capacity:
            self._grow_to(sequence, sequence.capacity + 1)
            return 0
        index = tokens // size
        shared = table[index]
        if self.pool.references[shared] == 1:
            return 0
        if self.yielding:
            self.make_room(1)
        (own,) = self.pool.take()
        if self.probe is not None:
            self.probe.copy(shared, own)
        table[index] = own
        self.pool.release((shared,))
        self._enter(sequence, _runs(table, self.longest) - self._entries[sequence])  # its run is broken
        self.num_held += size
        self.num_tokens += tokens % size
        self.num_internal += max(0, (index + 1) * size - sequence.final_tokens)
        return 1

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share every page of the parent that holds a token; needs no memory."""
        filled = -(-parent.num_tokens // self.block_size)
        child.block_table = parent.block_table[:filled]
        self.pool.share(child.block_table)
        child.capacity = filled * self.block_size
        child.origin = parent.num_tokens
        self.sequences.add(child)
        self._enter(child, _runs(child.block_table, self.longest))

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's references; only pages that nobody else holds leave the books."""
        hosted = sequence in self._hosted
        super().free(sequence)
        if hosted:
            del self._entries[sequence]

    def stop(self, sequence: Sequence) -> None:
        """Its unshared pages at the end yield; those behind its last token are free at once."""
        super().stop(sequence)
        empty = len(sequence.block_table) + (-sequence.num_tokens // self.block_size)
        if empty > 0:
            self._stopped.cut(sequence, empty)

    def shortened(self, sequence: Sequence) -> None:
        """What it has left is as many runs as lie apart."""
        if sequence.block_table:
            self._enter(sequence, _runs(sequence.block_table, self.longest) - self._entries[sequence])
        else:
            self._num_entries -= self._entries.pop(sequence, 0)

    def swap_out(self, request: Request) -> int:
        """Move the distinct pages to the host; sharing is kept there."""
        self._num_entries -= sum([self._entries[sequence] for sequence in request.sequences])
        return super().swap_out(request)

    def swap_in(self, request: Request) -> int:
        """Move the distinct pages back to the device, in runs as long as they fit."""
        moved = super().swap_in(request)
        for sequence in request.sequences:
            self._entries[sequence] = _runs(sequence.block_table, self.longest)
            self._num_entries += self._entries[sequence]
        return moved

    def check_books(self) -> None:
        """Also the entries of the tables."""
        super().check_books()
        entries = sum(self._entries[sequence] for sequence in self.sequences)
        if entries != self._num_entries:
            raise IntegrityError(f"entries({self._num_entries}) != entries of all tables({entries})")
        for sequence in self.sequences:
            table, entries = sequence.block_table, self._entries[sequence]
            fewest = _runs(table, self.longest)
            if not fewest <= entries <= len(table):
                raise IntegrityError(
                    f"{sequence}: entries({entries}) are not from {fewest} runs to {len(table)} pages"
                )
        if self._entries.keys() != self.sequences | self._hosted:
            raise IntegrityError(
                f"tables with entries({len(self._entries)}) != sequences({len(self.sequences | self._hosted)})"
            )


def _runs(table: list[int], longest: int) -> int:
    """Runs of pages that follow each other within aligned runs of so many, which is the most that an entry names."""
    breaks = [after != before + 1 or after % longest == 0 for before, after in pairwise(table)]
    return 1 + sum(breaks)


def _lacking(branch: Sequence, pages: int) -> int:
    """Pages to leave to a branch: a further one, or those that it lacks or does not share before it is admitted."""
    if branch.capacity:
        return 1 if branch.decodes is not None else max(1, pages - len(branch.block_table))
    return pages - branch.sibling[1] if branch.sibling else pages
