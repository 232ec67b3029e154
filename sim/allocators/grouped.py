"""What allocators of several layer groups share: a block table for each, windows that give back, and the books."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import Allocator, Capacity
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.errors import IntegrityError
from sim.layer_groups import Pages
from sim.request import Request, Sequence


class GroupedAllocator(Allocator):
    """Pages for layers of several kinds: of all tokens, of those in a window, of a state.

    Every sequence has a table for each group of layers (`tables`), all as long as its tokens need; a windowed
    group gives back the pages that no further token looks at, and its table keeps `NULL` there. A group of states
    has one page.

    A slot is the largest unit of bytes that tokens and states of all groups are multiples of. A slot is a token
    state while its token is in the window, or is part of a state. Tokens that left the window and stand in a page
    that is held alone are internal waste, as is what a page is larger than its block, and what is behind the last
    token. In a page that several sequences hold, every token counts as live; a page is looked at when the window
    enters it, and when somebody comes to share it. Between the events of the calendar the window moves a token
    a step: `Sequence.sliding` slots change from token states to waste.
    """

    asks_exactly = True
    groups_layers = True
    grows_foreseeably = True

    def __init__(self, capacity: Capacity, pages: Pages) -> None:
        super().__init__(capacity)
        self.groups = pages.groups
        self.block_size = pages.block_size
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
        self.edges: dict[int, Edge] = {}  # by page, of those whose dead tokens count
        self.done: Counter[tuple[int, int]] = Counter()  # sequences that are done, by page they hold
        self.buried: set[tuple[int, int]] = set()  # pages that nobody else holds
        self.moved: list[Edge] = []  # those that begin to move through a page with the coming tick

    # What a policy decides

    @abstractmethod
    def take(self, holding: Holding, group: int, count: int) -> list[int]:
        """So many pages for a group of a sequence."""

    @abstractmethod
    def give(self, holding: Holding, group: int, pages: list[int]) -> None:
        """Take back pages of a group that a sequence held, the deepest first."""

    @abstractmethod
    def lacks(self, holding: Holding, rows: int) -> bool:
        """Whether so many more pages for every group cannot be had now."""

    def leave(self, sequence: Sequence, holding: Holding, group: int, freed: int) -> None:  # noqa: B027
        """The pages before index `freed` are about to be given back, as the window has passed them."""

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

    # The life of a sequence

    def begin(
        self, sequence: Sequence, tables: list[list[int]], num_tokens: int, filled: int, start: int
    ) -> None:
        """Enter a sequence that begins behind `start` tokens of the tables, with pages for `num_tokens`."""
        holding = Holding(tables)
        self.holdings[sequence] = holding
        sequence.origin = filled
        sequence.sliding = 0
        rows = holding.rows = -(-num_tokens // self.block_size)
        for index, table in enumerate(tables):
            table += self.take(holding, index, (1 if self.groups[index].state_slots else rows) - len(table))
        for index in self.windowed:
            window = self.groups[index].window
            assert window is not None
            freed = tables[index].count(NULL)
            left = min(
                max(0, start - window + 1), (freed + 1) * self.block_size - 1
            )  # a window of 1 hits one more
            edge = Edge(index, window, sequence, holding, freed, left)
            edge.turn = max(filled + 1, window)
            holding.edges.append(edge)
        self._book(sequence, holding, 1)
        for edge in holding.edges:
            if edge.left > edge.freed * self.block_size:
                self._claim(edge)
        sequence.block_table = tables[self.token_groups[0]]
        self.sequences.add(sequence)
        self._await(sequence, holding)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a sequence that does not decode: what is out of the window first returns."""
        start = sequence.origin
        holding = self.holdings[sequence]
        for edge in holding.edges:
            self._disclaim(edge)
            edge.moving = False
            edge.left = max(edge.left, start - edge.window + 1)
            edge.turn = max(start + num_tokens + 1, edge.window)
            self._give_back(holding, edge, edge.left // self.block_size)
        self._lengthen(sequence, holding, start + num_tokens)
        for edge in holding.edges:
            if edge.left > edge.freed * self.block_size:
                self._claim(edge)
        sequence.origin += num_tokens
        self.num_tokens += num_tokens * self.slots_per_token
        self._await(sequence, holding)

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """Let each sequence's windows give back, and its tables grow, for one more token."""
        books = []
        size, holdings = self.block_size, self.holdings
        for tick, sequences in batches:
            decodes = sequences[0].decodes if sequences else None
            slid = 0 if decodes is None else decodes.sliding
            sharing = self.sharing
            needing = []
            growing = [(sequence, holdings[sequence]) for sequence in sequences]
            for sequence, holding in growing:
                tokens = sequence.capacity + 1
                for edge in holding.edges:
                    if tokens >= edge.turn:
                        self._move(holding, edge, tokens, sharing)
                if holding.rows * size < tokens:
                    needing.append((sequence, holding))
            if needing:
                self._take_rows(needing)
            if self.moved:
                self.settle()
            finishing = False
            for sequence, holding in growing:
                due = holding.rows * size
                for edge in holding.edges:
                    if edge.turn <= due:
                        due = edge.turn - 1
                sequence.capacity = due
                if due >= sequence.final_tokens:
                    finishing = True
            if finishing:
                sequences[:] = [each for each in sequences if each.capacity < each.final_tokens]
            internal = self.num_internal
            if decodes is not None:
                internal += (tick - decodes.clock) * decodes.sliding
                if decodes.sliding != slid:
                    self.turns.append((tick, decodes.sliding))
            books.append((tick, self.num_held, internal))
        return books

    def _take_rows(self, growing: list[tuple[Sequence, Holding]]) -> None:
        """A page in every group for each of these sequences, whose pages are full."""
        size = self.block_size
        self.lengthen(growing)
        for sequence, holding in growing:
            holding.rows += 1
            unused = holding.rows * size - sequence.final_tokens
            if unused > 0:
                self.num_internal += unused * self.slots_per_token
        self.num_held += len(growing) * self.row_slots
        self.num_internal += len(growing) * self.row_pads

    def lengthen(self, growing: list[tuple[Sequence, Holding]]) -> None:
        """One more page at the end of every table of these sequences."""
        for _, holding in growing:
            for index in self.token_groups:
                holding.tables[index] += self.take(holding, index, 1)

    def gives_back(self, growing: Iterable[Sequence], awaited: bool) -> bool:
        """Whether a window of one of these sequences leaves a page; if not `awaited`, one that is not its own."""
        for sequence in growing:
            for edge in self.holdings[sequence].edges:
                if sequence.capacity + 1 >= edge.turn and (awaited or not (edge.own and edge.moving)):
                    return True
        return False

    def append(self, sequence: Sequence) -> int:
        """Make sure that the next token has its slots."""
        tokens = sequence.num_tokens + 1
        if tokens > sequence.capacity:
            holding = self.holdings[sequence]
            self._move_windows(holding, tokens)
            if holding.rows * self.block_size < tokens:
                self._take_rows([(sequence, holding)])
            self._await(sequence, holding)
        return 0

    def settle(self) -> None:
        """All sequences have the slots of the coming tick: look at who is alone with the pages that windows enter."""
        for edge in self.moved:
            if edge.own or not edge.moving:
                continue
            if self.holdings.get(edge.sequence) is edge.holding:
                self._claim(edge)
        self.moved.clear()

    def pages_needed(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """New pages by group that the next tokens take, less those that windows give back for good before."""
        holding = self.holdings[sequence]
        start, size = sequence.num_tokens, self.block_size
        rows = max(0, -(-(start + num_tokens) // size) - holding.rows)
        needed = [0 if group.state_slots else rows for group in self.groups]
        for edge in holding.edges if rows else ():
            pages = holding.tables[edge.group][edge.freed : max(0, start - edge.window + 1) // size]
            needed[edge.group] -= len(pages) - self.num_shared(edge.group, pages)
        return needed

    def can_append(self, request: Request) -> bool:
        """Whether every branch whose pages are full can have more; where they lack, windows give back first."""
        for sequence in request.sequences:
            holding = self.holdings[sequence]
            tokens = sequence.num_tokens + 1
            if tokens > holding.rows * self.block_size and self.lacks(holding, 1):
                self._move_windows(holding, tokens)
                if self.lacks(holding, 1):
                    return False
        return True

    def _move_windows(self, holding: Holding, tokens: int) -> None:
        for edge in holding.edges:
            if tokens >= edge.turn:
                self._move(holding, edge, tokens, self.sharing)

    def _move(self, holding: Holding, edge: Edge, tokens: int, sharing: bool) -> None:
        """A window gives back what leaves it with token number `tokens`, and moves through another page."""
        size, index = self.block_size, edge.freed
        if edge.own and edge.moving and not sharing and index + 1 < holding.rows:
            # as below, and then claimed again: all of it was dead, and as many tokens go on to die
            table, group = holding.tables[edge.group], self.groups[edge.group]
            page = table[index]
            table[index] = NULL
            edge.freed = index + 1
            edge.turn += size
            self.num_held -= group.page_slots
            self.num_internal -= group.page_slots
            self.edges.pop(page, None)
            self.edges[table[index + 1]] = edge
            self.gave_back = True
            self.give_left(holding, edge, page, index)
            return
        self._disclaim(edge)
        edge.moving = True
        self._give_back(holding, edge, (tokens - edge.window) // size)
        edge.turn = edge.window + (edge.freed + 1) * size
        self.moved.append(edge)

    def give_left(self, holding: Holding, edge: Edge, page: int, index: int) -> None:
        """Take back the page at an index that a window has passed."""
        self.give(holding, edge.group, [page])

    def _await(self, sequence: Sequence, holding: Holding) -> None:
        """Note after how many tokens the next page is due, or the next one is given back."""
        due = holding.rows * self.block_size
        for edge in holding.edges:
            if edge.turn <= due:
                due = edge.turn - 1
        sequence.capacity = due

    def _lengthen(self, sequence: Sequence, holding: Holding, tokens: int) -> None:
        size = self.block_size
        rows = -(-tokens // size) - holding.rows
        if rows <= 0:
            return
        for index in self.token_groups:
            holding.tables[index] += self.take(holding, index, rows)
        before = holding.rows * size
        holding.rows += rows
        self.num_held += rows * self.row_slots
        self.num_internal += rows * self.row_pads
        unused = holding.rows * size - max(before, sequence.final_tokens)
        if unused > 0:
            self.num_internal += unused * self.slots_per_token

    def free(self, sequence: Sequence) -> None:
        """Take everything back, in each group the deepest page first."""
        holding = self.holdings[sequence]
        if holding.done:
            self._exhume(holding)
        else:
            for edge in holding.edges:
                self._disclaim(edge)
            self._book(sequence, holding, -1)
            for index, page in holding.pages() if self.done else ():
                self._bury_left(index, page)
        del self.holdings[sequence]
        self.sequences.discard(sequence)
        self.release(sequence, holding)
        sequence.block_table = []
        sequence.capacity = sequence.sliding = 0

    def release(self, sequence: Sequence, holding: Holding | None = None) -> None:
        """Give back the pages of all groups."""
        assert holding is not None
        for index, table in enumerate(holding.tables):
            self.give(holding, index, [page for page in reversed(table) if page != NULL])

    def unfill(self, sequence: Sequence, num_tokens: int) -> None:
        """Take the last tokens back of a sequence that does not decode."""
        sequence.origin -= num_tokens
        self.num_tokens -= num_tokens * self.slots_per_token

    def retire(self, request: Request) -> None:
        """The branches are done and keep their pages: those that they hold alone are internal waste."""
        for sequence in request.sequences:
            holding = self.holdings[sequence]
            for edge in holding.edges:
                self._disclaim(edge)
            self._book(sequence, holding, -1)
            holding.done = True
            sequence.origin = sequence.final_tokens = sequence.sliding = 0
            for index, page in holding.pages():
                self.done[index, page] += 1
                if self.num_holders(index, page) == 1:
                    self.buried.add((index, page))
                    self.num_held += self.groups[index].page_slots
                    self.num_internal += self.groups[index].page_slots
                else:
                    self._bury(index, page, self.num_holders(index, page))

    def _bury_left(self, group: int, page: int) -> None:
        """A sequence that is not done leaves a page."""
        holders = self.num_holders(group, page) - 1
        if holders:
            self._bury(group, page, holders)

    def _bury(self, group: int, page: int, holders: int) -> None:
        """Count a full page as waste if all that hold it are done."""
        if self.done[group, page] == holders:
            self.buried.add((group, page))
            self.slide(self.block_size * self.groups[group].token_slots)

    def _exhume(self, holding: Holding) -> None:
        """A sequence that is done leaves: what it holds alone is free."""
        for index, page in holding.pages():
            self.done[index, page] -= 1
            if self.num_holders(index, page) == 1:
                self.buried.discard((index, page))
                self.num_held -= self.groups[index].page_slots
                self.num_internal -= self.groups[index].page_slots
        self.done = +self.done

    def share(self, group: int, page: int) -> None:
        """Somebody else comes to hold a full page: all of it is live."""
        edge = self.edges.get(page)
        if edge is not None:
            self._disclaim(edge)
        elif (group, page) in self.buried:
            self.buried.discard((group, page))
            self.slide(-self.block_size * self.groups[group].token_slots)

    # Windows

    def _claim(self, edge: Edge) -> None:
        """Count dead tokens in the first page of the window as waste, if the sequence is alone with it.

        A window that moves then gains one with every token. What is counted now is a point of that line, at
        `num_tokens`: less than nothing where the line starts later.
        """
        page = edge.holding.tables[edge.group][edge.freed]
        if self.num_holders(edge.group, page) == 1:
            edge.own = True
            self.edges[page] = edge
            token_slots = self.groups[edge.group].token_slots
            self.slide(edge.dead(self.block_size) * token_slots)
            if edge.moving:
                self._bend(edge.sequence, token_slots)

    def _disclaim(self, edge: Edge) -> None:
        """Count all tokens of that page as live again."""
        if edge.own:
            edge.own = False
            page = edge.holding.tables[edge.group][edge.freed]
            self.edges.pop(page, None)
            token_slots = self.groups[edge.group].token_slots
            self.slide(-edge.dead(self.block_size) * token_slots)
            if edge.moving:
                self._bend(edge.sequence, -token_slots)

    def _bend(self, sequence: Sequence, change: int) -> None:
        """More slots slide with every token of the sequence."""
        sequence.sliding += change
        if sequence.decodes is not None:
            sequence.decodes.sliding += change

    def _give_back(self, holding: Holding, edge: Edge, freed: int) -> None:
        """Return the pages before index `freed`, the deepest first."""
        if freed <= edge.freed:
            return
        table, group = holding.tables[edge.group], self.groups[edge.group]
        self.leave(edge.sequence, holding, edge.group, freed)
        pages = table[edge.freed : freed][::-1]
        alone = len(pages) - self.num_shared(edge.group, pages)
        self.num_held -= alone * group.page_slots
        self.num_tokens -= alone * self.block_size * group.token_slots
        self.num_internal -= alone * self.pads[edge.group]
        for page in pages if self.done else ():
            self._bury_left(edge.group, page)
        table[edge.freed : freed] = [NULL] * (freed - edge.freed)
        edge.freed = freed
        self.gave_back = True
        self.give(holding, edge.group, pages)

    def slide(self, slots: int) -> None:
        """The tokens in so many slots left their windows."""
        self.num_tokens -= slots
        self.num_internal += slots

    # Books

    def _book(self, sequence: Sequence, holding: Holding, sign: int) -> None:
        """Enter (1) or strike (-1) a sequence without dead tokens: the pages that others do not hold."""
        size, rows = self.block_size, holding.rows
        held = rows * self.row_slots + self.state_slots + self.state_pads
        tokens = sequence.num_tokens * self.slots_per_token + self.state_slots
        internal = rows * self.row_pads + self.state_pads
        unused = rows * size - sequence.final_tokens
        if unused > 0:
            internal += unused * self.slots_per_token
        for edge in holding.edges:
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
        self.num_held += sign * held
        self.num_tokens += sign * tokens
        self.num_internal += sign * internal

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

    def check_integrity(self) -> None:
        """Recount everything from the tables, page by page. Raises IntegrityError with the equation that failed."""
        size = self.block_size
        filled: dict[tuple[int, int], int] = {}  # live and dead tokens, by group and page
        holders: dict[tuple[int, int], int] = {}
        tokens = internal = held = 0
        for sequence, holding in self.holdings.items():
            if sequence.num_tokens > sequence.capacity and not holding.done:
                raise IntegrityError(f"{sequence}: tokens({sequence.num_tokens}) > held({sequence.capacity})")
            unused = max(0, holding.rows * size - sequence.final_tokens) * (not holding.done)
            internal += unused * self.slots_per_token
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
                kept = self.block_size if holders[index, page] > 1 else count
                tokens += group.state_slots or kept * group.token_slots
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

    @property
    def num_loose(self) -> int:
        """Slots that are held for a kind of layers and for no sequence."""
        return 0
