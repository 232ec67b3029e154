"""Where windows begin: what a sequence holds in several groups of layers."""

from __future__ import annotations

from collections.abc import Iterator

from sim.request import Sequence

NULL = -1
"""In a block table: nothing, as the page fell out of the window."""


class Edge:
    """Where the window of a sequence begins in one group.

    The first `freed` pages are given back, and `left` tokens are out of the window: a fixed number while the
    prompt is computed, `num_tokens` - `window` once it moves. `own` says whether the dead tokens of its first
    page count as waste.
    """

    __slots__ = ("freed", "group", "holding", "left", "moving", "own", "sequence", "turn", "window")

    def __init__(
        self, group: int, window: int, sequence: Sequence, holding: Holding, freed: int, left: int
    ) -> None:
        self.group = group
        self.window = window
        self.sequence = sequence
        self.holding = holding
        self.freed = freed
        self.left = left
        self.turn = window  # number of the token that it gives back with next, or begins to move
        self.moving = False
        self.own = False

    def dead(self, block_size: int) -> int:
        """Tokens in the first page that are out of the window."""
        left = self.sequence.num_tokens - self.window if self.moving else self.left
        return left - self.freed * block_size


class Holding:
    """What one sequence holds: a table of pages per group, `rows` of them where tokens stand."""

    __slots__ = ("done", "edges", "found", "registered", "rows", "tables")

    def __init__(self, tables: list[list[int]]) -> None:
        self.tables = tables
        self.rows = 0
        self.registered = 0  # leading rows that can be found
        self.found = 0  # of them, those that were found at admission
        self.edges: list[Edge] = []
        self.done = False

    def pages(self) -> Iterator[tuple[int, int]]:
        """Group and page of all that is held."""
        return ((group, page) for group, table in enumerate(self.tables) for page in table if page != NULL)
