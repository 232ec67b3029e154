"""The block pool: equal blocks of KV slots with reference counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from sim.errors import IntegrityError


class OutOfBlocks(RuntimeError):
    """The pool holds fewer free blocks than were asked for; nothing was taken."""


class BlockPool:
    """`num_blocks` equal blocks, each free or held by one or more references.

    The free list is a stack as in vLLM V0 (`block_manager_v1.py`): blocks are taken from its end, and freed
    blocks go back there. `extra_references` counts the references beyond the first of every block, which is
    the number of blocks that sharing saves.
    """

    __slots__ = ("extra_references", "free", "fresh", "num_blocks", "references", "tier")

    def __init__(self, num_blocks: int, tier: str = "device") -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be at least 0, got {num_blocks}")
        self.num_blocks = num_blocks
        self.tier = tier
        self.free = list(range(num_blocks))
        self.references = [0] * num_blocks
        self.extra_references = 0
        self.fresh: bytearray | None = None  # flags of blocks handed out, for a ledger that clears them

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self.free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self.free)

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` free blocks. Raises OutOfBlocks and takes none if there are fewer."""
        free = self.free
        if count > len(free):
            raise OutOfBlocks(f"asked for {count} blocks, {len(free)} of {self.num_blocks} are free")
        if count == 0:
            return []
        blocks = free[: -count - 1 : -1]
        del free[-count:]
        references = self.references
        for block in blocks:
            references[block] = 1
        fresh = self.fresh
        if fresh is not None:
            for block in blocks:
                fresh[block] = 1
        return blocks

    def share(self, blocks: Sequence[int], times: int = 1) -> None:
        """Add so many references to each of these held blocks. Raises ValueError for a free one."""
        references = self.references
        for block in blocks:
            if references[block] == 0:
                raise ValueError(f"block {block} is free and cannot be shared")
            references[block] += times
        self.extra_references += times * len(blocks)

    def unshare(self, blocks: Sequence[int], times: int) -> None:
        """Drop so many references to each of these blocks, which have more."""
        references = self.references
        for block in blocks:
            references[block] -= times
        self.extra_references -= times * len(blocks)

    def count(self, block: int) -> int:
        """References of a block that somebody holds."""
        return self.references[block]

    def refer(self, block: int, count: int) -> None:
        """Set the references of a held block."""
        self.references[block] = count

    def alone(self, blocks: Sequence[int]) -> list[int]:
        """Which of these held blocks have one reference only: where they stand, in rising order."""
        references = self.references
        return [at for at, block in enumerate(blocks) if references[block] == 1]

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block; those without any are free again. Raises ValueError on a double free."""
        references = self.references
        free = self.free
        for index, block in enumerate(blocks):
            if references[block] != 1:  # shared, or an error: undo, and look at each
                for undone in blocks[:index]:
                    references[undone] = 1
                for each in blocks:
                    self._release_one(each)
                break
            references[block] = 0
        else:
            free += blocks

    def _release_one(self, block: int) -> None:
        count = self.references[block]
        if count == 0:
            raise ValueError(f"double free of block {block}")
        self.references[block] = count - 1
        if count == 1:
            self.free.append(block)
        else:
            self.extra_references -= 1

    def unheld(self) -> Iterable[int]:
        """Every block that nobody holds, as the pool's own lists have it."""
        return self.free

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the counts with the tables that hold the blocks. Raises IntegrityError with the equation."""
        held = np.fromiter(chain.from_iterable(tables), np.int64)
        if len(held) and (held.min() < 0 or held.max() >= self.num_blocks):
            raise IntegrityError(
                f"{self.tier} blocks {held.min()}..{held.max()} are not inside 0..{self.num_blocks - 1}"
            )
        counts = np.bincount(held, minlength=self.num_blocks)
        references = np.fromiter(self.references, np.int64)
        wrong = np.flatnonzero(counts != references)
        if len(wrong):
            block = wrong[0]
            raise IntegrityError(
                f"{self.tier} block {block}: references({references[block]}) "
                f"!= tables holding it({counts[block]})"
            )
        used = np.count_nonzero(counts)
        free = np.fromiter(self.unheld(), np.int64)
        distinct = np.count_nonzero(np.bincount(free, minlength=self.num_blocks))
        if distinct != len(free):
            raise IntegrityError(f"{self.tier} pool: distinct free({distinct}) != free({len(free)})")
        if used + len(free) != self.num_blocks:
            raise IntegrityError(
                f"{self.tier} pool: used({used}) + free({len(free)}) != total({self.num_blocks})"
            )
        if len(held) - used != self.extra_references:
            raise IntegrityError(
                f"{self.tier} pool: references({len(held)}) - used({used}) != extra({self.extra_references})"
            )
