"""Paged KV memory: fixed blocks, block tables, sharing by reference count."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import Allocator, allocator
from sim.allocators.blocks import block_slots, grow_by_block, in_common
from sim.allocators.capacity import Admission, Capacity
from sim.allocators.countable import CountableAllocator
from sim.allocators.swapping import SwappingAllocator
from sim.pools.block_pool import BlockPool
from sim.registry import Bounds, NonNegativeInt, PositiveInt
from sim.request import Request, Sequence


@allocator("paged")
class PagedAllocator(CountableAllocator, SwappingAllocator):
    """Blocks of `block_size` slots handed out on demand, shared on fork, copied on write.

    The rules are those of vLLM V0 (`block_manager_v1.py`, 0.4.2; Kwon et al., SOSP 2023): a watermark of
    blocks stays free at admission and at swap-in, running sequences may use it; a token may be appended while
    every running branch could be given a block; swapping moves a shared block once. Only internal
    fragmentation occurs: fewer than `block_size` slots a sequence. V0 cannot compute groups again; here one that
    is computed again gets the full blocks that its branches shared once, and shares them again.

    Fields:
        block_size: KV slots per block.
        watermark: Share of the blocks that an admission leaves free, so that running sequences can grow.
        num_host_blocks: Blocks of the host pool that swapped requests move to; by default as many as the
            device has, the bound that the paper gives.
        prefix_caching: Whether blocks are found again by their content, as V0 did it.
    """

    can_fork = True
    counts_beams = True

    with_caching: ClassVar[type[Allocator]]
    """What it is with prefix caching: a class of its own, so that nothing of it is asked for without."""

    def __new__(cls, *arguments: Any, prefix_caching: bool = False, **fields: Any) -> Any:
        """The class that `prefix_caching` asks for."""
        return super().__new__(cls.with_caching if prefix_caching and cls is PagedAllocator else cls)

    def __init__(
        self,
        capacity: Capacity,
        *,
        block_size: PositiveInt = 16,
        watermark: Annotated[float, Bounds(ge=0, lt=1)] = 0.01,
        num_host_blocks: NonNegativeInt | None = None,
        prefix_caching: bool = False,
    ) -> None:
        super().__init__(capacity)
        num_blocks = capacity.num_slots // block_size if capacity.num_blocks is None else capacity.num_blocks
        if capacity.num_blocks is not None:
            self.num_slots = num_blocks * block_size
        self.block_size = self.growth = block_size
        self.watermark_blocks = int(watermark * num_blocks)
        self.pool = BlockPool(num_blocks)
        self._share_with_host(num_blocks if num_host_blocks is None else num_host_blocks)
        self._remainder = self.num_slots - num_blocks * block_size  # too short for a block

    def num_external(self, head_refused: bool) -> int:
        """The slots behind the last whole block."""
        return self._remainder

    def admission(self, request: Request, num_tokens: int) -> Admission:
        """Room for all of the prompt beside the watermark, or for all branches of a group that gave way.

        Where nobody runs, those who stopped give up all that they have.
        """
        needed = self._needed(request, num_tokens)
        own = held = 0
        if self._stopped:
            own = self._stopped.of(request.sequences)
            held = len(set().union(*[sequence.block_table for sequence in request.sequences]))
        elif self.pool.num_free - needed >= self.watermark_blocks:
            return Admission.OK
        admission = self._fits(needed, self.pool.num_blocks - self.watermark_blocks, held, own)
        if (
            admission is Admission.LATER
            and 0 < len(self._stopped) == len(self.sequences)
            and not self._flying
        ):
            return Admission.OK
        return admission

    def pages(self, request: Request, num_tokens: int) -> int:
        """Blocks that one branch with so many tokens has."""
        return -(-num_tokens // self.block_size)

    def _needed(self, request: Request, num_tokens: int) -> int:
        """Distinct blocks of all branches with so many tokens each."""
        blocks, branches = self.pages(request, num_tokens), request.sequences
        if len(branches) < 2:
            return blocks
        return len(branches) * blocks - sum([each.sibling[1] for each in branches if each.sibling])

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Blocks needed against blocks there."""
        tokens = f"{num_tokens} tokens need"
        if len(request.sequences) > 1:
            tokens = f"{len(request.sequences)} branches of {num_tokens} tokens need"
        return (
            f"{tokens} {self._needed(request, num_tokens)} blocks of {self.block_size} slots, "
            f"the pool has {self.pool.num_blocks} and keeps {self.watermark_blocks} as watermark"
        )

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Append the blocks that the table lacks."""
        table = sequence.block_table
        needed = -(-num_tokens // self.block_size) - len(table)
        if self.yielding or self._stopped:
            self.make_room(needed)
        table += self.pool.take(needed)
        return len(table) * self.block_size

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Slots for a sequence that has none, or for what a preemption took of it; tokens that are there already.

        They are those that a partial preemption left it, or those that a branch before it has.
        """
        if self._stopped:
            for each in sequence.request.sequences:
                self._stopped.discard(each)
        sibling, sequence.sibling = sequence.sibling, None
        if not sequence.capacity:
            if sibling is None:
                return super().admit(sequence, num_tokens, filled)
            return self._admit_beside(*sibling, sequence, num_tokens)
        kept = sequence.origin
        if num_tokens > sequence.capacity:
            self._grow_to(sequence, num_tokens)
        sequence.origin = num_tokens if filled is None else filled
        self.num_tokens += sequence.origin - kept
        return kept

    def _admit_beside(self, sibling: Sequence, blocks: int, sequence: Sequence, num_tokens: int) -> int:
        """Slots for a branch whose leading blocks another one has."""
        sequence.block_table = sibling.block_table[:blocks]
        self.pool.share(sequence.block_table)
        shared = blocks * self.block_size
        sequence.capacity = held = self.reserve(sequence, num_tokens)
        sequence.origin = num_tokens
        self.num_held += held - shared
        self.num_tokens += num_tokens - shared
        self.num_internal += max(0, held - sequence.final_tokens)
        self.sequences.add(sequence)
        return shared

    def cached_tokens(self, request: Request, num_tokens: int) -> int:
        """Those that a partial preemption left its first branch."""
        sequences = request.sequences
        return sequences[0].origin if sequences and sequences[0] in self._stopped else 0

    def in_common(self, request: Request) -> list[tuple[Sequence, int] | None]:
        """Full blocks of the tables."""
        self.list_beams(request)
        return in_common(request.sequences, request.sequences[0].num_tokens // self.block_size)

    def remember(self, request: Request) -> None:
        """Full blocks that branches share they share again."""
        for sequence, sibling in zip(request.sequences, self.in_common(request), strict=True):
            sequence.sibling = sibling

    def release(self, sequence: Sequence) -> None:
        """Drop the table's references, first block first."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """One more block for each sequence of each batch."""
        if self.yielding:
            self.make_room(sum([len(sequences) for _, sequences in batches]))
        return grow_by_block(self, self.pool, batches)

    def take_blocks(self, count: int) -> list[int]:
        """Those that others give up too."""
        if self.yielding:
            self.make_room(count)
        return super().take_blocks(count)

    @property
    def headroom(self) -> int:
        """Free blocks, and those that others give up when asked."""
        return len(self.pool.free) + self.yielding

    def can_append(self, request: Request) -> bool:
        """V0's heuristic: a free block for every running branch, whether it needs one or not."""
        return len(self.pool.free) + self.yielding >= len(request.sequences)

    def append(self, sequence: Sequence) -> int:
        """A new block if the last is full, a copy of the last if others share it, else nothing."""
        self.list_beams(sequence.request)
        tokens = sequence.num_tokens
        if tokens >= sequence.capacity:
            self._grow_to(sequence, sequence.capacity + 1)
            return 0
        shared = sequence.block_table[-1]
        if self.pool.references[shared] == 1:
            return 0
        size = self.block_size
        if self.yielding:
            self.make_room(1)
        (own,) = self.pool.take()
        if self.probe is not None:
            self.probe.copy(shared, own)
        sequence.block_table[-1] = own
        self.pool.release((shared,))
        self.num_held += size
        self.num_tokens += tokens % size
        self.num_internal += max(0, sequence.capacity - sequence.final_tokens)
        return 1

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share every block of the parent; needs no memory."""
        self.pool.share(parent.block_table)
        child.block_table = parent.block_table.copy()
        child.capacity = parent.capacity
        child.origin = parent.num_tokens
        self.sequences.add(child)

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's references; only blocks that nobody else holds leave the books."""
        if sequence.request.counted is not None:
            sequence.request.counted.free(sequence)
            return
        if sequence in self._hosted:  # the books count the device only
            self.host_pool.release(sequence.block_table)
            sequence.block_table = []
            self._hosted.discard(sequence)
            if not self._hosted.intersection(sequence.request.sequences):
                self._flying.forget(sequence.request)
            return
        if self._stopped:
            self._stopped.discard(sequence)
        if not self.pool.extra_references:
            super().free(sequence)
            return
        # Branches are as long as each other, so what the others hold too stays as it is entered.
        size, alone = self.block_size, self.pool.alone(sequence.block_table)
        tokens, final = sequence.num_tokens, sequence.final_tokens
        self.num_held -= size * len(alone)
        self.num_tokens -= size * len(alone)
        for index in reversed(alone):
            start = index * size
            if start + size <= tokens:
                break
            self.num_tokens += size - max(0, tokens - start)
            if sequence.capacity >= final:
                self.num_internal -= size - min(size, max(0, final - start))
        self.release(sequence)
        self.sequences.discard(sequence)
        sequence.capacity = 0

    def retire(self, request: Request) -> None:
        """The branches are done: every slot that they hold is internal waste from now on."""
        self.list_beams(request)
        self._book(request.sequences, -1)
        for sequence in request.sequences:
            sequence.origin = sequence.final_tokens = 0
        self._book(request.sequences, 1)

    @classmethod
    def made(cls, fields: dict[str, Any]) -> type[Allocator]:
        """A class of its own with prefix caching."""
        return cls.with_caching if fields.get("prefix_caching") else cls

    # Where tokens live

    def slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Block table times block size plus offset, shape [num_tokens]."""
        return block_slots(sequence.block_table, self.block_size, sequence.num_tokens)

    @property
    def blocks_saved(self) -> int:
        """References beyond the first of every device block."""
        return self.pool.extra_references
