"""Swapping to a host pool, at once or beside the computation; and blocks that sequences which stopped give up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from sim.allocators.capacity import Admission
from sim.allocators.yielding import InFlight, Stopped, YieldingAllocator
from sim.errors import IntegrityError
from sim.pools.block_pool import BlockPool
from sim.request import Request, Sequence


class SwappingAllocator(YieldingAllocator):
    """Blocks behind tables that move to a pool on the host and back, a block that branches share once.

    A policy hands blocks out of `pool`. It calls `make_room` before it takes any while others give theirs up
    (`yielding`): copies that leave over a link are waited for, and who stopped loses what is needed.
    """

    reasons: ClassVar = {
        "can_offload": "cached blocks go to its own host pool with their requests (swap); prefix and radix have tiers"
    }
    recomputes_groups = True
    can_stop = True
    can_swap = True
    can_fly = True
    watermark_blocks: int

    def _share_with_host(self, num_host_blocks: int) -> None:
        """Open the host's pool."""
        self.host_pool = BlockPool(num_host_blocks, "host")
        self._hosted: set[Sequence] = set()  # swapped out
        self._stopped = Stopped(self)
        self._flying = InFlight(self)

    # Blocks that others give up

    def stop(self, sequence: Sequence) -> None:
        """Its unshared blocks at the end yield; those of who stopped first go first."""
        if not self.can_stop:
            super().stop(sequence)
        self._stopped.add(sequence)

    def clear_for(self, request: Request) -> bool:
        """Blocks that branches of the others share go too."""
        others = [each for each in self._stopped.requests if each is not request]
        for each in others:
            self._stopped.drop(each)
        return bool(others)

    def make_room(self, needed: int) -> None:
        """See that so many blocks are free: first by waiting for those that leave, then at the cost of who stopped."""
        if self.pool.num_free < needed:
            self._flying.make_room(needed)
            self._stopped.make_room(needed)

    def land(self, now: int) -> None:
        """Free the sources of copies that have ended."""
        self._flying.land(now)

    @property
    def next_landing(self) -> int:
        """The end of the next block's copy to the host, or of the next request's copy back."""
        return self._flying.next_landing

    # Swapping

    def swap_blocks(self, request: Request) -> int:
        """The distinct blocks of the request."""
        if len(request.sequences) == 1:
            return len(request.sequences[0].block_table)
        return len(self._distinct(request))

    def can_swap_out(self, request: Request) -> bool:
        """Host room for the distinct blocks of the request."""
        return self.swap_blocks(request) <= self.host_pool.num_free

    def swap_out(self, request: Request) -> int:
        """Move the distinct blocks to the host; sharing is kept there."""
        self._book(request.sequences, -1)
        self.sequences.difference_update(request.sequences)
        self._hosted.update(request.sequences)
        left = self._move(request, self.pool, self.host_pool)
        if self.link is not None:
            self._flying.leave(request, left)
        return len(left)

    def _fits(self, needed: int, largest: int, held: int = 0, own: int = 0) -> Admission:
        """Whether so many blocks are to be had; of them `held` are there, `own` among those that yield."""
        if needed > largest:
            return Admission.NEVER
        spare = self.pool.num_free + self._stopped.blocks - own
        return Admission.OK if spare - (needed - held) >= self.watermark_blocks else Admission.LATER

    def swap_in_admission(self, request: Request) -> Admission:
        """Room for the distinct blocks and one fresh block a branch, beside the watermark."""
        return self._fits(len(self._distinct(request)) + len(request.sequences), self.pool.num_blocks)

    def swap_in(self, request: Request) -> int:
        """Move the distinct blocks back to the device, to other places."""
        left = self._move(request, self.host_pool, self.pool)
        if self.link is not None:
            self._flying.come_back(request, left)
        self._book(request.sequences, 1)
        self._hosted.difference_update(request.sequences)
        self.sequences.update(request.sequences)
        return len(left)

    @staticmethod
    def _distinct(request: Request) -> list[int]:
        if request.counted is not None:
            request.counted.list_blocks()
        return list(dict.fromkeys(block for sequence in request.sequences for block in sequence.block_table))

    def _move(self, request: Request, source: BlockPool, target: BlockPool) -> list[int]:
        """Give a request places in the target; the blocks it had, free now, or held until they are copied."""
        distinct = self._distinct(request)
        if target is self.pool and self.yielding:
            self.make_room(len(distinct))
        places = dict(zip(distinct, target.take(len(distinct)), strict=True))
        if self.probe is not None:
            self.probe.swap(target.tier, list(places.items()), request.sequences)
        if self.link is not None:
            source.share(distinct)  # the copy's own reference
        taken: set[int] = set()
        for sequence in request.sequences:
            moved = [places[block] for block in sequence.block_table]
            target.share([block for block in moved if block in taken])
            taken.update(moved)
            source.release(sequence.block_table)
            sequence.block_table = moved
        return distinct

    # Books

    def _book(self, sequences: Iterable[Sequence], sign: int) -> None:
        """Enter (1) or strike (-1) the distinct blocks that branches of one request hold."""
        size = self.block_size
        seen: set[int] = set()
        for sequence in sequences:
            tokens, final = sequence.num_tokens, sequence.final_tokens
            entered_last = sequence.capacity >= final
            for index, block in enumerate(sequence.block_table):
                if block not in seen:
                    seen.add(block)
                    start = index * size
                    self.num_held += sign * size
                    self.num_tokens += sign * min(size, max(0, tokens - start))
                    if entered_last:
                        self.num_internal += sign * (size - min(size, max(0, final - start)))

    def check_books(self) -> None:
        """Reference counts against tables, and the counters against a recount of the blocks."""
        for sequence in self.sequences | self._hosted:
            slots = len(sequence.block_table) * self.block_size
            if sequence.capacity != slots:
                raise IntegrityError(f"{sequence}: held({sequence.capacity}) != slots of its table({slots})")
        yielding = self._stopped.blocks + len(self._flying)
        if self.yielding != yielding or self._stopped.blocks != self._stopped.of(self.sequences):
            raise IntegrityError(
                f"yielding({self.yielding}) != blocks of who stopped or in flight({yielding})"
            )
        leaving, returning = self._flying.held()
        self.pool.check_integrity([*[sequence.block_table for sequence in self.sequences], leaving])
        self.host_pool.check_integrity([*[sequence.block_table for sequence in self._hosted], returning])
        counters = self.num_tokens, self.num_held, self.num_internal
        self.num_tokens = 0
        self.num_held = self.num_internal = len(leaving) * self.block_size
        for request in {sequence.request for sequence in self.sequences}:
            branches = [sequence for sequence in request.sequences if sequence in self.sequences]
            if len(branches) == 1:
                (alone,) = branches
                self.num_held += alone.capacity
                self.num_tokens += alone.num_tokens
                self.num_internal += max(0, alone.capacity - alone.final_tokens)
            else:
                self._book(branches, 1)
        recount = self.num_tokens, self.num_held, self.num_internal
        self.num_tokens, self.num_held, self.num_internal = counters
        for name, kept, counted in zip(("tokens", "held", "internal"), counters, recount, strict=True):
            if kept != counted:
                raise IntegrityError(f"{name}({kept}) != recount over the block tables({counted})")
