"""Prefix caching over several layer groups: vLLM V1's hybrid models."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from sim.allocators.capacity import Admission, Capacity
from sim.allocators.group_hits import GroupHits
from sim.allocators.grouped import GroupedAllocator
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.errors import UserError
from sim.layer_groups import unified_pages, windowed_pages
from sim.pools.prefix_pool import PrefixPool
from sim.prefixes.keys import prefix_keys
from sim.request import Request, Sequence


class GroupedPrefixAllocator(GroupedAllocator):
    """`prefix` where layers are of several kinds: one pool of equal pages, a block table for each group.

    The rules are those of vLLM V1 (`kv_cache_manager.py`, `kv_cache_coordinator.py`): a hit has to be one in every
    group, a window's from its right end; a request is refused on the sum over the groups; a window gives its blocks
    back before it takes others. What is generated can be found once its request leaves, in a window also by then
    given back. No checkpoints of states are kept, so that with states nothing is cached.
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
        self.pool = PrefixPool(self.num_blocks, keyless_first=keyless_first)
        self._windows = [self.groups[index].window for index in self.token_groups]
        self._cache = GroupHits(self.pool, self.block_size, self._windows, caching=self.keeps_freed)
        self._states = states
        self._number = {group: number for number, group in enumerate(self.token_groups)}
        self._given: list[tuple[int, int]] = []  # order of a sequence, and a block of it, in one tick

    # Room

    def num_external(self, head_refused: bool) -> int:
        """The slots behind the last whole page."""
        return self._remainder

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
        tokens, hits = self._cache.find(request, num_tokens)
        needed = self._needed(num_tokens, hits, chunk)
        if chunk < num_tokens:
            now = chunk if first is None else first
            needed = max(needed, self._needed(min(num_tokens, tokens + now), hits))
        if needed > self.num_blocks:  # windows need less behind a hit
            return Admission.NEVER
        spare = self.pool.num_free - self.kept_free
        return Admission.OK if needed <= spare else Admission.LATER

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
            needed += self.pool.unreferenced([block for block in blocks if block != NULL])
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

    def cached_tokens(self, request: Request, num_tokens: int) -> int:
        """Those in the leading blocks that every group finds."""
        return self._cache.find(request, num_tokens)[0]

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Give a sequence what is cached and new pages behind it; the tokens that it need not compute."""
        filled = num_tokens if filled is None else filled
        tokens, hits = self._cache.find(sequence.request, num_tokens)
        tables: list[list[int]] = [[] for _ in self.groups]
        for group, blocks in zip(self.token_groups, hits, strict=False):
            tables[group] = [*blocks]
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

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a prompt that is computed in part."""
        super().extend(sequence, num_tokens)
        self.held(sequence, sequence.origin)

    def held(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the full blocks be found in every group."""
        self._enter_keys(self.holdings[sequence], self._cache.keys(sequence.request, num_tokens))
        self._cache.forget()

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
        if sequence.num_tokens < sequence.final_tokens or request.output_content is not None:
            keys = prefix_keys(request, sequence.num_tokens // self.block_size, self.block_size)
            for edge in holding.edges:
                number = self._number[edge.group]
                named = [(key, number) for key in keys[edge.first : edge.freed]]
                self.pool.name(edge.given, edge.mark, named)
            self._enter_keys(holding, keys)

    def release(self, sequence: Sequence, holding: Holding | None = None) -> None:
        """Queue the blocks, in each group the deepest first; full ones that have no name queue up with the others."""
        assert holding is not None
        full = sequence.num_tokens // self.block_size if self.keeps_freed else 0
        for index, pages in enumerate(holding.left_tables()):
            self.pool.leave_table(pages, max(0, full - len(holding.tables[index]) + len(pages)))

    # Pages

    def take(self, holding: Holding, counts: Ordered[int]) -> None:
        """Blocks from the head of the queue, those of the first group first."""
        blocks = self.pool.take(sum(counts))
        begin = 0
        for table, count in zip(holding.tables, counts, strict=True):
            table += blocks[begin : begin + count]
            begin += count

    def lengthen(self, holdings: list[Holding]) -> None:
        """One more block at the end of every table, in the order of the sequences and then of the groups."""
        if holdings:
            groups = self.token_groups
            blocks = self.pool.take(len(groups) * len(holdings))
            for number, group in enumerate(groups):
                for holding, block in zip(holdings, blocks[number :: len(groups)], strict=True):
                    holding.tables[group].append(block)

    def pass_pages(self, edges: list[Edge]) -> int:
        """Queue the blocks that windows have passed: they are full, and can be named until they are handed out."""
        size, caching, pool = self.block_size, self.keeps_freed, self.pool
        if caching and self.probe is not None:
            for edge in edges:
                self.probe.leave(edge.sequence, edge.group, (edge.freed + 1) * size)
        keys, references, owners = pool.keys, pool.references, self.owners
        pages = []
        marked = 0
        for edge in edges:
            table, index = edge.table, edge.freed
            page = table[index]
            table[index] = NULL
            edge.freed = index = index + 1
            edge.turn += size
            pages.append(page)
            if caching:
                edge.given.append(page)
                references[page] = 0
                if keys[page] is None:
                    keys[page] = edge.mark
                    marked += 1
                else:
                    del owners[page]
                if keys[table[index]] is not None:
                    owners[table[index]] = edge
        if not caching:
            for page in pages:
                pool.release((page,))
        else:
            pool.num_keyed += marked
            pool.free.put_last(pages)
            if self.walker is not None:
                order = self.walker.order
                self._given += [(order, page) for page in pages]
        return len(pages) * self.groups[0].page_slots

    def give(self, sequence: Sequence, group: int, pages: list[int]) -> None:
        """Queue blocks."""
        if self.walker is not None:
            self._given += [(self.walker.order, page) for page in pages]
        self.pool.release(pages)

    def settle(self) -> None:
        """Queue what windows gave back in this tick in the order of `grow`, in whichever order sequences were asked."""
        given = self._given
        if given:
            in_order = sorted(given, key=_order)
            if in_order != given:
                self.pool.requeue([page for _, page in in_order])
            given.clear()

    def leave(self, edge: Edge, freed: int) -> None:
        """What a window leaves behind is full, and can be named until it is handed out."""
        if self.keeps_freed:
            if self.probe is not None:
                self.probe.leave(edge.sequence, edge.group, freed * self.block_size)
            pages = edge.table[edge.freed : freed]
            edge.given += pages
            self.pool.mark(pages, edge.mark)

    def num_holders(self, group: int, page: int) -> int:
        """References of a block."""
        return self.pool.references[page]

    def is_known(self, page: int) -> bool:
        """Whether it has a key."""
        return self.pool.keys[page] is not None

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
