"""Blocks by number: a thin layer over the simulator's own block pool."""

from __future__ import annotations

from collections.abc import Sequence

from sim.pools.block_pool import BlockPool


class BlockAllocator:
    """Blocks by number, for a cache of this block size and width: the simulator's block pool, with shapes.

    What is validated is what simulates: free list and reference counts are `sim.pools.block_pool.BlockPool`.

    Raises ValueError for sizes below 1.
    """

    def __init__(self, total_blocks: int, block_size: int, hidden_dim: int) -> None:
        for name, size in (
            ("total_blocks", total_blocks), ("block_size", block_size), ("hidden_dim", hidden_dim),
        ):  # fmt: skip
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected an integer >= 1")
        self.total_blocks = total_blocks
        self.block_size = block_size
        self.hidden_dim = hidden_dim
        self.pool = BlockPool(total_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.pool.num_free

    def allocate(self, count: int = 1) -> list[int]:
        """Take blocks, with one reference each. Raises OutOfBlocks, and takes none, if fewer are free."""
        return self.pool.take(count)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block. Raises ValueError for a free one."""
        self.pool.share(blocks)

    def free(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block. Raises ValueError for a free one."""
        self.pool.release(blocks)

    def references(self, block: int) -> int:
        """How many sequences hold the block."""
        return self.pool.references[block]
