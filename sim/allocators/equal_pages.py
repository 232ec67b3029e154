"""Layers of several kinds over equal pages of one pool: who holds them, and how branches share them."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from sim.allocators.capacity import Capacity
from sim.allocators.grouped_branches import BranchedAllocator
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.errors import UserError
from sim.layer_groups import Pages
from sim.pools.prefix_pool import PrefixPool
from sim.request import Sequence


class EqualPagesAllocator(BranchedAllocator):
    """Every page of every group is a block of one pool, as in vLLM V1."""

    pool: PrefixPool

    def __init__(self, capacity: Capacity, pages: Pages, slots: int, *, keyless_first: bool) -> None:
        super().__init__(capacity, pages)
        page = self.groups[0].page_slots
        self.num_blocks = slots // page if capacity.num_blocks is None else capacity.num_blocks
        self.num_slots = slots if capacity.num_blocks is None else self.num_blocks * page
        if not self.num_blocks:
            raise UserError(f"a page of all layer groups has {page:,} slots, and there are {slots:,}")
        self._remainder = self.num_slots - self.num_blocks * page  # too short for a page
        self.pool = PrefixPool(self.num_blocks, keyless_first=keyless_first)
        self._given: list[tuple[int, int]] = []  # order of a sequence, and a block of it, in one tick

    # Room

    def num_external(self, head_refused: bool) -> int:
        """The slots behind the last whole page."""
        return self._remainder

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

    # Pages

    def take(self, holding: Holding, counts: Ordered[int]) -> None:
        """Blocks from the head of the queue, those of the first group first."""
        for table, pages in zip(holding.tables, self.fresh(holding, counts), strict=True):
            table += pages

    def fresh(self, holding: Holding, counts: Ordered[int]) -> list[list[int]]:
        """Blocks from the head of the queue, those of the first group first."""
        blocks = self.pool.take(sum(counts))
        pages, end = [], 0
        for count in counts:
            pages.append(blocks[end : end + count])
            end += count
        return pages

    def hold(self, group: int, pages: list[int]) -> None:
        """One more reference to each."""
        self.pool.share(pages)

    def take_rows(self, growing: list[Sequence]) -> list[int]:
        """Blocks from the head of the queue."""
        return self.pool.take(len(self.token_groups) * len(growing))

    def pass_pages(self, edges: list[Edge]) -> int:
        """Queue the blocks that windows have passed: they are full, and can be named until they are handed out."""
        size, caching, pool = self.block_size, self.keeps_freed, self.pool
        if caching and self.probe is not None:
            for edge in edges:
                self.probe.leave(edge.sequence, edge.group, (edge.freed + 1) * size)
        keys, references, owners = pool.keys, pool.references, self.owners
        pages = []
        for edge in edges:
            table, index = edge.table, edge.freed
            page = table[index]
            table[index] = NULL
            edge.freed = index + 1
            edge.turn += size
            pages.append(page)
            if not caching:
                pool.release((page,))
                continue
            edge.given.append(page)
            references[page] = edge.mark
            if owners and keys[page] is not None:
                del owners[page]
                following = table[index + 1]
                if keys[following] is not None:
                    owners[following] = edge
        if caching:
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
        """A probe is told of what may be found again."""
        if self.keeps_freed and self.probe is not None:
            self.probe.leave(edge.sequence, edge.group, freed * self.block_size)

    def give_back(self, edge: Edge, pages: list[int]) -> None:
        """What a window leaves behind is full, and can be named until it is handed out."""
        if not self.keeps_freed:
            super().give_back(edge, pages)
            return
        edge.given += pages[::-1]
        if self.walker is not None:
            self._given += [(self.walker.order, page) for page in pages]
        self.pool.leave(pages, edge.mark)

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
        return sum([references[page] > 1 for page in pages]) if self.sharing else 0

    @property
    def blocks_saved(self) -> int:
        """References beyond the first of every block."""
        return self.pool.extra_references

    def check_books(self) -> None:
        """Reference counts against the tables of all groups."""
        self.pool.check_integrity(
            [page for page in table if page != NULL]
            for holding in self.holdings.values()
            for table in (*holding.tables, *holding.spare)
        )


def _order(given: tuple[int, int]) -> int:
    return given[0]
