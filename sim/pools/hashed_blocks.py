"""The block pool of vLLM V0's prefix caching: one block a content, evicted by when it was used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from sim.errors import IntegrityError
from sim.pools.block_pool import BlockPool, OutOfBlocks

UNUSED = -1
"""When a block was used last that nobody has used yet."""


class HashedPool(BlockPool):
    """The rules of V0's `CachedBlockAllocator` (0.4.2, `block_manager_v1.py`, `evictor.py`).

    A block has at most one key, and a key one block: equal content is held once. Blocks that nobody references are
    free and stay findable. Blocks that were never handed out go first; then free blocks are looked at in the order in
    which they were freed, up to the first that was used after the one chosen so far, and the one that lay deepest in
    its prompt is evicted. (Where blocks are freed in the order of their last use, as in V0's own runs, that is the one
    used longest ago.) `computed` flags blocks whose content a later prompt need not compute. `num_leaving` blocks are
    held by nothing but copies away from them.
    """

    __slots__ = (
        "_freed", "_made", "_releases", "_stamps", "computed", "found", "keys", "last_accessed", "leaving",
        "num_leaving",
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
        # Freed parts of tables in order of release: (depth of the first block, time of last use, blocks). Some of the
        # blocks may be held again, or freed once more since.
        self._freed: OrderedDict[int, tuple[int, int, list[int]]] = OrderedDict()
        self._stamps = [0] * num_blocks  # the release with which a block was freed last
        self._releases = 0
        self.leaving: dict[int, int] = {}  # blocks that are being copied away, with the copies' references
        self.num_leaving = 0

    def take(self, count: int = 1) -> list[int]:
        """Hand out `count` blocks without content. Raises OutOfBlocks and takes none if there are fewer."""
        free = self.free
        if count > len(free):
            raise OutOfBlocks(f"asked for {count} blocks, {len(free)} of {self.num_blocks} are free")
        made = min(self._made + count, self.num_blocks)
        blocks = list(range(self._made, made))
        for block in blocks:
            del free[block]
        self._made = made
        if len(blocks) < count:
            self._evict(count, blocks)
        references, fresh = self.references, self.fresh
        for block in blocks:
            references[block] = 1
        if fresh is not None:
            for block in blocks:
                fresh[block] = 1
        return blocks

    def _evict(self, count: int, blocks: list[int]) -> None:
        """Add the free blocks to be reused next, their content forgotten, until there are `count`."""
        keys, computed = self.keys, self.computed
        while len(blocks) < count:
            chosen, deepest, latest = 0, -1, None
            gone = []
            for release, (first, time, part) in self._freed.items():
                while part and not self._stands(part[-1], release):
                    part.pop()
                if not part:
                    gone.append(release)
                    continue
                if latest is not None and latest < time:
                    break
                if deepest < first + len(part) - 1:
                    chosen, deepest, latest = release, first + len(part) - 1, time
            for release in gone:
                del self._freed[release]
            part = self._freed[chosen][2]
            block = part.pop()
            del self.free[block]
            if keys[block] is not None:
                self.rename(block, None)
            computed[block] = 0
            blocks.append(block)

    def _stands(self, block: int, release: int) -> bool:
        """Whether a block is free since that release."""
        return self._stamps[block] == release and block in self.free

    def find(self, key: Hashable) -> int | None:
        """The block with this content, held or free."""
        return self.found.get(key)

    def hold(self, block: int) -> None:
        """Add a reference to a block that was found."""
        count = self.references[block]
        if count:
            self.extra_references += 1
            if self.leaving and self.leaving.get(block) == count:
                self.num_leaving -= 1
        else:
            del self.free[block]
        self.references[block] = count + 1

    def depart(self, block: int) -> None:
        """A copy away from a block begins, while somebody holds it; it holds it too."""
        self.hold(block)
        self.leaving[block] = self.leaving.get(block, 0) + 1

    def arrive(self, blocks: Sequence[int], first: int, now: int) -> None:
        """The copies of these blocks of a table, from index `first` on, have ended; they are released."""
        for block in blocks:
            copies = self.leaving[block]
            if self.references[block] == copies:
                self.num_leaving -= 1
            if copies > 1:
                self.leaving[block] = copies - 1
            else:
                del self.leaving[block]
        self.release(blocks, first, now)

    def obtain(self, key: Hashable | None) -> int:
        """The block with this content, with one more reference, or a new one for it; for None one that is not found."""
        block = None if key is None else self.found.get(key)
        if block is not None:
            self.hold(block)
            return block
        (block,) = self.take()
        if key is not None:
            self.rename(block, key)
        return block

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
        references, last, leaving = self.references, self.last_accessed, self.leaving
        if [references[block] for block in blocks].count(1) == len(blocks) and (
            max([last[block] for block in blocks], default=now) <= now
        ):
            for block in blocks:
                references[block] = 0
                last[block] = now
            self._let_go(first, blocks, now)
            return
        freed: list[int] = []  # a run of them, used last at the same time
        for depth, block in enumerate(blocks, first):
            if last[block] < now:
                last[block] = now
            count = references[block]
            if count == 0:
                raise ValueError(f"double free of block {block}")
            references[block] = count - 1
            if leaving and leaving.get(block) == count - 1:
                self.num_leaving += 1
            if freed and (count > 1 or last[block] != last[freed[-1]]):
                self._let_go(depth - len(freed), freed, last[freed[-1]])
                freed = []
            if count == 1:
                freed.append(block)
            else:
                self.extra_references -= 1
        if freed:
            self._let_go(first + len(blocks) - len(freed), freed, last[freed[-1]])

    def _let_go(self, first: int, blocks: Sequence[int], time: int) -> None:
        """Nobody references these blocks of a table any more; they were used at `time`."""
        if len(self._freed) > 2 * self.num_blocks:
            for old, (_, _, part) in list(self._freed.items()):
                if not any(self._stands(block, old) for block in part):
                    del self._freed[old]
        self._releases = release = self._releases + 1
        self._freed[release] = first, time, list(blocks)
        stamps = self._stamps
        for block in blocks:
            self.free[block] = None
            stamps[block] = release

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """The counts against the tables, and the keys against what is found. Raises IntegrityError."""
        super().check_integrity(tables)
        known = {key: block for block, key in enumerate(self.keys) if key is not None}
        if known != self.found:
            raise IntegrityError(f"found({len(self.found)}) != blocks with a key({len(known)})")
        listed = {block for _, _, part in self._freed.values() for block in part}
        lost = [block for block in self.free if block < self._made and block not in listed]
        if lost:
            raise IntegrityError(f"{self.tier} block {lost[0]} is free, and would never be evicted")
