"""The block pool of vLLM V0's prefix caching: one block a content, evicted by when it was used last."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from heapq import heappop, heappush

from sim.block_pool import BlockPool, OutOfBlocks
from sim.errors import IntegrityError

UNUSED = -2
"""When a block was used last that nobody has used since it was handed out."""


class HashedPool(BlockPool):
    """The rules of V0's `CachedBlockAllocator` (0.4.2, `block_manager_v1.py`, `evictor.py`).

    A block has at most one key, and a key one block: equal content is held once. Blocks that nobody references are
    free and stay findable. Blocks that were never handed out go first; then the free block that was used longest
    ago is evicted, of equals the one that lay deepest in its prompt, of those the one that was freed first.
    `computed` flags blocks whose content a later prompt need not compute.
    """

    __slots__ = (
        "_active", "_freed", "_made", "_next", "_times", "computed", "found", "keys", "last_accessed",
    )  # fmt: skip

    free: dict[int, None]  # type: ignore[assignment]  # those that were never handed out, and those that were

    def __init__(self, num_blocks: int, tier: str = "device") -> None:
        super().__init__(num_blocks, tier)
        self.free = dict.fromkeys(range(num_blocks))
        self.keys: list[Hashable | None] = [None] * num_blocks
        self.found: dict[Hashable, int] = {}
        self.last_accessed = [UNUSED] * num_blocks
        self.computed = bytearray(num_blocks)
        self._made = 0  # blocks handed out at least once
        # Freed parts of tables by the time of their last use: (depth of the first block, blocks) in order of release.
        # Some of the blocks may be held again.
        self._freed: dict[int, list[tuple[int, Sequence[int]]]] = {}
        self._times: list[int] = []  # heap of the keys
        self._active = UNUSED  # the time whose blocks are evicted now
        self._next: list[int] = []  # these blocks, the next one last

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` blocks without content. Raises OutOfBlocks and takes none if there are fewer."""
        free = self.free
        if count > len(free):
            raise OutOfBlocks(f"asked for {count} blocks, {len(free)} of {self.num_blocks} are free")
        made = min(self._made + count, self.num_blocks)
        blocks = list(range(self._made, made))
        self._made = made
        if len(blocks) < count:
            self._evict(count, blocks)
        references, fresh = self.references, self.fresh
        for block in blocks:
            del free[block]
            references[block] = 1
        if fresh is not None:
            for block in blocks:
                fresh[block] = 1
        return blocks

    def _evict(self, count: int, blocks: list[int]) -> None:
        """Add the free blocks to be reused next, their content forgotten, until there are `count`."""
        free, last, keys, computed = self.free, self.last_accessed, self.keys, self.computed
        while True:
            time, following = self._active, self._next
            while following:
                block = following.pop()
                if last[block] == time and block in free:
                    if keys[block] is not None:
                        self.rename(block, None)
                    computed[block] = 0
                    last[block] = UNUSED
                    blocks.append(block)
                    if len(blocks) == count:
                        return
            if time == self._times[0]:
                heappop(self._times)
                del self._freed[time]
            self._active = time = self._times[0]
            parts = self._freed[time]
            if len(parts) == 1:
                self._next = list(parts[0][1])
            else:
                ordered = sorted(
                    (depth, -release, block)
                    for release, (first, part) in enumerate(parts)
                    for depth, block in enumerate(part, first)
                )
                self._next = [block for _, _, block in ordered]

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
        references, last = self.references, self.last_accessed
        if [references[block] for block in blocks].count(1) == len(blocks) and (
            max([last[block] for block in blocks], default=now) <= now
        ):
            for block in blocks:
                references[block] = 0
                last[block] = now
            self._let_go(first, blocks, now)
            return
        for depth, block in enumerate(blocks, first):
            if last[block] < now:
                last[block] = now
            count = references[block]
            if count == 0:
                raise ValueError(f"double free of block {block}")
            references[block] = count - 1
            if count == 1:
                self._let_go(depth, (block,), last[block])
            else:
                self.extra_references -= 1

    def _let_go(self, first: int, blocks: Sequence[int], time: int) -> None:
        """Nobody references these blocks of a table any more; they were used at `time`."""
        self.free.update(dict.fromkeys(blocks))
        parts = self._freed.get(time)
        if parts is None:
            self._freed[time] = [(first, blocks)]
            heappush(self._times, time)
        else:
            parts.append((first, blocks))
        if time <= self._active:
            self._active, self._next = UNUSED, []

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """The counts against the tables, and the keys against what is found. Raises IntegrityError."""
        super().check_integrity(tables)
        known = {key: block for block, key in enumerate(self.keys) if key is not None}
        if known != self.found:
            raise IntegrityError(f"found({len(self.found)}) != blocks with a key({len(known)})")
        listed = {block for parts in self._freed.values() for _, part in parts for block in part}
        lost = [block for block in self.free if block < self._made and block not in listed]
        if lost:
            raise IntegrityError(f"{self.tier} block {lost[0]} is free, and would never be evicted")
