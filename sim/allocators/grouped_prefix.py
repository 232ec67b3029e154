"""Prefix caching over several layer groups: vLLM V1's hybrid models."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from sim.allocators.capacity import Admission, Capacity
from sim.allocators.equal_pages import EqualPagesAllocator
from sim.allocators.group_hits import AWAY, GroupHits, Hit
from sim.allocators.window_edge import NULL, Holding
from sim.errors import UserError
from sim.layer_groups import unified_pages, windowed_pages
from sim.prefixes.keys import sequence_keys
from sim.request import Request, Sequence
from sim.tiers.offloading_pools import OffloadingQueue
from sim.tiers.tiered_store import TieredStore


class GroupedPrefixAllocator(EqualPagesAllocator):
    """`prefix` where layers are of several kinds: one pool of equal pages, a block table for each group.

    The rules are those of vLLM V1 (`kv_cache_manager.py`, `kv_cache_coordinator.py`): a hit has to be one in every
    group, a window's from its right end; a request is refused on the sum over the groups; a window gives its blocks
    back before it takes others. What is generated can be found once its request leaves, in a window also by then
    given back. No checkpoints of states are kept, so that with states nothing is cached.
    """

    can_offload = True

    def __init__(
        self,
        capacity: Capacity,
        *,
        block_size: int = 16,
        watermark: float = 0.0,
        prefix_caching: bool | None = None,
        keyless_first: bool = True,
        windows: Ordered[int | None] | None = None,
    ) -> None:
        if windows is not None:
            if not windows:
                raise UserError("windows names no group: give a window, or null, for each")
            pages = windowed_pages(windows, block_size)
            slots = capacity.num_slots * len(windows)
        else:
            pages = unified_pages(capacity.layers, block_size)
            slots = capacity.kv_bytes // pages.slot_bytes
        super().__init__(capacity, pages, slots, keyless_first=keyless_first)
        self.watermark_blocks = int(watermark * self.num_blocks)
        states = len(self.groups) - len(self.token_groups)
        self.prefix_caching = self.keeps_freed = prefix_caching is not False and not states
        self._windows = [self.groups[index].window for index in self.token_groups]
        self._cache = GroupHits(self.pool, self.block_size, self._windows, caching=self.keeps_freed)
        self._states = states
        self._unified = windows is None
        self._number = {group: number for number, group in enumerate(self.token_groups)}

    # Room

    def admission(self, request: Request, num_tokens: int) -> Admission:
        """Room for all tokens at once."""
        return self.admission_in_chunks(request, num_tokens, num_tokens)

    def admission_in_chunks(
        self, request: Request, num_tokens: int, chunk: int, first: int | None = None
    ) -> Admission:
        """Room for the sum of what all groups need: new pages, and those of the hits that nobody holds.

        A windowed group needs no more at once than its window and `chunk` tokens (`max_admission_blocks_per_request`
        of vLLM's SlidingWindowSpec), but room for the `first` ones now, which a hit may leave out of that bound. The
        watermark stays free unless nobody else runs.
        """
        tokens, hits = self._find(request, num_tokens)
        if len(request.sequences) > 1:
            rows = -(-num_tokens // self.block_size) - self.shared_rows(request)
            others = (len(request.sequences) - 1) * (rows * len(self.token_groups) + self._states)
            needed = self._needed(num_tokens, hits) + others
            if needed > self.num_blocks:
                return Admission.NEVER
            return Admission.OK if needed <= self.pool.num_free - self.kept_free else Admission.LATER
        spare = self.to_fork(request) * self._states
        needed = self._needed(num_tokens, hits, chunk) + spare
        if chunk < num_tokens:
            now = chunk if first is None else first
            needed = max(needed, self._needed(min(num_tokens, tokens + now), hits) + spare)
        if needed > self.num_blocks:  # windows need less behind a hit
            return Admission.NEVER
        return Admission.OK if needed <= self.pool.num_free - self.kept_free else Admission.LATER

    def _needed(self, num_tokens: int, hits: Ordered[list[int]] = (), chunk: int | None = None) -> int:
        """Blocks that a newcomer takes out of the queue for so many tokens, its hits among them."""
        size = self.block_size
        rows = -(-num_tokens // size)
        needed = self._states
        found = len(hits[0]) if hits else 0
        for window in self._windows:
            most = rows
            if chunk is not None and window is not None:
                most = min(rows, -(-(window - 1 + chunk) // size) + 1)
            needed += max(0, most - found)
        for blocks in hits:
            needed += self.pool.unreferenced([block for block in blocks if block >= 0]) + blocks.count(AWAY)
        return needed

    @property
    def kept_free(self) -> int:
        """Blocks that an admission leaves free: the watermark, unless nobody else runs."""
        return self.watermark_blocks if self.sequences else 0

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Pages needed against pages there."""
        return (
            f"{num_tokens} tokens need {self._needed(num_tokens)} pages of {self.block_size} tokens in "
            f"{len(self.groups)} groups of layers, the pool has {self.num_blocks}"
        )

    # The life of a sequence

    def cached_tokens(self, request: Request, num_tokens: int) -> int:
        """Those in the leading blocks that every group finds."""
        return self._find(request, num_tokens)[0]

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Give a sequence what is cached and new pages behind it; the tokens that it need not compute."""
        filled = num_tokens if filled is None else filled
        first = sequence.request.sequences[0]
        if sequence is first:
            tokens, hits = self._find(sequence.request, num_tokens)
        else:
            tokens, hits = self.shared_rows(first.request) * self.block_size, self.share_prompt(first)
        tables: list[list[int]] = [[] for _ in self.groups]
        for group, blocks in zip(self.token_groups, hits, strict=False):
            tables[group] = [*blocks]
            found = [block for block in blocks if block >= 0]
            self.pool.touch(found)
            for block in found:
                self.share(group, block)
            if found and self.probe is not None:
                self.probe.touch(self.pool.tier, found)
        if self.tiers is not None and sequence is first:
            self._load(self.tiers, sequence, tables, tokens)
        self.begin(sequence, tables, num_tokens, filled, tokens)
        holding = self.holdings[sequence]
        holding.registered = holding.found = tokens // self.block_size
        self.keep_spare(sequence)
        self.held(sequence, filled)
        if self.keeps_freed and self.probe is not None:
            self.probe.begin(sequence)
        return tokens

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a prompt that is computed in part."""
        super().extend(sequence, num_tokens)
        self.held(sequence, sequence.origin)

    def held(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the full blocks be found in every group."""
        self._enter_keys(sequence, self._keys(sequence, num_tokens))
        self._cache.forget()

    def _find(self, request: Request, num_tokens: int) -> Hit:
        """What all groups of layers find; of a group of branches that gave way the prompt, which all of them share."""
        if len(request.sequences) < 2:
            return self._cache.find(request, num_tokens)
        self._cache.declined = 0
        if self.tiers is not None:
            self.tiers.settle()
        keys = self._cache.keys(request, num_tokens)[: self.shared_rows(request)]
        return self._cache.longest(keys, num_tokens)

    def _keys(self, sequence: Sequence, num_tokens: int) -> Ordered[int]:
        """Keys of a branch's full blocks that anybody may ask for; with tiers of all, as in a server."""
        if sequence.lineage is None and self.tiers is None:
            return self._cache.keys(sequence.request, num_tokens)
        if not self.keeps_freed:
            return []
        return sequence_keys(sequence, num_tokens // self.block_size, self.block_size)

    def _enter_keys(self, sequence: Sequence, keys: Ordered[int]) -> None:
        holding = self.holdings[sequence]
        first = holding.registered
        if len(keys) <= first:
            return
        for number, group in enumerate(self.token_groups):
            table = holding.tables[group]
            entered = []
            for index in range(first, len(keys)):
                block = table[index]
                if block != NULL and self.pool.keys[block] is None:
                    self.pool.register(block, (keys[index], number))
                    entered.append(block)
            if self.tiers is not None:
                self._tell(self.tiers, sequence, entered)
        holding.registered = len(keys)
        for edge in holding.edges:
            if edge.own:
                self.owners[edge.table[edge.freed]] = edge

    def free(self, sequence: Sequence) -> None:
        """Queue the blocks; of one that will be back, or has a follower, what it generated is found again."""
        self._given.clear()  # what stands before these in the queue stays there
        holding = self.holdings[sequence]
        if self.keeps_freed and not holding.done:
            self._leave_behind(sequence, holding)
        super().free(sequence)

    def retire(self, request: Request) -> None:
        """The branches are done and keep their blocks."""
        if self.keeps_freed:
            for sequence in request.sequences:
                holding = self.holdings[sequence]
                self._leave_behind(sequence, holding)
                full = sequence.num_tokens // self.block_size
                for pages in holding.left_tables():
                    self.pool.mark_full(pages[: max(0, full - holding.rows + len(pages))])
        super().retire(request)

    def _leave_behind(self, sequence: Sequence, holding: Holding) -> None:
        """Name what was generated, if anybody may ask for it."""
        request = sequence.request
        unfinished = sequence.num_tokens < sequence.final_tokens
        if self.tiers is None and unfinished and request.status == "running" and len(request.sequences) > 1:
            return  # a beam that died
        if unfinished or request.output_content is not None or self.tiers is not None:
            keys = sequence_keys(sequence, sequence.num_tokens // self.block_size, self.block_size)
            for edge in holding.edges:
                number = self._number[edge.group]
                named = [(key, number) for key in keys[edge.first : edge.freed]]
                self.pool.name(edge.given, edge.mark, named)
                if self.tiers is not None:
                    known = self.pool.keys
                    pairs = zip(edge.given, named, strict=False)
                    self._tell(self.tiers, sequence, [block for block, key in pairs if known[block] == key])
            self._enter_keys(sequence, keys)

    # Tiers

    def offloaded_bytes(self, token_bytes: float) -> float:
        """Those of a page, which has the layers of one group."""
        page = self.groups[0].page_slots
        return page * (self.slot_bytes if self._unified else token_bytes / len(self.groups))

    def open_tiers(self, tiers: TieredStore) -> None:
        """Tell the tiers of every full page that can be found, and of what is evicted."""
        self.tiers = self._cache.store = tiers
        tiers.block_size = self.block_size
        self.pool.free = OffloadingQueue(range(self.num_blocks), tiers)
        tiers.device_keys = self.pool.keys

    def _tell(self, tiers: TieredStore, sequence: Sequence, blocks: list[int]) -> None:
        known = self.pool.keys
        tiers.found(sequence, [known[block] for block in blocks], blocks)

    def _load(self, tiers: TieredStore, sequence: Sequence, tables: list[list[int]], tokens: int) -> None:
        """Pages for what tiers have of the hit, and their copies; hits are counted in the group that sees the most."""
        request = sequence.request
        keys = self._cache.keys(request, request.prefill_tokens)
        counted = self._cache.counted
        tiers.declined_tokens += self._cache.declined
        for number, group in enumerate(self.token_groups):
            table = tables[group]
            near = [(at, block) for at, block in enumerate(table) if block >= 0]
            if near and tiers.counts_hits:
                tiers.hit(sequence, [(keys[at], number) for at, _ in near], [block for _, block in near])
            loads = self._cache.loads(keys, table, number)
            if number == counted and not request.preemptions:
                tiers.device_hit_tokens += tokens - len(loads) * self.block_size
            if not loads:
                continue
            blocks = self.pool.take(len(loads))
            for (key, at), block in zip(loads, blocks, strict=True):
                table[at] = block
                self.pool.register(block, key)
            tiers.load(request, [key for key, _ in loads], blocks, counted=number == counted)

    def release(self, sequence: Sequence, holding: Holding | None = None) -> None:
        """Queue the blocks, in each group the deepest first; full ones that have no name queue up with the others."""
        assert holding is not None
        full = sequence.num_tokens // self.block_size if self.keeps_freed else 0
        for index, pages in enumerate(holding.left_tables()):
            self.pool.leave_table(pages, max(0, full - len(holding.tables[index]) + len(pages)))
