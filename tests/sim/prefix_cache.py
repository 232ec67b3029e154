"""A prefix cache of one or several layer groups: who holds which blocks, what is found, when a request is refused."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Ordered

from sim.pools.prefix_pool import PrefixPool

NULL = -1
"""In a block table: nothing, as the block fell out of the window. It is no block of the pool."""


class Holding:
    """What one request holds: a block table per group, with the number of leading blocks that are registered."""

    __slots__ = ("computed", "registered", "tables")

    def __init__(self, num_groups: int) -> None:
        self.computed = 0  # tokens that have their slots
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.registered = [0] * num_groups


class PrefixCache:
    """The rules of vLLM V1's `KVCacheManager` over one pool (`kv_cache_manager.py`, `kv_cache_coordinator.py`).

    Each group of layers keeps a table of its own: over all tokens (window None), or over a sliding window,
    whose blocks return once the window has passed them. Full blocks are registered under the key of their
    content when their slots are granted; a request is refused on the sum over all groups, with hits that
    stand in the free queue counted as needed. `keyless_first` and `newest_found` are the pool's (see PrefixPool).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        windows: Ordered[int | None] = (None,),
        caching: bool = True,
        watermark_blocks: int = 0,
        keyless_first: bool = True,
        newest_found: bool = False,
    ) -> None:
        self.pool = PrefixPool(num_blocks, keyless_first=keyless_first, newest_found=newest_found)
        self.block_size = block_size
        self.windows = list(windows)
        self.caching = caching
        self.watermark_blocks = watermark_blocks
        kinds = sorted(set(windows), key=lambda window: (window is not None, window))
        self._kinds = [
            (window, [group for group, each in enumerate(windows) if each == window]) for window in kinds
        ]

    def hit(self, keys: Ordered[Hashable], num_tokens: int) -> tuple[int, list[list[int]]]:
        """Tokens of the longest cached prefix of a request with so many, and the blocks per group.

        At least one token is left to compute. `keys` names the content of the request's full blocks.
        """
        blocks: list[list[int]] = [[] for _ in self.windows]
        if not self.caching:
            return 0, blocks
        length = min(len(keys), (num_tokens - 1) // self.block_size)
        while True:
            before = length
            for window, groups in self._kinds:
                if window is not None:
                    found = self._hit_window(keys, length, groups, window)
                elif blocks[groups[0]]:  # once is enough: every shorter prefix is there too
                    found = [blocks[group][:length] for group in groups]
                else:
                    found = self._hit_whole(keys, length, groups)
                for group, each in zip(groups, found, strict=True):
                    blocks[group] = each
                length = len(found[0])
            if length == before or len(self._kinds) == 1:
                return length * self.block_size, [each[:length] for each in blocks]

    def _found(self, key: Hashable, groups: list[int]) -> list[int] | None:
        """The block with this content in each of the groups; None unless it is in all of them."""
        blocks = []
        for group in groups:
            block = self.pool.find((key, group))
            if block is None:
                return None
            blocks.append(block)
        return blocks

    def _hit_whole(self, keys: Ordered[Hashable], length: int, groups: list[int]) -> list[list[int]]:
        hits: list[list[int]] = [[] for _ in groups]
        for key in keys[:length]:
            found = self._found(key, groups)
            if found is None:
                break
            for hit, block in zip(hits, found, strict=True):
                hit.append(block)
        return hits

    def _hit_window(
        self, keys: Ordered[Hashable], length: int, groups: list[int], window: int
    ) -> list[list[int]]:
        """From the right: the last run of blocks that fills a window, else the run at the very start."""
        wanted = -(-(window - 1) // self.block_size)
        hits = [[NULL] * length for _ in groups]
        run = 0
        for index in range(length - 1, -1, -1):
            found = self._found(keys[index], groups)
            if found is None:
                run = 0
                continue
            for hit, block in zip(hits, found, strict=True):
                hit[index] = block
            run += 1
            if run >= wanted:
                return [hit[: index + run] for hit in hits]
        return [hit[:run] for hit in hits]

    def allocate(
        self,
        holding: Holding,
        num_new: int,
        keys: Ordered[Hashable],
        *,
        hits: Ordered[list[int]] | None = None,
        watermark: bool = False,
        whole: int = 0,
        batched: int = 0,
    ) -> bool:
        """Give a request slots for `num_new` more tokens behind those it has and its hits; False if refused.

        `watermark` keeps the watermark free, as for requests that wait while others run. With `whole` the
        request is refused too unless so many tokens fit now, `batched` in a step (`scheduler_reserve_full_isl`).
        `keys` names the content of all blocks that the request fills.
        """
        size = self.block_size
        hits = [[] for _ in self.windows] if hits is None else hits
        computed = holding.computed + len(hits[0]) * size
        total = computed + num_new
        for window, table in zip(self.windows, holding.tables, strict=True):
            if window is not None:
                self._leave(table, computed, window)
        spare = len(self.pool.free) - (self.watermark_blocks if watermark else 0)
        if self.needed(holding.tables, hits, total) > spare:
            return False
        if whole and self.needed(holding.tables, hits, whole, batched) > spare:
            return False
        for group, hit in enumerate(hits):
            self.pool.touch([block for block in hit if block != NULL])
            holding.tables[group] += hit
            holding.registered[group] += len(hit)
        for table in holding.tables:
            table += self.pool.take(max(0, -(-total // size) - len(table)))
        if self.caching:
            self.register(holding, keys[: total // size])
        holding.computed = total
        return True

    def _leave(self, table: list[int], computed: int, window: int) -> None:
        """Give back the blocks that no token from `computed` on looks at, the deepest first."""
        left = []
        for index in range(min(max(0, computed - window + 1) // self.block_size, len(table)) - 1, -1, -1):
            if table[index] == NULL:
                break
            left.append(table[index])
            table[index] = NULL
        self.pool.release(left)

    def needed(
        self,
        tables: Ordered[list[int]],
        hits: Ordered[list[int]],
        total: int,
        step: int | None = None,
    ) -> int:
        """Blocks that a request with `total` tokens takes out of the queue beside its tables, hits among them.

        For a gate on whole prompts, of which a step computes `step` tokens at most, a windowed group asks for no more
        than its window ever holds (`SlidingWindowSpec.max_admission_blocks_per_request`).
        """
        needed = 0
        for window, table, hit in zip(self.windows, tables, hits, strict=True):
            blocks = -(-total // self.block_size)
            if step is not None and window is not None:
                blocks = min(blocks, -(-(window - 1 + step) // self.block_size) + 1)
            needed += max(0, blocks - len(table) - len(hit))
            needed += self.pool.unreferenced([block for block in hit if block != NULL])
        return needed

    def register(self, holding: Holding, keys: Ordered[Hashable]) -> None:
        """Let the leading blocks of a request be found by these keys, as far as they are not yet."""
        for group, table in enumerate(holding.tables):
            for index in range(holding.registered[group], len(keys)):
                if table[index] != NULL:
                    self.pool.register(table[index], (keys[index], group))
            holding.registered[group] = max(holding.registered[group], len(keys))

    def release(self, holding: Holding) -> None:
        """Take everything back, in each group the deepest block first."""
        for table in holding.tables:
            self.pool.release([block for block in reversed(table) if block != NULL])
            table.clear()
        holding.registered = [0] * len(self.windows)
        holding.computed = 0
