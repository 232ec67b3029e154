"""Prefix caching as in nano-vllm."""

from __future__ import annotations

from typing import ClassVar

from sim.allocators.base import allocator
from sim.allocators.capacity import STAYS_CACHED, Capacity
from sim.allocators.prefix import PrefixAllocator
from sim.pools.prefix_pool import PrefixPool
from sim.prefixes.keys import prefix_keys
from sim.registry import PositiveInt
from sim.request import Sequence


@allocator("nano_vllm")
class NanoAllocator(PrefixAllocator):
    """Blocks found again by their content once they are computed, as in nano-vllm (`engine/block_manager.py`).

    It differs from `prefix` in three ways: blocks can be found after the step that computes them, so that equal
    prompts of one step share nothing; of equal blocks only the one computed last is found, and none once that
    is reused; freed blocks queue up behind all others whether they are full or not. There is no watermark, and
    no branches: a request of nano-vllm is one sequence.

    Fields:
        block_size: KV slots per block; nano-vllm's own is 256.
    """

    reasons: ClassVar = {
        "can_fork": "a request of nano-vllm is one sequence",
        "can_swap": "nano-vllm has no memory but the device's; what a preempted request had stays cached there",
        "can_stop": STAYS_CACHED,
        "can_offload": "nano-vllm has no memory but the device's",
    }
    can_fork = can_offload = groups_layers = recomputes_groups = False

    def __init__(self, capacity: Capacity, *, block_size: PositiveInt = 16) -> None:
        super().__init__(capacity, block_size=block_size, keyless_first=False)
        self.pool = PrefixPool(self.num_blocks, keyless_first=False, newest_found=True)

    def held(self, sequence: Sequence, num_tokens: int) -> None:
        """Nothing is found before it is computed."""
        self._asked.pop(sequence.request, None)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a prompt; those filled before are computed by now."""
        self.computed(sequence)
        super().extend(sequence, num_tokens)

    def computed(self, sequence: Sequence) -> None:
        """Let the full blocks be found."""
        request = sequence.request
        if request.content or request.preemptions:
            full = sequence.num_tokens // self.block_size
            self.pool.register_table(sequence.block_table, prefix_keys(request, full, self.block_size))
