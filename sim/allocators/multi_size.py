"""Blocks of several sizes at once, growing with the sequence."""

from __future__ import annotations

from typing import Annotated, Any

from sim.allocators.base import allocator
from sim.allocators.cached_runs import CachedRunsAllocator
from sim.allocators.capacity import Capacity
from sim.allocators.run_tables import RunTables
from sim.allocators.runs import RunsAllocator
from sim.registry import Bounds, Fraction, NonNegativeInt, PositiveInt
from sim.request import Sequence


class GrowingBlocks(RunTables):
    """The larger a block, the more its sequence holds."""

    slack: float

    def run(self, sequence: Sequence, missing: int) -> int:
        """Pages of the largest block that the missing ones fill, or that the slack allows."""
        return self.pool.runs.run_of(max(missing, int(self.slack * len(sequence.block_table))))


@allocator("multi_size")
class MultiSizeAllocator(GrowingBlocks, RunsAllocator):
    """Blocks that are small for short sequences and large for long ones, from one pool of pages.

    A prompt takes the largest blocks that it fills. Otherwise a block is as large as a share of what the sequence
    holds allows, so that what its last block may waste stays in proportion to it, and its table grows with the
    logarithm of its length up to the largest block. A block is an aligned run of pages, from a buddy system; a
    page is the smallest block.

    Fields:
        block_size: KV slots of the smallest block, a page.
        largest_block: KV slots of the largest block, block_size times a power of two.
        slack: Most that a block may add to what its sequence holds, as a share of that; one page is always
            allowed.
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
        slack: Fraction = 0.125,
        watermark: Annotated[float, Bounds(ge=0, lt=1)] = 0.01,
        num_host_blocks: NonNegativeInt | None = None,
        prefix_caching: bool = False,
    ) -> None:
        super().__init__(capacity, block_size, largest_block, watermark, num_host_blocks)
        self.slack = slack


class CachedMultiSizeAllocator(GrowingBlocks, CachedRunsAllocator):
    """`multi_size` whose pages are found again."""

    def __init__(self, capacity: Capacity, *, slack: float = 0.125, **fields: Any) -> None:
        super().__init__(capacity, **fields)
        self.slack = slack


MultiSizeAllocator.with_caching = CachedMultiSizeAllocator
