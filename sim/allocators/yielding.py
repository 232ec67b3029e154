"""Blocks that somebody still has and gives up: those of sequences that stopped, and those being copied away."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from sim.allocators.base import Allocator
from sim.pools.block_pool import BlockPool
from sim.request import Request, Sequence
from sim.units import FOREVER


class YieldingAllocator(Allocator):
    """Blocks behind tables on the device and on the host, some of which may be given up for others."""

    pool: BlockPool
    host_pool: BlockPool

    def shortened(self, sequence: Sequence) -> None:
        """The last blocks of a sequence that stopped were taken; of one that has none left it is told once."""


class Stopped:
    """Sequences that do not run but keep their blocks until others need them, who stopped first before others.

    Only the blocks at a sequence's end that nobody shares can be taken of it; `blocks` of all of them. Branches of
    a group that stop keep what they share, but where nobody runs any more they give up that too.
    """

    __slots__ = ("_own", "_owner", "blocks")

    def __init__(self, owner: YieldingAllocator) -> None:
        self._owner = owner
        self._own: dict[Sequence, int] = {}
        self.blocks = 0

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._own

    def __len__(self) -> int:
        return len(self._own)

    def of(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that could be taken of these sequences."""
        return sum([self._own.get(sequence, 0) for sequence in sequences])

    def add(self, sequence: Sequence) -> None:
        """A sequence stops."""
        count, table = self._owner.pool.count, sequence.block_table
        own = 0
        for block in reversed(table):
            if count(block) > 1:
                break
            own += 1
        self._own[sequence] = own
        self._count(own)
        index = sequence.num_tokens // self._owner.block_size
        if own < len(table) and index == len(table) - own - 1:
            if own:
                self.cut(sequence, own)
            self.cut(sequence, 1, own=False)  # whoever has it last would write on in it
            if sequence in self._own:
                self.add(sequence)

    def discard(self, sequence: Sequence) -> None:
        """The sequence goes on, or ends."""
        self._count(-self._own.pop(sequence, 0))

    def _count(self, blocks: int) -> None:
        self.blocks += blocks
        self._owner.yielding += blocks

    def make_room(self, free: int) -> None:
        """See that so many blocks of the pool are free, as far as possible."""
        lacking = free - self._owner.pool.num_free
        if lacking <= 0:
            return
        for sequence, own in list(self._own.items()) if self.blocks else ():
            if own:
                blocks = min(own, lacking)
                self.cut(sequence, blocks)
                lacking -= blocks
                if not lacking:
                    return
        for request in self.requests:
            if self._owner.pool.num_free >= free:
                return
            self.drop(request)

    @property
    def requests(self) -> list[Request]:
        """Whose sequences they are."""
        return list(dict.fromkeys([sequence.request for sequence in self._own]))

    def drop(self, request: Request) -> None:
        """Take all that the request has, what its branches share as well."""
        owner = self._owner
        for sequence in request.sequences:
            if sequence in self._own:
                if owner.probe is not None:
                    owner.probe.end(sequence)
                owner.free(sequence)

    def cut(self, sequence: Sequence, blocks: int, *, own: bool = True) -> None:
        """Take the last blocks of a sequence, its own or one that others hold too, and the tokens in them."""
        owner, table = self._owner, sequence.block_table
        before, tokens, final = sequence.capacity, sequence.origin, sequence.final_tokens
        self._owner.pool.release(table[-blocks:])
        del table[-blocks:]
        sequence.capacity = held = before - blocks * owner.block_size
        sequence.origin = kept = min(tokens, held)
        if own:
            self._own[sequence] -= blocks
            self._count(-blocks)
            owner.num_held += held - before
            owner.num_tokens += kept - tokens
            owner.num_internal += max(0, held - final) - max(0, before - final)
        if not held:
            del self._own[sequence]
            owner.sequences.discard(sequence)
        owner.shortened(sequence)
        if owner.probe is not None:
            (owner.probe.lose if held else owner.probe.end)(sequence)


class InFlight:
    """Blocks whose copies over the link have not ended yet: held until then, and of no use to anybody.

    They count as internal waste of the device.
    """

    __slots__ = ("_leaving", "_on_host_at", "_owner", "_returning")

    def __init__(self, owner: YieldingAllocator) -> None:
        self._owner = owner
        self._leaving: deque[tuple[int, int]] = deque()  # end of the copy (ns), block of the device
        self._returning: deque[tuple[int, list[int]]] = deque()  # likewise, blocks of the host
        self._on_host_at: dict[Request, int] = {}

    def __len__(self) -> int:
        """Blocks on their way to the host."""
        return len(self._leaving)

    def leave(self, request: Request, blocks: list[int]) -> None:
        """Copy device blocks of a request to the host; they have a reference for it."""
        link = self._owner.link
        assert link is not None
        self._leaving += zip(link.submit_out(len(blocks)), blocks, strict=True)
        self._depart(blocks)
        self._on_host_at[request] = link.out_free_at

    def come_back(self, request: Request, blocks: list[int]) -> None:
        """Copy host blocks of a request, which have a reference for it, to the device, when they are there."""
        assert self._owner.link is not None
        end = self._owner.link.submit_in(len(blocks), self._on_host_at.pop(request))
        self._returning.append((end, blocks))

    def forget(self, request: Request) -> None:
        """The request will not come back."""
        self._on_host_at.pop(request, None)

    def _count(self, blocks: int) -> None:
        owner = self._owner
        slots = blocks * owner.block_size
        owner.yielding += blocks
        owner.num_held += slots
        owner.num_internal += slots

    def _depart(self, blocks: list[int]) -> None:
        """The copies of these blocks of the device begin."""
        self._count(len(blocks))

    def _let_go(self, blocks: list[int]) -> None:
        """These blocks of the device are copied."""
        self._owner.pool.release(blocks)
        self._count(-len(blocks))

    def _let_go_of_host(self, blocks: list[int]) -> None:
        """These blocks of the host are copied."""
        self._owner.host_pool.release(blocks)

    def land(self, now: int) -> None:
        """Free the sources of copies that have ended."""
        leaving, returning = self._leaving, self._returning
        landed = []
        while leaving and leaving[0][0] <= now:
            landed.append(leaving.popleft()[1])
        if landed:
            self._let_go(landed)
        while returning and returning[0][0] <= now:
            self._let_go_of_host(returning.popleft()[1])

    def make_room(self, free: int) -> None:
        """Wait until so many blocks of the pool are free, as far as possible: the step does not begin before."""
        link = self._owner.link
        leaving = self._leaving
        while leaving and self._owner.pool.num_free < free:
            assert link is not None
            end, block = leaving.popleft()
            link.awaited = max(link.awaited, end)
            self._let_go([block])

    @property
    def next_landing(self) -> int:
        """The end of the next block's copy to the host, or of the next request's copy back; FOREVER without any."""
        ends = [flying[0][0] for flying in (self._leaving, self._returning) if flying]
        return min(ends, default=FOREVER)

    def held(self) -> tuple[list[int], list[int]]:
        """Blocks held on the device, and on the host."""
        return [block for _, block in self._leaving], [
            block for _, blocks in self._returning for block in blocks
        ]
