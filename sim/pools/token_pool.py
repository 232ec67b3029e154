"""The token pool: slots of one token each, handed out as LightLLM does."""

from __future__ import annotations

from collections.abc import Sequence

from sim.pools.uncounted_pool import UncountedPool


class TokenPool(UncountedPool):
    """Blocks of one slot on a stack; what was freed together is handed out again in the same order.

    That is LightLLM's memory manager (`common/mem_manager.py`, ModelTC/lightllm of 2025): an array of free slots
    with a mark, which moves up with what is handed out; freed slots are written before it as they come.
    """

    __slots__ = ()

    def __init__(self, num_blocks: int, tier: str = "device") -> None:
        super().__init__(num_blocks, tier)
        self.free.reverse()  # slot 0 is handed out first

    def _freed(self, blocks: Sequence[int]) -> Sequence[int]:
        return blocks[::-1]
