"""KV memory by the token: LightLLM."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from sim.allocators.base import allocator
from sim.allocators.capacity import Capacity
from sim.allocators.paged import PagedAllocator
from sim.pools.token_pool import TokenPool
from sim.registry import NonNegativeInt
from sim.request import Sequence


@allocator("token")
class TokenAllocator(PagedAllocator):
    """One slot for each token, taken when the token comes: blocks of size one, as in LightLLM.

    A token's slot may be anywhere, so nothing is wasted and nothing is reserved; the price is a table with an entry
    for every token. A request is admitted if all of its prompt fits, without a watermark: LightLLM's scheduler
    looks ahead instead. Slots are handed out in the order of `sim/pools/token_pool.py`. Forks share slots and never
    copy, as no slot is shared half full.

    Fields:
        num_host_blocks: Slots of the host pool that swapped requests move to; by default as many as the device
            has.
    """

    counts_beams = True
    absent: ClassVar = {"prefix_caching": "slots are not found by their content; radix does so by the token"}
    reasons: ClassVar = {"can_offload": "slots are not found by their content; radix has tiers by the token"}

    def __init__(self, capacity: Capacity, *, num_host_blocks: NonNegativeInt | None = None) -> None:
        super().__init__(capacity, block_size=1, watermark=0.0, num_host_blocks=num_host_blocks)
        self.pool = TokenPool(self.num_slots)

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """One more slot for each sequence of each batch."""
        books = []
        if self.yielding:
            self.make_room(sum([len(sequences) for _, sequences in batches]))
        for tick, sequences in batches:
            self.num_held += len(sequences)
            done = False
            for sequence, slot in zip(sequences, self.pool.take(len(sequences)), strict=True):
                sequence.block_table.append(slot)
                sequence.capacity = capacity = sequence.capacity + 1
                if capacity == sequence.final_tokens:
                    done = True
            if done:
                sequences[:] = [
                    sequence for sequence in sequences if sequence.capacity < sequence.final_tokens
                ]
            books.append((tick, self.num_held, self.num_internal))
        return books
