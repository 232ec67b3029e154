"""The books over memory of several layer groups: which pages are held, and what in them is live."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import Allocator
from sim.allocators.capacity import Capacity
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.errors import IntegrityError
from sim.layer_groups import Pages
from sim.request import Request, Sequence


class GroupedBooks(Allocator):
    """Who holds which pages in which group of layers, and what of them is live, reserved or wasted.

    A slot is the largest unit of bytes that tokens and states of all groups are multiples of. A slot is a token
    state while its token is in the window, or is part of a state. Tokens that left the window and stand in a page
    that is held alone are internal waste, as is what a page is larger than its block, and what is behind the last
    token. In a page that several sequences hold, every token counts as live; a page is looked at when the window
    enters it, and when somebody comes to share it. Between the events of the calendar the window moves a token
    a step: `Sequence.sliding` slots change from token states to waste.
    """

    def __init__(self, capacity: Capacity, pages: Pages) -> None:
        super().__init__(capacity)
        self.groups = pages.groups
        self.block_size = self.stride = pages.block_size
        self.slot_bytes = pages.slot_bytes
        self.slots_per_token = sum(group.token_slots for group in self.groups)
        self.token_groups = [index for index, group in enumerate(self.groups) if not group.state_slots]
        self.windowed = [index for index, group in enumerate(self.groups) if group.window is not None]
        self.pads = [
            group.page_slots - (group.state_slots or self.block_size * group.token_slots)
            for group in self.groups
        ]
        self.row_slots = sum(self.groups[index].page_slots for index in self.token_groups)
        self.row_pads = sum(self.pads[index] for index in self.token_groups)
        self.state_slots = sum(group.state_slots for group in self.groups)
        self.state_pads = sum(self.pads) - self.row_pads
        self.slides = bool(self.windowed)
        self.holdings: dict[Sequence, Holding] = {}
        self.owners: dict[int, Edge] = {}  # by page that others may find, whose dead tokens count there
        self.done: Counter[tuple[int, int]] = Counter()  # sequences that are done, by page they hold
        self.buried: set[tuple[int, int]] = set()  # pages that nobody else holds
        self.walker: Sequence | None = None  # who is looked at alone
        self.moved: list[Edge] = []  # those that begin to move through a page with the coming tick

    def num_holders(self, group: int, page: int) -> int:
        """How many sequences hold a page."""
        return 1

    @property
    def sharing(self) -> bool:
        """Whether any page has several holders."""
        return False

    def num_shared(self, group: int, pages: list[int]) -> int:
        """How many of these held pages others hold too."""
        return 0

    def spare_slots(self, holding: Holding) -> int:
        """Slots of pages that are kept for the states of branches to come."""
        pairs = zip(holding.spare, self.groups, strict=False)
        return sum([len(pages) * group.page_slots for pages, group in pairs])

    def is_known(self, page: int) -> bool:
        """Whether others may find a page that is held."""
        return False

    # What counts as waste

    def _claim(self, edge: Edge) -> None:
        """Count dead tokens in the first page of the window as waste, if the sequence is alone with it.

        A window that moves then gains one with every token. What is counted now is a point of that line, at
        `num_tokens`: less than nothing where the line starts later.
        """
        page = edge.table[edge.freed]
        if self.num_holders(edge.group, page) == 1:
            edge.own = True
            edge.steady = edge.moving and edge.window > 1  # one of 1 leaves a page before it has the next
            if self.is_known(page):
                self.owners[page] = edge
            self._count_dead(edge, self.groups[edge.group].token_slots)

    def _disclaim(self, edge: Edge) -> None:
        """Count all tokens of that page as live again."""
        if edge.own:
            edge.own = edge.steady = False
            self.owners.pop(edge.table[edge.freed], None)
            self._count_dead(edge, -self.groups[edge.group].token_slots)

    def _count_dead(self, edge: Edge, token_slots: int) -> None:
        """Move a page's dead tokens to waste; while the window moves, so many slots more slide with each token."""
        sequence, left = edge.sequence, edge.left
        if edge.moving:
            decodes = sequence.decodes
            left = sequence.origin - edge.window
            sequence.sliding += token_slots
            if decodes is not None:
                left += decodes.clock
                decodes.sliding += token_slots
        slots = (left - edge.freed * self.block_size) * token_slots
        self.num_tokens -= slots
        self.num_internal += slots

    def unfill(self, sequence: Sequence, num_tokens: int) -> None:
        """Take the last tokens back of a sequence that does not decode."""
        sequence.origin -= num_tokens
        self.num_tokens -= num_tokens * self.slots_per_token

    def share(self, group: int, page: int) -> None:
        """Somebody else comes to hold a full page: all of it is live."""
        edge = self.owners.get(page)
        if edge is not None:
            self._disclaim(edge)
        elif (group, page) in self.buried:
            self.buried.discard((group, page))
            self.slide(-self.block_size * self.groups[group].token_slots)

    def retire(self, request: Request) -> None:
        """The branches are done and keep their pages: those that they hold alone are internal waste."""
        for sequence in request.sequences:
            holding = self.holdings[sequence]
            for edge in holding.edges:
                self._disclaim(edge)
            self._book(sequence, holding, -1)
            filled = self._in_tail(sequence, holding)
            unused = max(0, sequence.capacity - sequence.final_tokens)
            tail = filled, self.block_size - filled - unused
            holding.done = True
            sequence.origin = sequence.final_tokens = sequence.sliding = 0
            for index, page in holding.pages():
                self.done[index, page] += 1
                if self.num_holders(index, page) == 1:
                    self.buried.add((index, page))
                    self.num_held += self.groups[index].page_slots
                    self.num_internal += self.groups[index].page_slots
                else:
                    last = page == holding.tables[index][-1]
                    self._bury(index, page, self.num_holders(index, page), tail if last else None)

    def _in_tail(self, sequence: Sequence, holding: Holding) -> int:
        """Tokens of a sequence in its last row of pages."""
        return sequence.num_tokens - (holding.rows - 1) * self.block_size

    def _bury_left(self, group: int, page: int) -> None:
        """A sequence that is not done leaves a page."""
        holders = self.num_holders(group, page) - 1
        if holders:
            self._bury(group, page, holders)

    def _bury(self, group: int, page: int, holders: int, tail: tuple[int, int] | None = None) -> None:
        """Count a page as waste if all that hold it are done; it is full, or has the tokens and room of a tail."""
        if self.done[group, page] == holders:
            self.buried.add((group, page))
            tokens, room = tail or (self.block_size, 0)
            self.slide(tokens * self.groups[group].token_slots)
            self.num_internal += room * self.groups[group].token_slots

    def _exhume(self, holding: Holding) -> None:
        """A sequence that is done leaves: what it holds alone is free."""
        for index, page in holding.pages():
            self.done[index, page] -= 1
            if self.num_holders(index, page) == 1:
                self.buried.discard((index, page))
                self.num_held -= self.groups[index].page_slots
                self.num_internal -= self.groups[index].page_slots
        self.done = +self.done

    def _book(self, sequence: Sequence, holding: Holding, sign: int) -> None:
        """Enter (1) or strike (-1) a sequence without dead tokens: the pages that others do not hold."""
        size, rows = self.block_size, holding.rows
        held = rows * self.row_slots + self.state_slots + self.state_pads
        tokens = sequence.num_tokens * self.slots_per_token + self.state_slots
        internal = rows * self.row_pads + self.state_pads
        unused = rows * size - sequence.final_tokens
        if unused > 0 and not self.shares_tail(sequence):
            internal += unused * self.slots_per_token
        for edge in holding.edges:
            if not edge.freed:
                continue
            group = self.groups[edge.group]
            held -= edge.freed * group.page_slots
            tokens -= edge.freed * size * group.token_slots
            internal -= edge.freed * self.pads[edge.group]
        for index in self.token_groups if self.sharing else ():
            group, pages = self.groups[index], holding.tables[index]
            shared = self.num_shared(index, [page for page in pages if page != NULL])
            held -= shared * group.page_slots
            tokens -= shared * size * group.token_slots
            internal -= shared * self.pads[index]
            if self.shares_tail(sequence):
                tokens += (size - self._in_tail(sequence, holding)) * group.token_slots
        self.num_held += sign * held
        self.num_tokens += sign * tokens
        self.num_internal += sign * internal

    # Where tokens live

    @property
    def block_slots(self) -> int:
        """Slots of a page of the first group."""
        return self.groups[0].page_slots

    def slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """First slot of every live token in all groups, one group after the other, in order of position."""
        parts = [self.group_slots(sequence, index)[1] for index in self.token_groups]
        return np.concatenate(parts)

    def group_slots(self, sequence: Sequence, group: int) -> tuple[int, NDArray[np.int64]]:
        """Position of the first token that is held in a group, and the first slot of each from there on."""
        tokens = sequence.num_tokens
        first, pages = self.held_pages(sequence, group)
        pages = self.page_starts(group, pages)
        steps = np.arange(self.block_size) * self.groups[group].token_slots
        return first, (pages[:, None] + steps).reshape(-1)[: tokens - first]

    @property
    def num_pages(self) -> int:
        """Pages as `held_pages` numbers them."""
        return self.num_slots // self.groups[0].page_slots

    def held_pages(self, sequence: Sequence, group: int) -> tuple[int, NDArray[np.int64]]:
        """Position of the first token that is held in a group, and the pages from there on, each by one number."""
        table = self.holdings[sequence].tables[group]
        freed = table.count(NULL)
        return freed * self.block_size, np.array(table[freed:], np.int64)

    def page_starts(self, group: int, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """First slot of each page."""
        return pages * self.groups[group].page_slots

    @property
    def num_loose(self) -> int:
        """Slots that are held for a kind of layers and for no sequence."""
        return 0

    # Recount

    def check_integrity(self) -> None:
        """Recount everything from the tables, page by page. Raises IntegrityError with the equation that failed."""
        size = self.block_size
        filled: dict[tuple[int, int], int] = {}  # live and dead tokens, by group and page
        holders: dict[tuple[int, int], int] = {}
        tokens = internal = held = 0
        unused: dict[int | Sequence, int] = {}  # by last page, which branches may share
        for sequence, holding in self.holdings.items():
            if sequence.num_tokens > sequence.capacity and not holding.done:
                raise IntegrityError(f"{sequence}: tokens({sequence.num_tokens}) > held({sequence.capacity})")
            held += self.spare_slots(holding)
            if sequence.capacity != holding.rows * size:
                raise IntegrityError(
                    f"{sequence}: held({sequence.capacity}) != slots of {holding.rows} pages"
                )
            last = holding.rows_of[-1] if holding.rows else NULL
            if not holding.done:
                left = max(0, holding.rows * size - sequence.final_tokens)
                unused[sequence if last == NULL else last] = left
            for index, table in enumerate(holding.tables):
                group = self.groups[index]
                if not group.state_slots and len(table) != holding.rows:
                    raise IntegrityError(
                        f"{sequence}: pages({len(table)}) of group {index} != {holding.rows}"
                    )
                for at, page in enumerate(table):
                    if page == NULL:
                        continue
                    holders[index, page] = holders.get((index, page), 0) + 1
                    known = filled.get((index, page), 0)
                    filled[index, page] = max(known, min(size, sequence.num_tokens - at * size))
            for edge in holding.edges:
                first = edge.freed * size
                left = max(0, sequence.num_tokens - edge.window) if edge.moving else edge.left
                if not first <= left < first + size and not holding.done:
                    raise IntegrityError(f"{sequence}: {left} tokens left, {edge.freed} pages given back")
                if edge.own:
                    page = holding.tables[edge.group][edge.freed]
                    if holders[edge.group, page] != 1:
                        raise IntegrityError(f"{sequence}: page {page} of group {edge.group} is not its own")
                    dead = (left - first) * self.groups[edge.group].token_slots
                    tokens -= dead
                    internal += dead
        for (index, page), count in filled.items():
            group = self.groups[index]
            held += group.page_slots
            if (index, page) in self.buried:
                internal += group.page_slots
            else:
                internal += self.pads[index]
                tokens += group.state_slots or count * group.token_slots
        internal += sum(unused.values()) * self.slots_per_token
        for name, kept, counted in (
            ("tokens", self.num_tokens, tokens),
            ("held", self.num_held, held + self.num_loose),
            ("internal", self.num_internal, internal + self.num_loose),
        ):
            if kept != counted:
                raise IntegrityError(f"{name}({kept}) != recount over the tables({counted})")
        for refused in (False, True):
            usage = self.usage(refused)
            parts = (usage.token_states, usage.reserved, usage.internal, usage.external, usage.free)
            if min(parts) < 0 or sum(parts) != self.num_slots:
                raise IntegrityError(f"the parts of {usage} do not make {self.num_slots} slots")
        self.check_books()
