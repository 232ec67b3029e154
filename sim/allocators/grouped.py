"""What allocators of several layer groups share: a block table for each, and windows that give pages back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable

from sim.allocators.grouped_books import GroupedBooks
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.request import Request, Sequence


class GroupedAllocator(GroupedBooks):
    """Pages for layers of several kinds: of all tokens, of those in a window, of a state.

    Every sequence has a table for each group of layers, all as long as its tokens need; a windowed group gives
    back the pages that no further token looks at, and its table keeps `NULL` there. A group of states has one
    page. What counts as waste is said in `GroupedBooks`.
    """

    asks_exactly = True
    groups_layers = True
    grows_foreseeably = True

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

    def leave(self, sequence: Sequence, holding: Holding, group: int, freed: int) -> None:
        """The pages before index `freed` are about to be given back, as the window has passed them."""

    def give_left(self, holding: Holding, edge: Edge, page: int, index: int) -> None:
        """Take back the page at an index that a window has passed."""
        self.give(holding, edge.group, [page])

    def lengthen(self, growing: list[tuple[Sequence, Holding]]) -> None:
        """One more page at the end of every table of these sequences."""
        for _, holding in growing:
            for index in self.token_groups:
                holding.tables[index] += self.take(holding, index, 1)

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
        self.pass_windows(sequence)
        holding = self.holdings[sequence]
        for edge in holding.edges:
            self._disclaim(edge)
            edge.turn = max(start + num_tokens + 1, edge.window)
        self._lengthen(sequence, holding, start + num_tokens)
        for edge in holding.edges:
            if edge.left > edge.freed * self.block_size:
                self._claim(edge)
        sequence.origin += num_tokens
        self.num_tokens += num_tokens * self.slots_per_token
        self._await(sequence, holding)

    def pass_windows(self, sequence: Sequence) -> None:
        """Return the pages that are out of the window."""
        holding = self.holdings[sequence]
        for edge in holding.edges:
            self._disclaim(edge)
            edge.moving = False
            edge.left = max(edge.left, sequence.origin - edge.window + 1)
            self._give_back(holding, edge, edge.left // self.block_size)
            if edge.left > edge.freed * self.block_size:
                self._claim(edge)

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

    # Decoding

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

    def append(self, sequence: Sequence) -> int:
        """Make sure that the next token has its slots."""
        tokens = sequence.num_tokens + 1
        if tokens > sequence.capacity:
            holding = self.holdings[sequence]
            self._move_windows(sequence, holding, tokens)
            if holding.rows * self.block_size < tokens:
                self._take_rows([(sequence, holding)])
            self._await(sequence, holding)
        return 0

    def can_append(self, request: Request) -> bool:
        """Whether every branch whose pages are full can have more; where they lack, windows give back first."""
        for sequence in request.sequences:
            holding = self.holdings[sequence]
            tokens = sequence.num_tokens + 1
            if tokens > holding.rows * self.block_size and self.lacks(holding, 1):
                self._move_windows(sequence, holding, tokens)
                if self.lacks(holding, 1):
                    return False
        return True

    def _await(self, sequence: Sequence, holding: Holding) -> None:
        """Note after how many tokens the next page is due, or the next one is given back."""
        due = holding.rows * self.block_size
        for edge in holding.edges:
            if edge.turn <= due:
                due = edge.turn - 1
        sequence.capacity = due

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

    # Windows

    def gives_back(self, growing: Iterable[Sequence], awaited: bool) -> bool:
        """Whether a window of one of these sequences leaves a page; if not `awaited`, one that is not its own."""
        for sequence in growing:
            for edge in self.holdings[sequence].edges:
                if sequence.capacity + 1 >= edge.turn and (awaited or not (edge.own and edge.moving)):
                    return True
        return False

    def settle(self) -> None:
        """All sequences have the slots of the coming tick: look at who is alone with the pages that windows enter."""
        for edge in self.moved:
            if edge.own or not edge.moving:
                continue
            if self.holdings.get(edge.sequence) is edge.holding:
                self._claim(edge)
        self.moved.clear()

    def _move_windows(self, sequence: Sequence, holding: Holding, tokens: int) -> None:
        """Let one sequence's windows give back, maybe before others whose turn it is in order of arrival."""
        self.walker = sequence
        for edge in holding.edges:
            if tokens >= edge.turn:
                self._move(holding, edge, tokens, self.sharing)
        self.walker = None

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
