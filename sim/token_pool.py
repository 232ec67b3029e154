"""The token pool: slots of one token each, handed out as LightLLM does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sim.block_pool import BlockPool, OutOfBlocks


class TokenPool(BlockPool):
    """Blocks of one slot on a stack; what was freed together is handed out again in the same order.

    That is LightLLM's memory manager (`common/mem_manager.py`, ModelTC/lightllm of 2025): an array of free slots
    with a mark, which moves up with what is handed out; freed slots are written before it as they come. There are
    as many blocks as tokens, so only references beyond the first are counted, and nothing is done per slot while
    nothing is shared. A double free shows in `check_integrity`.
    """

    __slots__ = ("_extra",)

    def __init__(self, num_blocks: int, tier: str = "device") -> None:
        self._extra: Counter[int] = Counter()  # references beyond the first, of shared slots
        super().__init__(num_blocks, tier)
        self.free.reverse()  # slot 0 is handed out first

    @property
    def references(self) -> list[int]:
        """References of every slot, counted anew."""
        counts = [1] * self.num_blocks
        for slot in self.free:
            counts[slot] = 0
        for slot, extra in self._extra.items():
            counts[slot] += extra
        return counts

    @references.setter
    def references(self, counts: list[int]) -> None:
        """None at first."""

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` free slots. Raises OutOfBlocks and takes none if there are fewer."""
        free = self.free
        if count > len(free):
            raise OutOfBlocks(f"asked for {count} slots, {len(free)} of {self.num_blocks} are free")
        if count == 0:
            return []
        slots = free[: -count - 1 : -1]
        del free[-count:]
        if self.fresh is not None:
            for slot in slots:
                self.fresh[slot] = 1
        return slots

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of these held slots."""
        self._extra.update(blocks)
        self.extra_references += len(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each slot; those without any are free again."""
        extra = self._extra
        if extra:
            shared = [slot for slot in blocks if slot in extra]
            if shared:
                blocks = [slot for slot in blocks if slot not in extra]
                self.extra_references -= len(shared)
                for slot in shared:
                    extra[slot] -= 1
                    if not extra[slot]:
                        del extra[slot]
        self.free += blocks[::-1]
