"""Where windows begin: what a sequence holds in several groups of layers."""

from __future__ import annotations

from collections.abc import Iterator

from sim.pools.prefix_pool import Unnamed
from sim.request import Sequence

NULL = -1
"""In a block table: nothing, as the page fell out of the window."""


class Edge:
    """Where the window of a sequence begins in one group.

    The first `freed` pages are given back, and `left` tokens are out of the window: a fixed number while the
    prompt is computed, `num_tokens` - `window` once it moves. `own` says whether the dead tokens of its first
    page count as waste, `steady` whether the next page that it leaves will all be dead, and count as such.
    """

    __slots__ = (
        "first", "freed", "given", "group", "left", "mark", "moving", "own", "sequence", "steady",
        "table", "turn", "window",
    )  # fmt: skip

    def __init__(
        self, group: int, window: int, sequence: Sequence, table: list[int], freed: int, left: int
    ) -> None:
        self.group = group
        self.window = window
        self.sequence = sequence
        self.table = table
        self.freed = self.first = freed
        self.left = left
        self.turn = window  # number of the token that it gives back with next, or begins to move
        self.moving = self.own = self.steady = False
        self.given: list[
            int
        ] = []  # pages that it gave back without a name, and others, from index `first` on
        self.mark = Unnamed()  # what they are known by until they are handed out


class Holding:
    """What one sequence holds: a table of pages per group, and in one of them all its tokens' rows."""

    __slots__ = ("done", "edges", "found", "packed", "registered", "rows_of", "spare", "tables")

    def __init__(self, tables: list[list[int]], rows_of: list[int]) -> None:
        self.tables = tables
        self.rows_of = rows_of
        self.registered = 0  # leading rows that can be found
        self.found = 0  # of them, those that were found at admission
        self.edges: list[Edge] = []
        self.packed: list[
            dict[int, int]
        ] = []  # by group: large pages, and how many pages of each are its own
        self.spare: list[list[int]] = []  # by group: pages for the states of branches that are to come
        self.done = False

    @property
    def rows(self) -> int:
        """Pages of every group where tokens stand, those given back included."""
        return len(self.rows_of)

    def left_tables(self) -> list[list[int]]:
        """The tables behind what windows gave back."""
        tables = self.tables
        if not self.edges:
            return tables
        tables = [*tables]
        for edge in self.edges:
            if edge.freed:
                tables[edge.group] = edge.table[edge.freed :]
        return tables

    def pages(self) -> Iterator[tuple[int, int]]:
        """Group and page of all that is held."""
        return ((group, page) for group, table in enumerate(self.tables) for page in table if page != NULL)
