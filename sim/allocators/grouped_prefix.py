"""Prefix caching over several layer groups: vLLM V1's hybrid models."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from sim.allocators.capacity import Admission, Capacity
from sim.allocators.grouped import GroupedAllocator
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.errors import UserError
from sim.layer_groups import unified_pages, windowed_pages
from sim.pools.prefix_pool import PrefixPool
from sim.prefixes.keys import own_key, prefix_keys
from sim.prefixes.prefix_cache import PrefixCache
from sim.request import Request, Sequence


class GroupedPrefixAllocator(GroupedAllocator):
    """`prefix` where layers are of several kinds: one pool of equal pages, a block table for each group.

    The rules are those of `sim/prefixes/prefix_cache.py`: a hit has to be one in every group, a window's from its right
    end; a request is refused on the sum over the groups; a window gives its blocks back before it takes others.
    No checkpoints of states are kept, so that with states nothing is cached.
    """

    pool: PrefixPool

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
        super().__init__(capacity, pages)
        page = self.groups[0].page_slots
        self.num_blocks = slots // page if capacity.num_blocks is None else capacity.num_blocks
        self.num_slots = slots if capacity.num_blocks is None else self.num_blocks * page
        self.watermark_blocks = int(watermark * self.num_blocks)
        if not self.num_blocks:
            raise UserError(f"a page of all layer groups has {page:,} slots, and there are {slots:,}")
        self._remainder = self.num_slots - self.num_blocks * page  # too short for a page
        states = len(self.groups) - len(self.token_groups)
        self.prefix_caching = self.keeps_freed = prefix_caching is not False and not states
        self.cache = PrefixCache(
            self.num_blocks,
            self.block_size,
            windows=[self.groups[index].window for index in self.token_groups],
            caching=self.keeps_freed,
            keyless_first=keyless_first,
        )
        self.pool = self.cache.pool
        self._states = states
        self._number = {group: number for number, group in enumerate(self.token_groups)}
        self._given: list[tuple[int, int]] = []  # order of a sequence, and a block of it, in one tick
        self._head: tuple[Request | None, Ordered[int]] = None, []  # the last request asked for, and its keys

    # Room

    def num_external(self, head_refused: bool) -> int:
        """The slots behind the last whole page."""
        return self._remainder

    def admission(self, request: Request, num_tokens: int) -> Admission:
        """Room for all tokens at once."""
        return self.admission_in_chunks(request, num_tokens, num_tokens)

    def admission_in_chunks(self, request: Request, num_tokens: int, chunk: int) -> Admission:
        """Room for the sum of what all groups need: new pages, and those of the hits that nobody holds.

        A windowed group needs no more at once than its window and `chunk` tokens. The watermark stays free unless
        nobody else runs.
        """
        cache = self.cache
        nothing: list[list[int]] = [[] for _ in self.token_groups]
        keys = self._keys(request, num_tokens)
        hit, hits = cache.hit(keys, num_tokens) if keys else (0, nothing)
        needed = cache.needed(nothing, hits, num_tokens, min(chunk, num_tokens - hit)) + self._states
        if needed > self.num_blocks:  # windows need less behind a hit
            return Admission.NEVER
        spare = self.pool.num_free - self.kept_free
        return Admission.OK if needed <= spare else Admission.LATER

    @property
    def kept_free(self) -> int:
        """Blocks that an admission leaves free: the watermark, unless nobody else runs."""
        return self.watermark_blocks if self.sequences else 0

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Pages needed against pages there."""
        nothing: list[list[int]] = [[] for _ in self.token_groups]
        needed = self.cache.needed(nothing, nothing, num_tokens) + self._states
        return (
            f"{num_tokens} tokens need {needed} pages of {self.block_size} tokens in {len(self.groups)} groups "
            f"of layers, the pool has {self.num_blocks}"
        )

    @property
    def headroom(self) -> int:
        """Sequences that can each have a page for every group."""
        return self.pool.num_free // len(self.token_groups)

    def lacks(self, holding: Holding, rows: int) -> bool:
        """Fewer free pages than the groups need together."""
        return self.pool.num_free < rows * len(self.token_groups)

    def demand(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages for every group that the next tokens take, more than the headroom only if they cannot be had."""
        needed = sum(self.pages_needed(sequence, num_tokens))
        rows = max(0, -(-needed // len(self.token_groups)))
        return min(rows, self.headroom) if needed <= self.pool.num_free else rows

    # The life of a sequence

    def _keys(self, request: Request, num_tokens: int) -> Ordered[int]:
        """Keys of the full blocks; none for a request whose content nobody can have."""
        if not self.keeps_freed or (not request.content and not request.preemptions):
            return []
        blocks = num_tokens // self.block_size
        known, keys = self._head
        if known is not request or len(keys) != blocks:
            keys = prefix_keys(request, blocks, self.block_size)
            self._head = request, keys
        return keys

    def cached_tokens(self, request: Request, num_tokens: int) -> int:
        """Those in the leading blocks that every group finds."""
        return self.cache.hit(self._keys(request, num_tokens), num_tokens)[0]

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Give a sequence what is cached and new pages behind it; the tokens that it need not compute."""
        filled = num_tokens if filled is None else filled
        keys = self._keys(sequence.request, num_tokens)
        tokens, hits = self.cache.hit(keys, num_tokens) if keys else (0, [])
        tables: list[list[int]] = [[] for _ in self.groups]
        for group, blocks in zip(self.token_groups, hits, strict=False):
            tables[group] = blocks
            found = [block for block in blocks if block != NULL]
            self.pool.touch(found)
            for block in found:
                self.share(group, block)
            if found and self.probe is not None:
                self.probe.touch(self.pool.tier, found)
        self.begin(sequence, tables, num_tokens, filled, tokens)
        holding = self.holdings[sequence]
        holding.registered = holding.found = tokens // self.block_size
        self.held(sequence, filled)
        if self.keeps_freed and self.probe is not None:
            self.probe.begin(sequence)
        return tokens

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """More pages for every group; the tokens that have room."""
        holding = self.holdings[sequence]
        self._lengthen(sequence, holding, num_tokens)
        return holding.rows * self.block_size

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a prompt that is computed in part."""
        super().extend(sequence, num_tokens)
        self.held(sequence, sequence.origin)

    def held(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the full blocks be found in every group."""
        keys = self._keys(sequence.request, num_tokens)
        self._head = None, []
        self._enter_keys(self.holdings[sequence], keys)

    def _enter_keys(self, holding: Holding, keys: Ordered[int]) -> None:
        first = holding.registered
        if len(keys) <= first:
            return
        for number, group in enumerate(self.token_groups):
            table = holding.tables[group]
            for index in range(first, len(keys)):
                block = table[index]
                if block != NULL and self.pool.keys[block] is None:
                    self.pool.register(block, (keys[index], number))
        holding.registered = len(keys)

    def free(self, sequence: Sequence) -> None:
        """Queue the blocks; of one that will be back, what it generated is found again."""
        self._given.clear()  # what stands before these in the queue stays there
        holding = self.holdings[sequence]
        if self.keeps_freed and not holding.done:
            full = sequence.num_tokens // self.block_size
            if sequence.num_tokens < sequence.final_tokens:
                self._enter_keys(holding, prefix_keys(sequence.request, full, self.block_size))
            else:
                self._mark_full(holding, full)
        super().free(sequence)

    def retire(self, request: Request) -> None:
        """The branches are done and keep their blocks."""
        if self.keeps_freed:
            for sequence in request.sequences:
                self._mark_full(self.holdings[sequence], sequence.num_tokens // self.block_size)
        super().retire(request)

    def _mark_full(self, holding: Holding, full: int) -> None:
        """Nobody will ask for what was generated; its blocks queue up all the same."""
        for group in self.token_groups:
            self.pool.mark_full([block for block in holding.tables[group][:full] if block != NULL])

    # Pages

    def take(self, holding: Holding, group: int, count: int) -> list[int]:
        """Blocks from the head of the queue."""
        return self.pool.take(count)

    def lengthen(self, growing: list[tuple[Sequence, Holding]]) -> None:
        """One more block at the end of every table of these sequences."""
        groups = self.token_groups
        blocks = iter(self.pool.take(len(groups) * len(growing)))
        for _, holding in growing:
            tables = holding.tables
            for group in groups:
                tables[group].append(next(blocks))

    def give_left(self, holding: Holding, edge: Edge, page: int, index: int) -> None:
        """Queue a block that a window has passed: it is full, and can be found until it is handed out."""
        pool = self.pool
        if self.keeps_freed:
            if self.probe is not None:
                self.probe.leave(edge.sequence, edge.group, (index + 1) * self.block_size)
            if self.walker is not None:
                self._given.append((self.walker.order, page))
            pool.give_full(page, (own_key(edge.sequence.request, index), self._number[edge.group]))
        else:
            pool.release((page,))

    def give(self, holding: Holding, group: int, pages: list[int]) -> None:
        """Queue blocks."""
        if self.walker is not None:
            self._given += [(self.walker.order, page) for page in pages]
        self.pool.release(pages)

    def settle(self) -> None:
        """Queue what windows gave back in this tick in the order of `grow`, in whichever order sequences were asked."""
        super().settle()
        given = self._given
        if given:
            in_order = sorted(given, key=_order)
            if in_order != given:
                self.pool.requeue([page for _, page in in_order])
            given.clear()

    def leave(self, sequence: Sequence, holding: Holding, group: int, freed: int) -> None:
        """What a window leaves behind is full, and can be found until it is handed out."""
        if self.keeps_freed:
            if self.probe is not None:
                self.probe.leave(sequence, group, freed * self.block_size)
            pool, table, number = self.pool, holding.tables[group], self._number[group]
            for index in range(max(0, table.count(NULL)), freed):
                if pool.keys[table[index]] is None:
                    pool.register(table[index], (own_key(sequence.request, index), number))

    def num_holders(self, group: int, page: int) -> int:
        """References of a block."""
        return self.pool.references[page]

    @property
    def sharing(self) -> bool:
        """Whether any block has several references."""
        return self.pool.extra_references > 0

    def num_shared(self, group: int, pages: list[int]) -> int:
        """How many of these held blocks others hold too."""
        references = self.pool.references
        return sum([references[page] > 1 for page in pages])

    @property
    def blocks_saved(self) -> int:
        """References beyond the first of every block."""
        return self.pool.extra_references

    def check_books(self) -> None:
        """Reference counts against the tables of all groups."""
        self.pool.check_integrity(
            [page for page in table if page != NULL]
            for holding in self.holdings.values()
            for table in holding.tables
        )


def _order(given: tuple[int, int]) -> int:
    return given[0]
