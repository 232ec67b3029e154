"""A block size picked while running, from the lengths seen so far."""

from __future__ import annotations

from collections import deque
from typing import Annotated, Any

import numpy as np

from sim.allocators.base import allocator
from sim.allocators.cached_runs import CachedRunsAllocator
from sim.allocators.capacity import Capacity
from sim.allocators.run_tables import RunTables
from sim.allocators.runs import RunsAllocator
from sim.registry import Bounds, NonNegativeFloat, NonNegativeInt, PositiveInt
from sim.request import Request, Sequence

FIRST = 16
"""Slots of a block before any length is known."""
EVERY = 16
"""Lengths after which the size is picked anew."""


class LearnedBlocks(RunTables):
    """Blocks of one size a sequence, picked from the lengths of those that have finished."""

    def _learn_sizes(self, entry_cost: float, window: int) -> None:
        """Begin without a length."""
        self.entry_cost = entry_cost
        self.sizes = [self.block_size << order for order in range(self.longest.bit_length())]
        self.size = min(self.sizes, key=lambda size: abs(size - FIRST))
        self._lengths: deque[int] = deque(maxlen=window)
        self._until_next = EVERY
        self._sizes_of: dict[Sequence, int] = {}  # pages of a block of each sequence

    def pages(self, request: Request, num_tokens: int) -> int:
        """Those of whole blocks of the size in use."""
        return -(-num_tokens // self.size) * self.size // self.block_size

    def run(self, sequence: Sequence, missing: int) -> int:
        """Pages of a block of the size that the sequence was admitted with."""
        pages = self._sizes_of.get(sequence)
        if pages is None:
            pages = self._sizes_of[sequence] = self.size // self.block_size
        return pages

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share the parent's pages that hold a token, and its size."""
        super().fork(parent, child)
        self._sizes_of[child] = self._sizes_of[parent]

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's references, and learn from its length if it has finished."""
        if 0 < sequence.final_tokens <= sequence.num_tokens:
            self._learn(sequence.final_tokens)
        super().free(sequence)
        self._sizes_of.pop(sequence, None)

    def retire(self, request: Request) -> None:
        """The branches are done; their lengths are known."""
        for sequence in request.sequences:
            self._learn(sequence.num_tokens)
        super().retire(request)

    def _learn(self, length: int) -> None:
        self._lengths.append(length)
        self._until_next -= 1
        if not self._until_next:
            self._until_next = EVERY
            self.size = self.best(list(self._lengths))

    def best(self, lengths: list[int]) -> int:
        """The size with the least waste and table over these lengths, the larger of equals."""
        known = np.array(lengths)
        costs = {}
        for size in self.sizes:
            entries = int((-(-known // size)).sum())
            costs[size] = entries * (size + self.entry_cost)  # less the tokens, which are the same for all
        return min(reversed(self.sizes), key=costs.__getitem__)

    @property
    def figures(self) -> dict[str, float]:
        """The size in use at the end."""
        return {"last_block_size": self.size}


@allocator("adaptive")
class AdaptiveAllocator(LearnedBlocks, RunsAllocator):
    """Blocks of one size a sequence, which suits the lengths of the sequences that have finished.

    A larger block wastes more behind the last token, a smaller one makes a longer table. The size in use is the one
    with the least of both over the last lengths: slots wasted at the end, plus what each entry of the table costs
    in slots. It is picked anew from time to time, and holds for sequences that are admitted from then on.

    Fields:
        block_size: KV slots of the smallest block, a page.
        largest_block: KV slots of the largest block, block_size times a power of two.
        entry_cost: Slots that an entry of a block table is worth.
        window: Finished sequences whose lengths count.
        watermark: Share of the pages that an admission leaves free, so that running sequences can grow.
        num_host_blocks: Pages of the host pool that swapped requests move to; by default as many as the
            device has.
        prefix_caching: Whether pages are found again by their content, by the rules of vLLM V1.
    """

    def __init__(
        self,
        capacity: Capacity,
        *,
        block_size: PositiveInt = 8,
        largest_block: PositiveInt = 128,
        entry_cost: NonNegativeFloat = 1.0,
        window: PositiveInt = 256,
        watermark: Annotated[float, Bounds(ge=0, lt=1)] = 0.01,
        num_host_blocks: NonNegativeInt | None = None,
        prefix_caching: bool = False,
    ) -> None:
        super().__init__(capacity, block_size, largest_block, watermark, num_host_blocks)
        self._learn_sizes(entry_cost, window)

    def shortened(self, sequence: Sequence) -> None:
        """One that has nothing left is admitted anew."""
        super().shortened(sequence)
        if not sequence.block_table:
            self._sizes_of.pop(sequence, None)


class CachedAdaptiveAllocator(LearnedBlocks, CachedRunsAllocator):
    """`adaptive` whose pages are found again."""

    def __init__(
        self, capacity: Capacity, *, entry_cost: float = 1.0, window: int = 256, **fields: Any
    ) -> None:
        super().__init__(capacity, **fields)
        self._learn_sizes(entry_cost, window)


AdaptiveAllocator.with_caching = CachedAdaptiveAllocator
