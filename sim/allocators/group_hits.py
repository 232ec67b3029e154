"""Cached prefixes where layers are of several kinds: what is found has to be found in every group of them."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Ordered
from itertools import cycle, takewhile

from sim.allocators.window_edge import NULL
from sim.pools.prefix_pool import PrefixPool
from sim.prefixes.keys import prefix_keys
from sim.request import Request
from sim.tiers.run_index import Piece
from sim.tiers.tiered_store import TieredStore

Hit = tuple[int, Ordered[list[int]]]
"""Tokens of a cached prefix, and its blocks in every group; no lists where nothing was looked for."""

AWAY = -2
"""Among the blocks of a hit: one that is not on the device, but in a tier behind it."""


class GroupHits:
    """Looks for prefixes in a pool whose blocks are known by (content, group), as vLLM V1's hybrid coordinator.

    Each group of layers sees all tokens (window None) or a sliding window. Groups that see alike are asked together,
    those that see all first, until no kind shortens what the others found (`kv_cache_coordinator.py`).
    """

    def __init__(
        self, pool: PrefixPool, block_size: int, windows: Ordered[int | None], *, caching: bool = True
    ) -> None:
        self.pool = pool
        self.caching = caching
        self.block_size = block_size
        self.store: TieredStore | None = None  # tiers behind the pool, which are looked into as well
        self.declined = 0  # tokens of the last hit that tiers have, and are cheaper to compute
        self.num_groups = len(windows)
        self.counted = windows.index(None) if None in windows else 0  # the group whose hits are counted
        kinds = sorted(set(windows), key=lambda window: (window is not None, window))
        self._kinds = [
            (window, [group for group, each in enumerate(windows) if each == window]) for window in kinds
        ]

        self._head: tuple[Request | None, Ordered[int]] = None, []  # the last request asked for, and its keys
        self._hit: tuple[Request | None, int, int, Hit] = None, 0, 0, (0, [])  # and when what was found of it
        self._choices: list[tuple[Hit, list[Piece]]] = []  # how much of that to load, and what

    def keys(self, request: Request, num_tokens: int) -> Ordered[int]:
        """Keys of the full blocks; none for a request whose content nobody can have."""
        if not self.caching or (not request.content and not request.preemptions):
            return []
        blocks = num_tokens // self.block_size
        known, keys = self._head
        if known is not request or len(keys) != blocks:
            keys = prefix_keys(request, blocks, self.block_size)
            self._head = request, keys
        return keys

    def find(self, request: Request, num_tokens: int) -> Hit:
        """What all groups find; remembered for whom it was asked last, until others can be found."""
        if not request.content and not request.preemptions:
            return 0, []
        known, tokens, changes, hit = self._hit
        store, now = self.store, self.pool.changes
        if store is not None:
            store.settle()
            now += store.index.changes
        if known is not request or tokens != num_tokens or changes != now:
            keys = self.keys(request, num_tokens)
            hit = self.longest(keys, num_tokens) if keys else (0, [])
            self._hit = request, num_tokens, now, hit
            self._choices = []
        if store is None or store.cost is None or not any(AWAY in blocks for blocks in hit[1]):
            self.declined = 0
            return hit
        if not self._choices:
            self._choices = self._find_choices(store, self.keys(request, num_tokens), num_tokens, hit)
        costs = [(each[0], pieces) for each, pieces in self._choices]
        chosen, _ = self._choices[store.cheapest(request, costs)]
        self.declined = hit[0] - chosen[0]
        return chosen

    def _find_choices(
        self, store: TieredStore, keys: Ordered[int], num_tokens: int, hit: Hit
    ) -> list[tuple[Hit, list[Piece]]]:
        """What to load of a hit: nothing, up to where the next block that is counted is in another tier, all of it."""
        self.store = None
        hits: list[Hit] = [self.longest(keys, num_tokens)]
        self.store = store
        if len(store.tiers) > 1:
            loads = self.loads(keys, hit[1][self.counted], self.counted)
            tiers = {at: store.index.tier(key) for key, at in loads}
            cuts = [at + 1 for at, tier in tiers.items() if tiers.get(at + 1) is not tier]
            hits += [self.longest(keys[:cut], num_tokens) for cut in cuts]
        choices: list[tuple[Hit, list[Piece]]] = []
        for each in [*hits, hit]:
            if not choices or each[0] > choices[-1][0][0]:
                pieces: list[Piece] = []
                for group, blocks in enumerate(each[1]):
                    pieces += store.index.pieces([key for key, _ in self.loads(keys, blocks, group)])
                choices.append((each, pieces))
        return choices

    def loads(
        self, keys: Ordered[Hashable], blocks: list[int], group: int
    ) -> list[tuple[tuple[Hashable, int], int]]:
        """Of the blocks of a hit in one group those that are in tiers, by their keys, and where they stand."""
        return [((keys[at], group), at) for at, block in enumerate(blocks) if block == AWAY]

    def forget(self) -> None:
        """The last request has been served."""
        self._head = None, []

    def longest(self, keys: Ordered[Hashable], num_tokens: int) -> tuple[int, list[list[int]]]:
        """Tokens of the longest cached prefix of a request with so many, and the blocks per group.

        At least one token is left to compute. `keys` names the content of the request's full blocks.
        """
        blocks: list[list[int]] = [[] for _ in range(self.num_groups)]
        length = min(len(keys), (num_tokens - 1) // self.block_size)
        agreed = 0  # kinds that have as much, one after the other
        for window, groups in cycle(self._kinds):
            if window is not None:
                found = self._hit_window(keys, length, groups, window)
            elif blocks[groups[0]]:  # once is enough: every shorter prefix is there too
                found = [blocks[group][:length] for group in groups]
            else:
                found = self._hit_whole(keys, length, groups)
            for group, each in zip(groups, found, strict=True):
                blocks[group] = each
            agreed = agreed + 1 if len(found[0]) == length else 1
            length = len(found[0])
            if agreed == len(self._kinds):
                break
        return length * self.block_size, [each[:length] for each in blocks]

    def _find(self, key: tuple[Hashable, int]) -> int | None:
        """The block with this content in this group, None if it is nowhere."""
        block = self.pool.find(key)
        if block is None and self.store is not None and self.store.index.get(key) is not None:
            return AWAY
        return block

    def _hit_whole(self, keys: Ordered[Hashable], length: int, groups: list[int]) -> list[list[int]]:
        hits: list[list[int]] = []
        for group in groups:
            asked = [(key, group) for key in keys[:length]]
            blocks = self.pool.find_leading(asked)
            if self.store is not None:
                behind = map(self._find, asked[len(blocks) :])
                blocks += takewhile(lambda block: block is not None, behind)  # type: ignore[arg-type]
            hits.append(blocks)
            length = len(blocks)
        return [blocks[:length] for blocks in hits]

    def _hit_window(
        self, keys: Ordered[Hashable], length: int, groups: list[int], window: int
    ) -> list[list[int]]:
        """From the right: the last run of blocks that fills a window, else the run at the very start."""
        wanted = -(-(window - 1) // self.block_size)
        hits = [[NULL] * length for _ in groups]
        rows = [*zip(groups, hits, strict=True)]
        find = self.pool.find if self.store is None else self._find
        run = 0
        for index in range(length - 1, -1, -1):
            key = keys[index]
            for group, hit in rows:
                block = find((key, group))
                if block is None:
                    run = 0
                    break
                hit[index] = block
            else:
                run += 1
                if run >= wanted:
                    return [hit[: index + run] for hit in hits]
        return [hit[:run] for hit in hits]
