"""Rows of recorded files, and who performs what they say: what the drivers of all engines share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

Row = dict[str, Any]


class Driver(Protocol):
    """Performs the operations of one recorded scenario on ours."""

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One operation: what it returns, and the state afterwards."""

    def check_integrity(self) -> None:
        """Recount our own books."""

    @property
    def gave_up(self) -> bool:
        """Whether ours gave a group up where the engine died; nothing can be compared after that."""


class Misuse(Exception):
    """An operation that nobody can have asked for: it names what is not there, or what is there already."""


def canonical(tables: dict[str, list[int]]) -> dict[str, list[int]]:
    """Tables with blocks renumbered in order of appearance, as the files have them."""
    labels: dict[int, int] = {}
    return {
        name: [labels.setdefault(block, len(labels)) for block in tables[name]]
        for name in sorted(tables, key=lambda name: (len(name), name))
    }


def histogram(counts: Iterable[int]) -> dict[str, int]:
    """Each number but 0 to how often it occurs."""
    return {str(count): number for count, number in sorted(Counter(counts).items()) if count}
