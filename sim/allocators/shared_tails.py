"""Books over blocks that requests share, the last ones that are filled in part included."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, deque
from typing import ClassVar

from sim.allocators.capacity import STAYS_CACHED, Capacity
from sim.allocators.paged import PagedAllocator
from sim.allocators.yielding import InFlight
from sim.errors import IntegrityError
from sim.pools.block_pool import BlockPool
from sim.pools.hashed_blocks import HashedPool
from sim.request import Request, Sequence


class TailSharingAllocator(PagedAllocator):
    """`PagedAllocator` in which a block may be held by any sequences that begin alike, full or not.

    Who writes into a block that others hold too copies it first. So of those who hold a block that is filled in part
    one at most has written on in it; the others have the same tokens in it up to their own ends. A full block counts
    once; one that is filled in part counts as whoever has filled it most, and as whoever will use most of it.
    """

    reasons: ClassVar = {**PagedAllocator.reasons, "can_stop": STAYS_CACHED}
    keeps_freed = True
    can_stop = False
    pool: HashedPool
    host_pool: HashedPool

    def __init__(
        self, capacity: Capacity, block_size: int, watermark: float, num_host_blocks: int | None
    ) -> None:
        super().__init__(
            capacity, block_size=block_size, watermark=watermark, num_host_blocks=num_host_blocks
        )
        self.pool = HashedPool(self.pool.num_blocks)
        self.host_pool = HashedPool(self.host_pool.num_blocks, "host")
        self._sharers: dict[
            int, list[Sequence]
        ] = {}  # who holds a block that is filled in part and may be shared
        # Of sequences that are done and keep their blocks.
        self._done: set[Sequence] = set()
        self._retired: Counter[int] = Counter()  # references by block, those of copies in flight too
        self._flying: FindableInFlight = FindableInFlight(self)

    @property
    def yielding(self) -> int:  # type: ignore[override]  # others may find what is in flight
        """Blocks that nothing but a copy in flight holds."""
        return self.pool.num_leaving

    @property
    def blocks_saved(self) -> int:
        """References of sequences beyond the first of every device block."""
        return self.pool.extra_references - len(self._flying) + self.pool.num_leaving

    @abstractmethod
    def _last_use(self, sequence: Sequence) -> int:
        """The last step that the sequence took part in."""

    def _share_tail(self, sequence: Sequence, block: int) -> None:
        """One more sequence has this block, filled in part: whoever decodes in it must part from the others."""
        sharers = self._sharers.setdefault(block, [])
        sharers.append(sequence)
        if len(sharers) > 1:
            for sharer in sharers:
                decodes = sharer.decodes
                if decodes is not None and sharer not in decodes.copy_pending:
                    decodes.copy_pending.append(sharer)

    def shares_tail(self, sequence: Sequence) -> bool:
        """Whether somebody else has its last block too, and it has room."""
        if sequence.num_tokens >= sequence.capacity or not self.pool.extra_references:
            return False
        return self.pool.references[sequence.block_table[-1]] > 1

    def demand(self, sequence: Sequence, num_tokens: int) -> int:
        """The copy of a shared last block counts too."""
        return super().demand(sequence, num_tokens) + self.shares_tail(sequence)

    def append(self, sequence: Sequence) -> int:
        """A new block if the last is full, a copy of the last if others share it, else nothing."""
        if sequence.num_tokens >= sequence.capacity:
            self._grow_to(sequence, sequence.capacity + 1)
            return 0
        shared = sequence.block_table[-1]
        references = self.pool.references
        if references[shared] == 1:
            return 0
        if self.yielding:
            self.make_room(1)
            if references[shared] == 1:  # it was being copied away
                return 0
        index = len(sequence.block_table) - 1
        self._count(sequence, -1, index)
        (own,) = self.pool.take()
        if self.probe is not None:
            self.probe.write(sequence)
            self.probe.copy(shared, own)
        sequence.block_table[-1] = own
        self.pool.release((shared,), index, self._last_use(sequence))
        self._part(sequence, shared, index)
        self._count(sequence, 1, index)
        return 1

    def _part(self, sequence: Sequence, block: int, index: int) -> None:
        """A sequence has left a block that it may have shared: what only it had written there is void."""
        sharers = self._sharers.get(block)
        if sharers is None or sequence not in sharers:
            return
        sharers.remove(sequence)
        if not sharers:
            del self._sharers[block]
        elif self.probe is not None:
            start = index * self.block_size
            self._cut(block, max(0, *[sharer.num_tokens - start for sharer in sharers]))

    def _cut(self, block: int, offset: int) -> None:
        if self.probe is not None and offset < self.block_size:
            self.probe.cut(block, offset)

    # Books

    def _count(self, sequence: Sequence, sign: int, first: int = 0) -> None:
        """Enter (1) or strike (-1) what a sequence, whose references stand, adds to the others' blocks.

        Of its own blocks those from `first` on, its last one included.
        """
        size, references, sharers = self.block_size, self.pool.references, self._sharers
        done = sequence in self._done
        final, filled = sequence.final_tokens, sequence.num_tokens
        held = sequence.capacity - first * size
        tokens = max(0, filled - first * size)
        internal = held if done else max(0, sequence.capacity - final)
        if self.pool.extra_references:
            full = 0 if done or self._retired else filled // size
            table = sequence.block_table[first:] if first else sequence.block_table
            for index, block in enumerate(table, first):
                if references[block] == 1:
                    continue
                held -= size
                if index < full and block not in sharers:  # the others have it full too
                    tokens -= size
                    continue
                mine = min(size, max(0, filled - index * size))
                waste = size if done else min(size, max(0, (index + 1) * size - final))
                others, unused = self._of_others(sequence, block, index)
                tokens += max(mine, others) - others - mine
                internal += min(waste, unused) - unused - waste
        self.num_held += sign * held
        self.num_tokens += sign * tokens
        self.num_internal += sign * internal

    def _of_others(self, sequence: Sequence, block: int, index: int) -> tuple[int, int]:
        """Slots of a shared block that others have filled, and those that none of them will ever fill."""
        size = self.block_size
        done = self._retired[block] - (sequence in self._done)
        if self.pool.references[block] - 1 == done:
            return 0, size
        sharers = self._sharers.get(block, ())
        start = index * size
        live = [each for each in sharers if each is not sequence and each not in self._done]
        if not live:  # those who are not noted as sharers have filled it
            return size, 0
        filled = max([each.num_tokens - start for each in live])
        final = max([each.final_tokens - start for each in live])
        return min(size, filled), max(0, size - final)

    def check_books(self) -> None:
        """Reference counts against tables, and the counters against a recount of the blocks."""
        size = self.block_size
        for sequence in self.sequences | self._hosted:
            slots = len(sequence.block_table) * size
            if sequence.capacity != slots:
                raise IntegrityError(f"{sequence}: held({sequence.capacity}) != slots of its table({slots})")
        pools: tuple[tuple[BlockPool, set[Sequence], list[int]], ...]
        leaving, returning = self._flying.held()
        pools = (self.pool, self.sequences, leaving), (self.host_pool, self._hosted, returning)
        for pool, sequences, flying in pools:
            pool.check_integrity([*[sequence.block_table for sequence in sequences], flying])
        alone = [
            block for block, copies in self.pool.leaving.items() if self.pool.references[block] == copies
        ]
        if self.pool.leaving != Counter(leaving) or len(alone) != self.yielding:
            raise IntegrityError(
                f"yielding({self.yielding}) != blocks in flight that nobody has({len(alone)})"
            )
        filled: dict[int, int] = {}
        filled |= dict.fromkeys(leaving, 0)
        unused: dict[int, int] = dict.fromkeys(leaving, size)
        for sequence in self.sequences:
            for index, block in enumerate(sequence.block_table):
                tokens, waste = 0, size
                if sequence not in self._done:
                    tokens = min(size, max(0, sequence.num_tokens - index * size))
                    waste = min(size, max(0, (index + 1) * size - sequence.final_tokens))
                filled[block] = max(tokens, filled.get(block, 0))
                unused[block] = min(waste, unused.get(block, size))
        for name, kept, counted in (
            ("tokens", self.num_tokens, sum(filled.values())),
            ("held", self.num_held, size * len(filled)),
            ("internal", self.num_internal, sum(unused.values())),
        ):
            if kept != counted:
                raise IntegrityError(f"{name}({kept}) != recount over the block tables({counted})")


class FindableInFlight(InFlight):
    """Copies in flight from blocks that others may find meanwhile, and hold as well.

    A copy counts as a sequence that is done: what it alone holds is waste, and whoever else has the block parts from
    it to write. Blocks are let go as those of the sequence would have been, with their places in its table and the
    time of its last use.
    """

    __slots__ = ("_uses", "_uses_on_host")

    _owner: TailSharingAllocator

    def __init__(self, owner: TailSharingAllocator) -> None:
        super().__init__(owner)
        self._uses: deque[tuple[int, int]] = deque()  # of the blocks that leave
        self._uses_on_host: deque[list[tuple[int, int]]] = deque()

    def leave_from(self, request: Request, uses: dict[int, tuple[int, int]]) -> None:
        """Copy device blocks that a request holds to the host; of each its index in a table and its last use."""
        self._uses += uses.values()
        self.leave(request, [*uses])

    def come_back_from(self, request: Request, uses: dict[int, tuple[int, int]]) -> None:
        """Copy host blocks that a request holds to the device."""
        for block in uses:
            self._owner.host_pool.hold(block)
        self._uses_on_host.append([*uses.values()])
        self.come_back(request, [*uses])

    def _depart(self, blocks: list[int]) -> None:
        for block in blocks:
            self._owner.pool.depart(block)
        self._owner._retired.update(blocks)

    def _let_go(self, blocks: list[int]) -> None:
        owner, pool = self._owner, self._owner.pool
        copies = Counter(blocks)
        alone = sum([pool.references[block] == count for block, count in copies.items()])
        owner._retired -= copies
        owner.num_held -= alone * owner.block_size
        owner.num_internal -= alone * owner.block_size
        for first, time, part in _parts(blocks, [self._uses.popleft() for _ in blocks]):
            pool.arrive(part, first, time)

    def _let_go_of_host(self, blocks: list[int]) -> None:
        for first, time, part in _parts(blocks, self._uses_on_host.popleft()):
            self._owner.host_pool.release(part, first, time)


def _parts(blocks: list[int], uses: list[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
    """Blocks that follow one another in a table and were used last at the same time: (first index, time, blocks)."""
    parts: list[tuple[int, int, list[int]]] = []
    for block, (index, time) in zip(blocks, uses, strict=True):
        if parts and parts[-1][1] == time and parts[-1][0] + len(parts[-1][2]) == index:
            parts[-1][2].append(block)
        else:
            parts.append((index, time, [block]))
    return parts
