"""The block pool of vLLM V0's prefix caching: one block a content, evicted by when it was used last."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from heapq import heappop, heappush

from sim.block_pool import BlockPool, OutOfBlocks
from sim.errors import IntegrityError


class HashedPool(BlockPool):
    """The rules of V0's `CachedBlockAllocator` (0.4.2, `block_manager_v1.py`, `evictor.py`).

    A block has at most one key, and a key one block: equal content is held once. Blocks that nobody references are
    free and stay findable. Blocks that were never handed out go first; then the free block that was used longest
    ago is evicted, of equals the one that lay deepest in its prompt, of those the one that was freed first.
    `computed` flags blocks whose content a later prompt need not compute.
    """

    __slots__ = (
        "_freed",
        "_made",
        "_releases",
        "_sorted",
        "_times",
        "computed",
        "found",
        "keys",
        "last_accessed",
    )

    free: dict[int, None]  # type: ignore[assignment]  # those that were never handed out, and those that were

    def __init__(self, num_blocks: int, tier: str = "device") -> None:
        super().__init__(num_blocks, tier)
        self.free = dict.fromkeys(range(num_blocks))
        self.keys: list[Hashable | None] = [None] * num_blocks
        self.found: dict[Hashable, int] = {}
        self.last_accessed = [-1] * num_blocks
        self.computed = bytearray(num_blocks)
        self._made = 0  # blocks handed out at least once
        self._releases = 0
        # Freed blocks by the time of their last use, as (depth, minus the release, block); some may be held again.
        self._freed: dict[int, list[tuple[int, int, int]]] = {}
        self._times: list[int] = []  # heap of the keys
        self._sorted = -1  # the time whose blocks are in order

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` blocks without content. Raises OutOfBlocks and takes none if there are fewer."""
        free = self.free
        if count > len(free):
            raise OutOfBlocks(f"asked for {count} blocks, {len(free)} of {self.num_blocks} are free")
        made = min(self._made + count, self.num_blocks)
        blocks = list(range(self._made, made))
        self._made = made
        blocks += [self._evict() for _ in range(count - len(blocks))]
        references, fresh = self.references, self.fresh
        for block in blocks:
            del free[block]
            references[block] = 1
            if fresh is not None:
                fresh[block] = 1
        return blocks

    def _evict(self) -> int:
        """The free block to be reused next, its content forgotten."""
        while True:
            time = self._times[0]
            freed = self._freed[time]
            if self._sorted != time:
                freed.sort()
                self._sorted = time
            while freed:
                _, _, block = freed.pop()
                if block in self.free and self.last_accessed[block] == time:
                    self.rename(block, None)
                    self.computed[block] = 0
                    self.last_accessed[block] = -1
                    return block
            heappop(self._times)
            del self._freed[time]

    def find(self, key: Hashable) -> int | None:
        """The block with this content, held or free."""
        return self.found.get(key)

    def hold(self, block: int) -> None:
        """Add a reference to a block that was found."""
        if self.references[block]:
            self.extra_references += 1
        else:
            del self.free[block]
        self.references[block] += 1

    def rename(self, block: int, key: Hashable | None) -> None:
        """Let the block be found by this key, and by no other; None is found by nobody. The key must be new."""
        known = self.keys[block]
        if known is not None:
            del self.found[known]
        self.keys[block] = key
        if key is not None:
            if key in self.found:
                raise ValueError(f"block {self.found[key]} has the content {key!r} already")
            self.found[key] = block

    def promote(self, block: int, key: Hashable, index: int) -> int:
        """A block held once, at this index of a table, is full: it gets its key, or gives way to who has it."""
        there = self.find(key)
        if there is None:
            self.rename(block, key)
            return block
        self.release((block,), index)
        self.hold(there)
        return there

    def release(self, blocks: Sequence[int], first: int = 0, now: int = -1) -> None:
        """Drop a reference to each block of a table from index `first` on, used at `now` at the latest.

        Raises ValueError on a double free.
        """
        references, last, free, freed = self.references, self.last_accessed, self.free, self._freed
        for depth, block in enumerate(blocks, first):
            time = last[block]
            if time < now:
                last[block] = time = now
            count = references[block]
            references[block] = count - 1
            if count == 1:
                free[block] = None
                self._releases += 1
                entry = (depth, -self._releases, block)
                there = freed.get(time)
                if there is None:
                    freed[time] = [entry]
                    heappush(self._times, time)
                else:
                    there.append(entry)
                if time == self._sorted:
                    self._sorted = -1
            elif count:
                self.extra_references -= 1
            else:
                references[block] = 0
                raise ValueError(f"double free of block {block}")

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """The counts against the tables, and the keys against what is found. Raises IntegrityError."""
        super().check_integrity(tables)
        known = {key: block for block, key in enumerate(self.keys) if key is not None}
        if known != self.found:
            raise IntegrityError(f"found({len(self.found)}) != blocks with a key({len(known)})")
        listed = {block for time in self._freed for _, _, block in self._freed[time]}
        lost = [block for block in self.free if block < self._made and block not in listed]
        if lost:
            raise IntegrityError(f"{self.tier} block {lost[0]} is free, and would never be evicted")
