"""Prefix caching over blocks of several sizes."""

from __future__ import annotations

from sim.allocators.capacity import Capacity
from sim.allocators.prefix import PrefixAllocator
from sim.allocators.run_tables import RunTables
from sim.pools.cached_runs import CachedRunPool
from sim.request import Request, Sequence
from sim.tiers.offloading_pools import OffloadingRunPool
from sim.tiers.tiered_store import TieredStore


class CachedRunsAllocator(RunTables, PrefixAllocator):
    """`PrefixAllocator` over tables of runs: every page has a key, the smallest block being the grain of the hashes.

    A prompt finds pages one by one, whatever runs they were handed out in, and takes runs of its own behind them; so
    its table may have shorter runs where it was found in parts. What gives way stays cached and is computed again.
    """

    asks_exactly = False
    groups_layers = False
    pool: CachedRunPool

    def __init__(
        self,
        capacity: Capacity,
        *,
        block_size: int = 8,
        largest_block: int = 128,
        watermark: float = 0.01,
        num_host_blocks: None = None,
    ) -> None:
        super().__init__(capacity, block_size=block_size, watermark=watermark)
        self.pool = CachedRunPool(self.num_blocks, self._open(largest_block))

    def _offloading(self, tiers: TieredStore) -> CachedRunPool:
        return OffloadingRunPool(self.num_blocks, self.longest, tiers)

    def hold(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """What is found is as many runs as lie apart."""
        hits = super().hold(sequence, num_tokens)
        if hits:
            self._enter(sequence, self._runs(hits))
        return hits

    def append(self, sequence: Sequence) -> int:
        """A copied page breaks its run."""
        copies = super().append(sequence)
        if copies:
            self._recount(sequence)
        return copies

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Pages needed against pages there."""
        needed = self.pages(request, num_tokens)
        return (
            f"{num_tokens} tokens need {needed} pages of {self.block_size} slots, "
            f"the pool has {self.num_blocks}"
        )
