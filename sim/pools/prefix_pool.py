"""The block pool of a prefix cache: freed blocks keep their content until they are handed out again."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence

from sim.errors import IntegrityError
from sim.pools.block_pool import BlockPool, OutOfBlocks
from sim.pools.free_queue import FreeQueue

UNASKED = -1
"""Key of content that nobody will ever ask for: it keeps the block's place in the queue, and is not found."""


class Unnamed(int):
    """No references, of full blocks whose content nobody can ask for yet: they stand at the tail, and are not found.

    Who left them may name them later, as long as they have not been handed out again (`PrefixPool.name`).
    """

    __slots__ = ()


class PrefixPool(BlockPool):
    """Blocks that can be found again by a key of their content, free or held, as in vLLM V1 (`block_pool.py`).

    Blocks are handed out from the head of a queue, in which free blocks stand whether they hold something or
    not; there a block loses its key, and that is the whole eviction. A hit takes a block out of the middle of
    the queue. Freed blocks with a key go to the tail. Those without go to the head (vLLM of 2026), or to the
    tail too (`keyless_first=False`, vLLM 0.10.0). The same content may be in several blocks; the one that
    was registered first is found, or with `newest_found` only the one that was registered last (nano-vllm).
    """

    __slots__ = ("_found", "changes", "keyless_first", "keys", "newest_found", "num_keyed")

    free: FreeQueue  # type: ignore[assignment]  # instead of a stack

    def __init__(
        self,
        num_blocks: int,
        tier: str = "device",
        *,
        keyless_first: bool = True,
        newest_found: bool = False,
    ) -> None:
        super().__init__(num_blocks, tier)
        self.free = FreeQueue(range(num_blocks))
        self.keyless_first = keyless_first
        self.newest_found = newest_found
        self.keys: list[Hashable | None] = [None] * num_blocks
        self.num_keyed = 0  # blocks that carry a key, free or held
        self.changes = 0  # goes up whenever another block may be found than before
        self._found: dict[Hashable, int | list[int]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, those with content included."""
        return self.free.size

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.free.size

    def find(self, key: Hashable) -> int | None:
        """The block with this content, the first registered of several; None if there is none."""
        found = self._found.get(key)
        return found if found is None or isinstance(found, int) else found[0]

    def find_leading(self, keys: Iterable[Hashable]) -> list[int]:
        """The blocks with these contents up to the first that is not there."""
        blocks = []
        for key in keys:
            found = self._found.get(key)
            if found is None:
                break
            blocks.append(found if isinstance(found, int) else found[0])
        return blocks

    def unreferenced(self, blocks: Sequence[int]) -> int:
        """How many of the blocks stand in the free queue."""
        references = self.references
        return sum(not references[block] for block in blocks)

    def take(self, count: int = 1) -> list[int]:
        """Hand out the `count` blocks at the head of the queue. Raises OutOfBlocks and takes none if too few."""
        free = self.free
        if count > free.size:
            raise OutOfBlocks(f"asked for {count} blocks, {free.size} of {self.num_blocks} are free")
        blocks = free.take(count)
        references = self.references
        for block in blocks:
            references[block] = 1
        if self.num_keyed:
            self._forget_keys(blocks)
        if self.fresh is not None:
            for block in blocks:
                self.fresh[block] = 1
        return blocks

    def _forget_keys(self, blocks: Iterable[int]) -> None:
        keys, found = self.keys, self._found
        forgotten = 0
        for block in blocks:
            key = keys[block]
            if key is not None:
                keys[block] = None
                forgotten += 1
                if (
                    found
                    and key != UNASKED
                    and (there := found.pop(key, None)) != block
                    and there is not None
                ):
                    found[key] = there
                    self._forget(block, key)
        self.num_keyed -= forgotten
        self.changes += forgotten

    def touch(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of these blocks, with what they hold; free ones leave the queue."""
        references = self.references
        for block in blocks:
            if references[block]:
                self.extra_references += 1
            else:
                self.free.remove(block)
            references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block; those without any are free again, in this order. Raises ValueError."""
        references, keys, keyless_first = self.references, self.keys, self.keyless_first
        head, tail = [], []
        for block in blocks:
            count = references[block]
            if count != 1:
                if count == 0:
                    raise ValueError(f"double free of block {block}")
                references[block] = count - 1
                self.extra_references -= 1
                continue
            references[block] = 0
            if keyless_first and keys[block] is None:
                head.append(block)
            else:
                tail.append(block)
        if head:
            self.free.put_first(head)
        if tail:
            self.free.put_last(tail)

    def requeue(self, blocks: Iterable[int]) -> None:
        """Move those of the blocks that queue up at the tail behind all others, in this order."""
        for block in blocks:
            references = self.references[block]
            keyless = self.keys[block] is None and not isinstance(references, Unnamed)
            if not references and not (self.keyless_first and keyless):
                self.free.remove(block)
                self.free.put_last((block,))

    def name(self, blocks: Iterable[int], mark: Unnamed, keys: Iterable[Hashable]) -> None:
        """Let those of the blocks be found that still have this mark; of a block given twice the later key counts."""
        for block, key in reversed([*zip(blocks, keys, strict=False)]):
            if self.references[block] is mark and self.keys[block] is None:
                self.register(block, key)

    def register(self, block: int, key: Hashable) -> None:
        """Let the block be found by the key of its content."""
        if self.keys[block] is not None:
            raise ValueError(f"block {block} is registered already, as {self.keys[block]!r}")
        self.keys[block] = key
        self.num_keyed += 1
        self.changes += 1
        if self.newest_found:
            self._found[key] = block
            return
        found = self._found.setdefault(key, block)
        if isinstance(found, list):
            found.append(block)
        elif found != block:
            self._found[key] = [found, block]

    def register_table(self, blocks: Sequence[int], keys: Sequence[Hashable]) -> None:
        """`register` for those of a table's blocks that have no key yet; they are behind all others."""
        known, found = self.keys, self._found
        first = bisect_left(
            blocks, True, 0, min(len(blocks), len(keys)), key=lambda block: known[block] is None
        )
        registered = 0
        for block, key in zip(blocks[first:], keys[first:], strict=False):
            if known[block] is None:
                if found.setdefault(key, block) != block:
                    self.register(block, key)
                    continue
                known[block] = key
                registered += 1
        self.num_keyed += registered
        self.changes += registered

    def mark_full(self, blocks: Sequence[int]) -> None:
        """Give the blocks behind the last that has a key one that is never found."""
        keys = self.keys
        for block in reversed(blocks):
            if keys[block] is not None:
                break
            keys[block] = UNASKED
            self.num_keyed += 1

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the keys of held blocks."""
        for block in blocks:
            key, self.keys[block] = self.keys[block], None
            if key is None:
                continue
            self.num_keyed -= 1
            self.changes += 1
            if self._found.get(key) == block:
                del self._found[key]
            else:
                self._forget(block, key)

    def leave_table(self, blocks: list[int], full: int) -> None:
        """Drop a reference to each block of a table, the last one first; the first `full` of them queue up at the tail.

        Those of them without a key hold what nobody will ask for. Raises ValueError on a double free.
        """
        filled = blocks[full - 1 :: -1] if full > 0 else []
        if full < len(blocks):
            self.release(blocks[: max(0, full) - len(blocks) - 1 : -1])
        self.leave(filled)

    def leave(self, blocks: list[int], mark: int = 0) -> None:
        """Drop a reference to each of these full blocks, which queue up at the tail in this order, with that mark.

        Raises ValueError on a double free.
        """
        references = self.references
        if self.extra_references:
            shared = [block for block in blocks if references[block] > 1]
            blocks = [block for block in blocks if references[block] <= 1]
            self.unshare(shared, 1)
        for block in blocks:
            if references[block] == 0:
                raise ValueError(f"double free of block {block}")
            references[block] = mark
        self.free.put_last(blocks)

    def _forget(self, block: int, key: Hashable) -> None:
        found = self._found.get(key)
        if isinstance(found, list) and block in found:
            found.remove(block)
            if len(found) == 1:
                (self._found[key],) = found

    def forget_all(self) -> bool:
        """Forget all contents, if no block is held; whether that was so."""
        if len(self.free) < self.num_blocks:
            return False
        self.keys = [None] * self.num_blocks
        self.num_keyed = 0
        self.changes += 1
        self._found.clear()
        return True

    def _num_hidden(self) -> int:
        """Blocks with a key that cannot be found by it, but for those whose content nobody will ask for; a recount."""
        return 0

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """The counts against the tables, and the keys against what is found. Raises IntegrityError."""
        super().check_integrity(tables)
        found = [
            (block, key)
            for key, blocks in self._found.items()
            for block in (blocks if isinstance(blocks, list) else (blocks,))
        ]
        for block, key in found:
            if self.keys[block] != key:
                raise IntegrityError(f"block {block} is found as {key!r}, and holds {self.keys[block]!r}")
        keyed = self.num_blocks - self.keys.count(None)
        known = keyed - self.keys.count(UNASKED) - self._num_hidden()
        if keyed != self.num_keyed or (len(found) != known and not self.newest_found):
            raise IntegrityError(
                f"found({len(found)}) != blocks to be found({known}), or {self.num_keyed} != keyed({keyed})"
            )
