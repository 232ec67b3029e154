"""Blocks of several sizes over memory that is swapped and forgets what is freed."""

from __future__ import annotations

from typing import Any, ClassVar

from sim.allocators.capacity import Capacity
from sim.allocators.paged import PagedAllocator
from sim.allocators.run_tables import RunTables
from sim.errors import IntegrityError
from sim.pools.run_pool import RunPool
from sim.request import Request, Sequence


class RunsAllocator(RunTables, PagedAllocator):
    """`PagedAllocator` over tables of runs."""

    reasons: ClassVar = {"can_offload": "it finds no prefixes (prefix_caching)"}
    pool: RunPool

    def __new__(cls, *arguments: Any, prefix_caching: bool = False, **fields: Any) -> Any:
        """The class that `prefix_caching` asks for, which is none of these."""
        return cls.with_caching(*arguments, **fields) if prefix_caching else super().__new__(cls)

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
        self.pool = RunPool(self.pool.num_blocks, self._open(largest_block))

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Pages needed against pages there."""
        return (
            f"{num_tokens} tokens need {self._needed(request, num_tokens)} pages of {self.block_size} slots, "
            f"the pool has {self.pool.num_blocks} and keeps {self.watermark_blocks} as watermark"
        )

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Others give up or are waited for no more pages than it lacks, so that its runs are shorter then."""
        if self.yielding or self._stopped:
            self.make_room(-(-num_tokens // self.block_size) - len(sequence.block_table))
        return super().reserve(sequence, num_tokens)

    def _admit_beside(self, sibling: Sequence, blocks: int, sequence: Sequence, num_tokens: int) -> int:
        """The shared pages are as many runs as lie apart."""
        self._enter(sequence, self._runs(sibling.block_table[:blocks]))
        return super()._admit_beside(sibling, blocks, sequence, num_tokens)

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
        self._recount(sequence)  # its run is broken
        self.num_held += size
        self.num_tokens += tokens % size
        self.num_internal += max(0, (index + 1) * size - sequence.final_tokens)
        return 1

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
            self._recount(sequence)
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
            self._entries[sequence] = self._runs(sequence.block_table)
            self._num_entries += self._entries[sequence]
        return moved

    def check_books(self) -> None:
        """Also that nobody else has entries."""
        super().check_books()
        if self._entries.keys() != self.sequences | self._hosted:
            raise IntegrityError(
                f"tables with entries({len(self._entries)}) != sequences({len(self.sequences | self._hosted)})"
            )
