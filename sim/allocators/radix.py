"""Prefix caching in a radix tree: SGLang."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Ordered
from itertools import chain, islice, repeat
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import allocator
from sim.allocators.blocks import count_growth
from sim.allocators.caching import CachingAllocator
from sim.allocators.capacity import Capacity
from sim.allocators.counted_group import CountedGroup
from sim.pools.page_pool import PagePool
from sim.prefixes.eviction import Eviction, belady, lru
from sim.prefixes.eviction import eviction as evictions
from sim.prefixes.foresight import Foresight
from sim.prefixes.keys import own_keys, prefix_keys, sequence_keys
from sim.prefixes.radix_tree import Node, RadixTree
from sim.registry import Bounds, PositiveInt
from sim.request import Request, Sequence, one_priority
from sim.tiers.offloading_pools import OffloadingPagePool
from sim.tiers.tiered_store import TieredStore

_MANY = 1024


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

    counts_beams = True
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
        self._asked: dict[Request, Ordered[int]] = {}  # keys of requests that wait
        self._branches: set[Sequence] = set()  # of groups; their tables are always complete
        self.grows_steadily = block_size == 1

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """What depends on answers is not known beforehand."""
        workload = config["workload"]
        if config["allocator"].get("eviction") == {"kind": "priority"} and one_priority(workload):
            yield "allocator.eviction", "all requests have the same priority: set workload.priorities"
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

    def _keys(self, request: Request, num_tokens: int) -> Ordered[int]:
        """Keys of the pages that may be found: not the last token's."""
        pages = (num_tokens - 1) // self.block_size
        keys = self._asked.get(request)
        if keys is None or len(keys) < pages:
            if len(self._asked) == _MANY:
                self._asked.clear()
            self._asked[request] = keys = prefix_keys(request, pages, self.block_size)
        return keys[:pages]

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
        pages, node = self.tree.match(keys, -request.priority)
        shared = len(pages)
        first, whole = request.sequences[0], request.prompt_tokens // self.block_size
        if (
            first in self.sequences and shared < whole
        ):  # a branch of a group that comes back: not in the tree yet
            pages, node, shared = first.block_table[:whole], self._nodes[first], self._shared[first]
            self.pool.share(pages[shared:])
        self.tree.lock(node)
        if len(request.sequences) > 1:
            self._branches.add(sequence)
        self._nodes[sequence] = node
        self._shared[sequence] = min(shared, len(pages))
        self._asked.pop(request, None)
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
        self.list_blocks(sequence)
        shared, table, pool = self._shared[sequence], sequence.block_table, self.pool
        full = sequence.num_tokens // self.block_size
        alone = len(sequence.request.sequences) == 1
        if alone:
            keys = sequence_keys(sequence, full, self.block_size, shared)  # those before stand in the tree
        else:
            keys = sequence_keys(sequence, full, self.block_size)
            full = self._enterable(sequence, keys)
            keys = keys[shared:full]
        free = pool.num_free
        found, node = self.tree.insert(
            keys, table, -sequence.request.priority, self._nodes[sequence], begin=shared, lock=True
        )
        known = shared + found
        pool.keep(table, known, full)
        if self.tiers is not None and known < full:
            self._named.name(keys[found:], table[known:full], known)
            self.tiers.found(sequence, [*keys[found:]], table[known:full])
        self.tree.unlock(self._nodes[sequence])
        self._nodes[sequence], self._shared[sequence] = node, full
        if known > shared:
            theirs = [page for each in reversed([*self.tree.path(node)]) for page in each.pages][shared:known]
            own, table[shared:known] = table[shared:known], theirs
            self.revive(sequence, table[:known], shared)
            if lives and self.probe is not None:
                self.probe.write(sequence)
            # What a branch of its own has entered is the same page.
            pool.release([page for page, other in zip(own, theirs, strict=True) if page != other])
            spared = (pool.num_free - free) * self.block_size  # in pages that nobody has now
            self.num_held -= spared
            self.num_tokens -= spared
        for branch in () if alone else sequence.request.sequences:
            if branch is not sequence and branch in self._nodes:
                self._lock_common(sequence, branch)

    def _enterable(self, sequence: Sequence, keys: Ordered[int]) -> int:
        """How many pages of a branch, which have these keys, may be in the tree.

        Pages that another branch shares behind some for which the tree has others stay out, as that branch keeps its
        own and has not locked what is there; it enters them itself.
        """
        shared, known = self._shared[sequence], self.tree.peek(keys)[0]
        if shared < known < len(keys) and self.pool.count(sequence.block_table[known]) > 1:
            return known
        return len(keys)

    def _lock_common(self, entered: Sequence, branch: Sequence) -> None:
        """Let a branch hold what is in the tree now of the pages that it shares with one that was entered."""
        table, full, common = entered.block_table, self._shared[entered], self._shared[branch]
        for own, other in zip(branch.block_table[common:], table[common:full], strict=False):
            if own != other:
                break
            common += 1
        if common > self._shared[branch]:
            node = self.tree.match_above(self._nodes[entered], full - common)
            self.tree.lock(node)
            self.tree.unlock(self._nodes[branch])
            self._nodes[branch], self._shared[branch] = node, common

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share every page of the parent, and lock its part of the tree once more."""
        self.list_blocks(parent)
        super().fork(parent, child)
        self._branches.update((parent, child))
        self._nodes[child] = node = self._nodes[parent]
        self._shared[child] = self._shared[parent]
        self.tree.lock(node)

    def release(self, sequence: Sequence) -> None:
        """Unlock; what is not in the tree is free."""
        self.list_blocks(sequence)
        self.pool.release(sequence.block_table[self._shared.pop(sequence) :])
        self.tree.unlock(self._nodes.pop(sequence))
        self._branches.discard(sequence)

    # Tables that are behind

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """One more page for each sequence of each batch; which it is shows when somebody looks."""
        branches = self._branches
        behind = [each for _, grown in batches for each in grown if each in branches] if branches else ()
        books = count_growth(self, self.pool, batches)
        for sequence in behind:
            self.list_blocks(sequence)
        return books

    def grow_steadily(self, count: int, first: int, ticks: int) -> list[tuple[int, int, int]]:
        """Pages of one token."""
        self.pool.owe(count * ticks)
        held = self.num_held
        self.num_held += count * ticks
        return [(first + tick, held + count * (tick + 1), self.num_internal) for tick in range(ticks)]

    def list_blocks(self, sequence: Sequence) -> None:
        """Draw the pages that the sequence has been given since somebody last looked."""
        missing = sequence.capacity // self.block_size - len(sequence.block_table)
        if missing > 0:
            if sequence.request.counted is not None:
                self.list_beams(sequence.request)
            else:
                sequence.block_table += self.pool.draw(missing)

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Append the pages that the table lacks."""
        self.list_blocks(sequence)
        return super().reserve(sequence, num_tokens)

    def slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Block table times block size plus offset, shape [num_tokens]."""
        self.list_blocks(sequence)
        return super().slots(sequence)

    # Beams that are counted

    def share_prompt(self, parent: Sequence, others: Ordered[Sequence]) -> int:
        """Lock the prompt's part of the tree once more for each."""
        self.list_blocks(parent)
        node, shared = self._nodes[parent], self._shared[parent]
        for beam in others:
            self._nodes[beam], self._shared[beam] = node, shared
            self.tree.lock(node)
        self._branches.update((parent, *others))
        return shared

    def forget(self, blocks: list[int]) -> bool:
        """A group that is computed again is in the tree with more than its prompt."""
        return False

    def leave_group(self, group: CountedGroup, blocks: list[int]) -> None:
        """Enter what the beams have generated as `finished` would, one after the other.

        Nobody asks for any of it, so keys will do that only no other page has.
        """
        tree, size, request = self.tree, self.block_size, group.request
        full, common = group.final // size, group.in_common()
        ends = [self._nodes.pop(each) for each in group.done]
        shared = [self._shared.pop(each) for each in group.done]
        self._branches.difference_update(group.done)
        for beam, node in enumerate(ends):
            keys = own_keys(request, shared[beam], full, beam + 1)
            _, end = tree.insert(keys, blocks, -request.priority, node, lock=True)
            del blocks[: len(keys)]
            tree.unlock(node)
            for other in range(beam + 1, len(ends)):
                pages = common[beam][other] // size
                if pages > shared[other]:
                    above = tree.match_above(end, full - pages)
                    tree.lock(above)
                    tree.unlock(ends[other])
                    ends[other], shared[other] = above, pages
            tree.unlock(end)
        self.pool.release(blocks)

    # Books

    def share(self, parent: Sequence) -> None:
        """One more reference to every page of the parent that is not in the tree."""
        self.pool.share(parent.block_table[self._shared[parent] :])

    def counts(self, sequence: Sequence, table: Ordered[int]) -> Iterable[int]:
        """Locks of the pages in the tree, references of the others."""
        path = reversed([*self.tree.path(self._nodes[sequence])])
        locks = chain.from_iterable([repeat(node.locks, len(node.pages)) for node in path])
        own = [self.pool.count(page) for page in table[self._shared[sequence] :]]
        return islice(chain(locks, own), len(table))
