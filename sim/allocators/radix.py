"""Prefix caching in a radix tree: SGLang."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from sim.allocators.base import allocator
from sim.allocators.caching import CachingAllocator
from sim.allocators.capacity import Capacity
from sim.eviction import Eviction, belady, lru
from sim.eviction import eviction as evictions
from sim.foresight import Foresight
from sim.offloading_pools import OffloadingPagePool
from sim.page_pool import PagePool
from sim.prefix_keys import prefix_keys, sequence_keys
from sim.radix_tree import Node, RadixTree
from sim.registry import Bounds, PositiveInt
from sim.request import Request, Sequence
from sim.tiered_store import TieredStore


@allocator("radix")
class RadixAllocator(CachingAllocator):
    """Pages in a tree of prefixes, as in SGLang's RadixAttention (Zheng et al., NeurIPS 2024).

    A prompt enters the tree when it is computed, a finished request with all that it generated; what the tree
    has already is given back, so that nothing is cached twice. Requests lock what they use; leaves that nobody
    uses are evicted whole when pages run out. A preempted request keeps only what is in the tree, as SGLang's
    retraction does. Asking whether a request fits counts as no use of what it would find.

    Fields:
        block_size: KV slots per page.
        watermark: Share of the pages that an admission leaves free while others run.
        eviction: Which leaf goes first; belady takes what is asked for last in the whole workload, page by page.
    """

    can_offload = True
    pool: PagePool
    refresh: Literal["whole", "visited"] = "visited"

    def __init__(
        self,
        capacity: Capacity,
        *,
        block_size: PositiveInt = 1,
        watermark: Annotated[float, Bounds(ge=0, lt=1)] = 0.0,
        eviction: Annotated[Eviction, evictions] = lru,
    ) -> None:
        super().__init__(capacity, block_size, watermark)
        self.tree = RadixTree(eviction=eviction, refresh=self.refresh)
        self.foresees = eviction is belady
        self.pool = PagePool(self.num_blocks, self.tree)
        self._nodes: dict[Sequence, Node] = {}  # where a sequence's part of the tree ends
        self._shared: dict[Sequence, int] = {}  # pages up to there
        self._head: tuple[Request | None, list[int]] = None, []  # the last request asked for, and its keys

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """What depends on answers is not known beforehand."""
        workload = config["workload"]
        closed = (workload.get("arrivals") or {}).get("kind") == "closed_loop"
        if config["allocator"].get("eviction") == {"kind": "belady"} and (closed or workload.get("session")):
            what = "a closed loop sends" if closed else "sessions send"
            yield (
                "allocator.eviction",
                f"belady knows all requests beforehand, and what {what} depends on answers",
            )

    def foresee(self, requests: Iterable[Request]) -> None:
        """Know which content will be asked for."""
        self.tree.foresight = Foresight(requests, self.block_size)

    def open_tiers(self, tiers: TieredStore) -> None:
        """Tell the tiers of every page that enters the tree, and of what is evicted."""
        self.tiers = tiers
        tiers.block_size = self.block_size
        self.pool = self._named = OffloadingPagePool(self.num_blocks, self.tree, tiers)
        tiers.device_keys = self._named.keys

    def _keys(self, request: Request, num_tokens: int) -> list[int]:
        """Keys of the pages that may be found: not the last token's."""
        pages = (num_tokens - 1) // self.block_size
        known, keys = self._head
        if known is not request or len(keys) != pages:
            keys = prefix_keys(request, pages, self.block_size)
            self._head = request, keys
        return keys

    def cached(self, request: Request, num_tokens: int) -> tuple[int, int]:
        """The pages that a match would give, and how many of them nobody has locked."""
        if not request.content and not request.preemptions:
            return 0, 0
        return self.tree.peek(self._keys(request, num_tokens))

    def hold(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Match and lock."""
        request = sequence.request
        foresight = self.tree.foresight
        if foresight is not None and request.id > foresight.now:
            foresight.now = request.id
        keys = self._keys(request, num_tokens)
        if sequence.lineage is not None:
            keys = sequence_keys(sequence, len(keys), self.block_size)
        pages, node = self.tree.match(keys, request.priority)
        shared = len(pages)
        first, whole = request.sequences[0], request.prompt_tokens // self.block_size
        if (
            first in self.sequences and shared < whole
        ):  # a branch of a group that comes back: not in the tree yet
            pages, node, shared = first.block_table[:whole], self._nodes[first], self._shared[first]
        self.tree.lock(node)
        self.pool.touch(pages)
        self._nodes[sequence] = node
        self._shared[sequence] = min(shared, len(pages))
        self._head = None, []
        return pages

    def held(self, sequence: Sequence, num_tokens: int) -> None:
        """Nothing is found before it is computed."""

    def computed(self, sequence: Sequence) -> None:
        """Enter the prompt into the tree, unless the whole sequence is entered next."""
        if sequence.num_tokens < sequence.final_tokens:
            self._enter(sequence, lives=True)

    def finished(self, sequence: Sequence) -> None:
        """Enter all that was computed."""
        self._enter(sequence, lives=False)

    def _enter(self, sequence: Sequence, lives: bool) -> None:
        """Enter the full pages; those that are there already take the place of the sequence's own."""
        shared, table = self._shared[sequence], sequence.block_table
        full = sequence.num_tokens // self.block_size
        keys = sequence_keys(sequence, full, self.block_size)
        known, node = self.tree.insert(keys, table, sequence.request.priority)
        self.pool.keep(table[known:full])
        if self.tiers is not None and known < full:
            self._named.name(keys[known:], table[known:full], known)
            self.tiers.found(sequence, [*keys[known:]], table[known:full])
        self.tree.lock(node)
        self.tree.unlock(self._nodes[sequence])
        self._nodes[sequence], self._shared[sequence] = node, full
        if known > shared:
            if lives and self.probe is not None:
                self.probe.write(sequence)
            theirs = [page for each in reversed([*self.tree.path(node)]) for page in each.pages][shared:known]
            references = self.pool.references
            # A page that nobody else has is given up; what a branch of its own has entered is the same page.
            pairs = [
                (own, other) for own, other in zip(table[shared:known], theirs, strict=True) if own != other
            ]
            spared = sum([(references[own] == 1) - (references[other] == 0) for own, other in pairs])
            self.pool.touch(theirs)
            self.revive(theirs)
            self.pool.release(table[shared:known])
            table[shared:known] = theirs
            self.num_held -= spared * self.block_size
            self.num_tokens -= spared * self.block_size
        for branch in sequence.request.sequences if len(sequence.request.sequences) > 1 else ():
            if branch is not sequence and branch in self._nodes:
                self._lock_common(branch, table, keys)

    def _lock_common(self, branch: Sequence, table: list[int], keys: list[int]) -> None:
        """Let a branch hold what is in the tree now of the pages that it shares with another branch's table."""
        common = self._shared[branch]
        for own, other in zip(branch.block_table[common:], table[common : len(keys)], strict=False):
            if own != other:
                break
            common += 1
        if common > self._shared[branch]:
            _, node = self.tree.match(keys[:common])
            self.tree.lock(node)
            self.tree.unlock(self._nodes[branch])
            self._nodes[branch], self._shared[branch] = node, common

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share every page of the parent, and lock its part of the tree once more."""
        super().fork(parent, child)
        self._nodes[child] = node = self._nodes[parent]
        self._shared[child] = self._shared[parent]
        self.tree.lock(node)

    def release(self, sequence: Sequence) -> None:
        """Unlock; what is not in the tree is free."""
        self.pool.release(sequence.block_table)
        self.tree.unlock(self._nodes.pop(sequence))
        del self._shared[sequence]
