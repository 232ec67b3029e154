"""What allocators of several layer groups share: a block table for each, and windows that give pages back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as Ordered
from typing import cast

from sim.allocators.grouped_books import GroupedBooks
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.request import Decoding, Request, Sequence, Window

Batch = tuple[int, list[Sequence], list[Window]]
"""A tick, the sequences that grow at it, and the windows that turn; each in order of arrival."""


class GroupedAllocator(GroupedBooks):
    """Pages for layers of several kinds: of all tokens, of those in a window, of a state.

    Every sequence has a table for each group of layers, all as long as its tokens need; a windowed group gives
    back the pages that no further token looks at, and its table keeps `NULL` there. A group of states has one
    page. What counts as waste is said in `GroupedBooks`.

    A window turns with the token with which it leaves a page. As long as all of that page is dead and counted so,
    and the sequence is alone with the next one, nothing but the pages held changes, and a whole tick of the
    calendar is served at once (`pass_pages`); else, as where it turns first, it is looked at alone (`_move`).
    """

    asks_exactly = True
    groups_layers = True
    grows_foreseeably = True
    stride: int
    by_tick = False
    """Whether it matters what was given back in a tick before pages are taken in the next one."""

    # What a policy decides

    @abstractmethod
    def take(self, holding: Holding, counts: Ordered[int]) -> None:
        """So many pages more for each group of a sequence, at the ends of its tables."""

    @abstractmethod
    def take_rows(self, growing: list[Sequence]) -> list[int]:
        """One more page for every group of tokens of each of these sequences, one sequence after the other."""

    @abstractmethod
    def give(self, sequence: Sequence, group: int, pages: list[int]) -> None:
        """Take back pages of a group that a sequence held, the deepest first."""

    @abstractmethod
    def pass_pages(self, edges: list[Edge]) -> int:
        """Take back the next page of each of these steady windows, and move them behind it; the slots of the pages."""

    @abstractmethod
    def lacks(self, holding: Holding, rows: int) -> bool:
        """Whether so many more pages for every group cannot be had now."""

    def leave(self, edge: Edge, freed: int) -> None:
        """The pages before index `freed` are about to be given back, as the window has passed them."""

    def give_back(self, edge: Edge, pages: list[int]) -> None:
        """Take back pages that a window has passed, the deepest first."""
        self.give(edge.sequence, edge.group, pages)

    # The life of a sequence

    def begin(
        self, sequence: Sequence, tables: list[list[int]], num_tokens: int, filled: int, start: int
    ) -> None:
        """Enter a sequence that begins behind `start` tokens of the tables, with pages for `num_tokens`."""
        size, groups = self.block_size, self.groups
        sequence.block_table = tables[self.token_groups[0]]
        holding = self.holdings[sequence] = Holding(tables, sequence.block_table)
        sequence.origin = filled
        sequence.sliding = 0
        rows = -(-num_tokens // size)
        sequence.capacity = rows * size
        self.take(
            holding,
            [
                (1 if group.state_slots else rows) - len(table)
                for group, table in zip(groups, tables, strict=True)
            ],
        )
        sequence.tables = [tables[group] for group in self.token_groups]
        sequence.edges = edges = holding.edges
        for index in self.windowed:
            window = groups[index].window
            assert window is not None
            freed = left = 0
            if start:
                freed = tables[index].count(NULL)
                left = min(max(0, start - window + 1), (freed + 1) * size - 1)  # a window of 1 hits one more
            edge = Edge(index, window, sequence, tables[index], freed, left)
            edge.turn = max(filled + 1, window)
            edges.append(edge)
        self._book(sequence, holding, 1)
        if start:
            self._claim_dead(edges)
        self.sequences.add(sequence)

    def _claim_dead(self, edges: Iterable[Edge]) -> None:
        for edge in edges:
            if edge.left > edge.freed * self.block_size:
                self._claim(edge)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a sequence that does not decode: what is out of the window first returns."""
        start = sequence.origin
        self.pass_windows(sequence)
        edges = self.holdings[sequence].edges
        for edge in edges:
            self._disclaim(edge)
            edge.turn = max(start + num_tokens + 1, edge.window)
        self.reserve(sequence, start + num_tokens)
        self._claim_dead(edges)
        sequence.origin += num_tokens
        self.num_tokens += num_tokens * self.slots_per_token

    def pass_windows(self, sequence: Sequence) -> None:
        """Return the pages that are out of the window."""
        edges = self.holdings[sequence].edges
        for edge in edges:
            self._disclaim(edge)
            edge.moving = False
            edge.left = max(edge.left, sequence.origin - edge.window + 1)
            self._give_back(edge, edge.left // self.block_size)
        self._claim_dead(edges)

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """More pages for every group; the tokens that have room."""
        size, before = self.block_size, sequence.capacity
        rows = -(-(num_tokens - before) // size)
        if rows > 0:
            counts = [0 if group.state_slots else rows for group in self.groups]
            self.take(self.holdings[sequence], counts)
            sequence.capacity = before + rows * size
            self.num_held += rows * self.row_slots
            self.num_internal += rows * self.row_pads
            unused = sequence.capacity - max(before, sequence.final_tokens)
            if unused > 0:
                self.num_internal += unused * self.slots_per_token
        return sequence.capacity

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
        self.sequences.discard(sequence)
        self.release(sequence, holding)
        del self.holdings[sequence]
        sequence.block_table = []
        sequence.tables = sequence.edges = ()
        sequence.capacity = sequence.sliding = 0

    def release(self, sequence: Sequence, holding: Holding | None = None) -> None:
        """Give back the pages of all groups."""
        assert holding is not None
        for index, pages in enumerate(holding.left_tables()):
            self.give(sequence, index, pages[::-1])

    # Decoding

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """Let the tables grow for one more token."""
        return self.turn([(tick, growing, []) for tick, growing in batches])

    def turn(self, batches: Collection[Batch]) -> list[tuple[int, int, int]]:
        """Let windows give back, and tables grow, for one more token of each sequence."""
        pages: Iterator[int] = iter(())
        if not self.by_tick:  # what is given back stands behind all that is taken
            if len(batches) == 1:
                [(_, all_growing, _)] = batches
            else:
                all_growing = [sequence for _, growing, _ in batches for sequence in growing]
            if all_growing:
                pages = iter(self.take_rows(all_growing))
        books = []
        for tick, growing, turning in batches:
            decodes = turning[0].sequence.decodes if turning else growing[0].decodes if growing else None
            slid = 0 if decodes is None else decodes.sliding
            if growing:
                self._lengthen(growing, iter(self.take_rows(growing)) if self.by_tick else pages)
            if turning:
                self._turn(cast("list[Edge]", turning), decodes)
            internal = self.num_internal
            if decodes is not None:
                internal += (tick - decodes.clock) * decodes.sliding
                if decodes.sliding != slid:
                    self.turns.append((tick, decodes.sliding))
            books.append((tick, self.num_held, internal))
        return books

    def _turn(self, turning: list[Edge], decodes: Decoding | None) -> None:
        """Let windows turn; those that were not steady are put back on the calendar, and taken off the list."""
        sharing = self.sharing
        for edge in turning:
            if not edge.steady or (sharing and not self._is_steady(edge)):
                break
        else:
            self._pass(turning)
            return
        steady: list[Edge] = []
        passed = 0
        for edge in turning:
            if edge.steady and (not sharing or self._is_steady(edge)):
                steady.append(edge)
                continue
            if passed < len(steady):
                self._pass(steady[passed:])
                passed = len(steady)
            self._move(edge, edge.turn)
            if decodes is not None:
                decodes.await_turn(edge)
        if passed < len(steady):
            self._pass(steady[passed:])
        turning[:] = steady

    def _lengthen(self, growing: list[Sequence], pages: Iterator[int]) -> None:
        """A page more in every group of these sequences; those that need no more are taken off the list."""
        size = self.block_size
        self.num_held += len(growing) * self.row_slots
        self.num_internal += len(growing) * self.row_pads
        done = []
        for sequence in growing:
            for table in sequence.tables:
                table.append(next(pages))
            sequence.capacity = capacity = sequence.capacity + size
            if capacity >= sequence.final_tokens:
                self.num_internal += (capacity - sequence.final_tokens) * self.slots_per_token
                done.append(sequence)
        for sequence in done:
            growing.remove(sequence)

    def append(self, sequence: Sequence) -> int:
        """Make sure that the next token has its slots."""
        tokens = sequence.num_tokens + 1
        self._move_windows(sequence, tokens)
        if tokens > sequence.capacity:
            self._lengthen([sequence], iter(self.take_rows([sequence])))
            return 0
        return self.copy_tail(sequence) if self.shares_tail(sequence) else 0

    def copy_tail(self, sequence: Sequence) -> int:
        """Give a sequence last pages of its own, as others have those that it writes to next; the rows copied."""
        raise TypeError(f"{type(self).__name__} cannot share pages between sequences")

    def can_append(self, request: Request) -> bool:
        """Whether all branches can have the pages that they need; windows give back first, even if they cannot."""
        first = request.sequences[0]
        tokens = first.num_tokens + 1  # branches are equally long
        if tokens > first.capacity:
            for sequence in request.sequences:
                self._move_windows(sequence, tokens)
            rows = len(request.sequences)
        else:
            rows = (
                self.copies(request.sequences) if self.sharing and first.num_tokens % self.block_size else 0
            )
        return not rows or not self.lacks(self.holdings[first], rows)

    def pages_needed(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """New pages by group that the next tokens take, less those that windows give back for good before."""
        start, size = sequence.num_tokens, self.block_size
        rows = max(0, -(-(start + num_tokens - sequence.capacity) // size))
        needed = [0 if group.state_slots else rows for group in self.groups]
        for edge in self.holdings[sequence].edges if rows else ():
            pages = edge.table[edge.freed : max(0, start - edge.window + 1) // size]
            needed[edge.group] -= len(pages) - self.num_shared(edge.group, pages)
        return needed

    # Windows

    def gives_back(self, turning: Iterable[Window], awaited: bool) -> bool:
        """Whether somebody waits for a page, or one of these windows changes more than the pages held and waste."""
        if awaited:
            return True
        sharing = self.sharing
        for edge in cast("Iterable[Edge]", turning):
            if sharing and not self._is_steady(edge):
                return True
            if not edge.steady and (edge.window == 1 or self._passed(edge, edge.turn) > edge.freed):
                return True
        return False

    def look_at_windows(self) -> None:
        """All who leave and come with a step have: look at who is alone with the pages that windows entered."""
        for edge in self.moved:
            if edge.own or not edge.moving:
                continue
            if edge in edge.sequence.edges:
                self._claim(edge)
        self.moved.clear()

    def _is_steady(self, edge: Edge) -> bool:
        """Whether a window leaves a page that is all dead, for one that its sequence has alone, or is yet to take."""
        if not edge.steady or not self.sharing:
            return edge.steady
        following = edge.table[edge.freed + 1 : edge.freed + 2]
        return not following or self.num_holders(edge.group, following[0]) == 1

    def _passed(self, edge: Edge, tokens: int) -> int:
        """Pages that a window leaves behind with token number `tokens`."""
        return (tokens - edge.window) // self.block_size

    def _move_windows(self, sequence: Sequence, tokens: int) -> None:
        """Let one sequence's windows give back, maybe before others whose turn it is in order of arrival."""
        for edge in self.holdings[sequence].edges:
            if tokens >= edge.turn:
                self.walker = sequence
                self._move(edge, tokens)
        self.walker = None

    def _move(self, edge: Edge, tokens: int) -> None:
        """A window gives back what leaves it with token number `tokens`, and moves through another page."""
        if self._is_steady(edge):
            self._pass([edge])
            return
        self._disclaim(edge)
        edge.moving = True
        self._give_back(edge, self._passed(edge, tokens))
        edge.turn = edge.window + (edge.freed + 1) * self.block_size
        if self.sharing or edge.window == 1:
            self.moved.append(edge)
        else:
            self._claim(edge)

    def _pass(self, edges: list[Edge]) -> None:
        """Steady windows leave a page of waste each; as many tokens go on to die."""
        slots = self.pass_pages(edges)
        self.num_held -= slots
        self.num_internal -= slots
        self.gave_back = True

    def _give_back(self, edge: Edge, freed: int) -> None:
        """Return the pages before index `freed`, the deepest first."""
        if freed <= edge.freed:
            return
        table, group = edge.table, self.groups[edge.group]
        self.leave(edge, freed)
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
        self.give_back(edge, pages)
