"""A block pool that counts no reference which is a block's only one."""

from __future__ import annotations

from collections.abc import Sequence

from sim.pools.block_pool import BlockPool, OutOfBlocks


class UncountedPool(BlockPool):
    """Blocks on a stack, of which only references beyond the first are counted.

    Made for blocks of a few slots, of which there are very many: nothing is done for a block that one sequence takes
    and gives back. A double free shows in `check_integrity`.
    """

    __slots__ = ("_extra",)

    def __init__(self, num_blocks: int, tier: str = "device") -> None:
        self._extra: dict[int, int] = {}  # references beyond the first, of shared blocks
        super().__init__(num_blocks, tier)

    @property
    def references(self) -> list[int]:
        """References of every block, counted anew."""
        counts = [1] * self.num_blocks
        for block in self.unheld():
            counts[block] = 0
        for block, extra in self._extra.items():
            counts[block] += extra
        return counts

    @references.setter
    def references(self, counts: list[int]) -> None:
        """None at first."""

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` free blocks. Raises OutOfBlocks and takes none if there are fewer."""
        free = self.free
        if count > len(free):
            raise OutOfBlocks(f"asked for {count} blocks, {len(free)} of {self.num_blocks} are free")
        if count == 0:
            return []
        blocks = free[: -count - 1 : -1]
        del free[-count:]
        fresh = self.fresh
        if fresh is not None:
            for block in blocks:
                fresh[block] = 1
        return blocks

    def share(self, blocks: Sequence[int], times: int = 1) -> None:
        """Add so many references to each of these held blocks."""
        extra = self._extra
        if extra.keys().isdisjoint(blocks):
            extra |= dict.fromkeys(blocks, times)
        else:
            for block in blocks:
                extra[block] = extra.get(block, 0) + times
        self.extra_references += times * len(blocks)

    def unshare(self, blocks: Sequence[int], times: int) -> None:
        """Drop so many references to each of these blocks, which have more."""
        extra = self._extra
        for block in blocks:
            left = extra[block] - times
            if left:
                extra[block] = left
            else:
                del extra[block]
        self.extra_references -= times * len(blocks)

    def count(self, block: int) -> int:
        """References of a block that somebody holds."""
        return 1 + self._extra.get(block, 0)

    def refer(self, block: int, count: int) -> None:
        """Set the references of a held block."""
        if count > 1:
            self._extra[block] = count - 1
        else:
            self._extra.pop(block, None)

    def alone(self, blocks: Sequence[int]) -> list[int]:
        """Which of these held blocks have one reference only: where they stand, in rising order."""
        extra = self._extra
        return [at for at, block in enumerate(blocks) if block not in extra]

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block; those without any are free again."""
        extra = self._extra
        if extra:
            shared = [block for block in blocks if block in extra]
            if shared:
                blocks = [block for block in blocks if block not in extra]
                self.extra_references -= len(shared)
                for block in shared:
                    extra[block] -= 1
                    if not extra[block]:
                        del extra[block]
        self.free += self._freed(blocks)

    def _freed(self, blocks: Sequence[int]) -> Sequence[int]:
        """Blocks in the order in which they go onto the stack."""
        return blocks
