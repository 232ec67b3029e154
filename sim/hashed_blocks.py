"""Blocks found by the hash of all that is before them, as vLLM V0 caches prefixes."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count

from sim.block_pool import OutOfBlocks


class HashedBlock:
    """A block: who references it, what it is known as, how deep it lies in its prompt, when it was used."""

    __slots__ = ("computed", "key", "last_accessed", "num_hashed_tokens", "references")

    def __init__(self) -> None:
        self.references = 0
        self.key: Hashable = None
        self.num_hashed_tokens = 0
        self.last_accessed = -1
        self.computed = False


class HashedBlocks:
    """The rules of V0's `CachedBlockAllocator` (0.4.2, `block_manager_v1.py`, `evictor.py`).

    A block has one key, and a key one block: equal content is held once. New blocks are made until the pool is
    full; then the free block that was used longest ago is evicted, of equals the deepest. Free blocks stay
    findable until then.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.held: dict[Hashable, HashedBlock] = {}
        self.freed: dict[Hashable, HashedBlock] = {}  # in order of release
        self._made = 0
        self._nameless = count()

    @property
    def num_free(self) -> int:
        """Blocks never made, and those without a reference."""
        return self.num_blocks - self._made + len(self.freed)

    def __contains__(self, key: Hashable) -> bool:
        return key in self.held or key in self.freed

    def take(self, key: Hashable = None, num_hashed_tokens: int = 0) -> HashedBlock:
        """The block with this content, or another one for it; without a key one that is never found.

        Raises OutOfBlocks.
        """
        if key is None:
            key = ("nameless", next(self._nameless))
        if key in self.freed:
            self.held[key] = self.freed.pop(key)
        elif key not in self.held:
            block = self._fresh()
            block.key, block.num_hashed_tokens = key, num_hashed_tokens
            self.held[key] = block
        block = self.held[key]
        block.references += 1
        return block

    def _fresh(self) -> HashedBlock:
        if self._made < self.num_blocks:
            self._made += 1
            return HashedBlock()
        if not self.freed:
            raise OutOfBlocks(f"asked for a block, 0 of {self.num_blocks} are free")
        oldest = min(self.freed.values(), key=lambda block: (block.last_accessed, -block.num_hashed_tokens))
        del self.freed[oldest.key]
        oldest.computed = False
        return oldest

    def share(self, block: HashedBlock) -> None:
        """One more reference to a block that is held."""
        block.references += 1

    def release(self, block: HashedBlock) -> None:
        """One reference less; without any it is free, and stays findable. Raises ValueError on a double free."""
        if not block.references:
            raise ValueError(f"double free of the block {block.key!r}")
        block.references -= 1
        if not block.references:
            del self.held[block.key]
            self.freed[block.key] = block

    def promote(self, block: HashedBlock, key: Hashable) -> HashedBlock:
        """A block held once is full: it is known by its content now, or gives way to the one that has it."""
        if key in self:
            self.release(block)
            return self.take(key)
        del self.held[block.key]
        block.key = key
        self.held[key] = block
        return block
