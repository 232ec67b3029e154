"""Hit rates: how much of a trace's prompts a prefix cache of some size would find, without a server around it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from sim.prefixes.eviction import Eviction, belady
from sim.prefixes.foresight import NEVER_AGAIN

BACK_AT_ONCE = 1 << 63
"""That of a block of the request that is put in now: it may go, as it is about to come back, at no loss."""


class Entry:
    """A cached block: when it came and was used last, how often, and when it will be used next."""

    __slots__ = ("created", "next_use", "order", "priority", "used", "uses")

    def __init__(self, now: int) -> None:
        self.created = self.used = now
        self.uses = 0
        self.priority = 0
        self.next_use = NEVER_AGAIN
        self.order: tuple[int, ...] = ()  # by which it stands on the heap: never behind its true one


class BlockCache:
    """A cache of single blocks; all blocks of a request are put in, the deepest first.

    So the beginning of a prompt is younger than its end, and goes after it. Where the cache is full one block
    goes for each that comes, be it of the same request.
    """

    def __init__(self, capacity: int, eviction: Eviction) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.entries: dict[int, Entry] = {}
        self._eviction = eviction
        self._heap: list[tuple[tuple[int, ...], int]] = []
        self._clock = 0

    def leading(self, blocks: Sequence[int]) -> int:
        """How many of the blocks are there, up to the first that is not."""
        entries = self.entries
        for index, block in enumerate(blocks):
            if block not in entries:
                return index
        return len(blocks)

    def put(self, blocks: Sequence[int], next_use: Sequence[int] | None = None) -> None:
        """Use a request's blocks, and insert those that are not there; `next_use` of each, if it is known."""
        entries, heap, order = self.entries, self._heap, self._eviction
        if next_use is not None:
            for block in blocks:
                if (there := entries.get(block)) is not None:
                    there.next_use = BACK_AT_ONCE
                    there.order = order(there)
                    heapq.heappush(heap, (there.order, block))
        for index in range(len(blocks) - 1, -1, -1):
            block = blocks[index]
            self._clock += 1
            entry = entries.get(block)
            fresh = entry is None
            if entry is None:
                if len(entries) == self.capacity:
                    self._evict()
                entry = entries[block] = Entry(self._clock)
            entry.used = self._clock
            entry.uses += 1
            if next_use is not None:
                entry.next_use = next_use[index]
            now = order(entry)
            if fresh or now < entry.order:  # one that moves back is moved when it comes up
                entry.order = now
                heapq.heappush(heap, (now, block))

    def _evict(self) -> None:
        entries, heap = self.entries, self._heap
        while True:
            stood, block = heapq.heappop(heap)
            entry = entries.get(block)
            if entry is None or stood != entry.order:
                continue  # gone, or moved forward since
            now = self._eviction(entry)
            if now == stood:
                del entries[block]
                return
            entry.order = now
            heapq.heappush(heap, (now, block))


def hit_rate(requests: Sequence[Sequence[int]], capacity: int, eviction: Eviction) -> float:
    """Share of the blocks of all requests, in order, that are found as a prefix. A block is named by a number."""
    cache = BlockCache(capacity, eviction)
    hits = total = 0
    uses = next_uses(requests) if eviction is belady else [None] * len(requests)
    for blocks, following in zip(requests, uses, strict=True):
        hits += cache.leading(blocks)
        total += len(blocks)
        cache.put(blocks, following)
    return hits / total if total else 0.0


def infinite_hit_rate(requests: Iterable[Sequence[int]]) -> float:
    """`hit_rate` of a cache that forgets nothing."""
    seen: set[int] = set()
    hits = total = 0
    for blocks in requests:
        hits += next((index for index, block in enumerate(blocks) if block not in seen), len(blocks))
        total += len(blocks)
        seen.update(blocks)
    return hits / total if total else 0.0


def next_uses(requests: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each block of each request the number of the next request with it, NEVER_AGAIN if there is none."""
    following: dict[int, int] = {}
    uses = []
    for number in range(len(requests) - 1, -1, -1):
        uses.append([following.get(block, NEVER_AGAIN) for block in requests[number]])
        following.update(dict.fromkeys(requests[number], number))
    uses.reverse()
    return uses
