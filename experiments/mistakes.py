"""Mistakes: what the user has to change, where it stands, and how it is put into words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path as File
from typing import Any

from sim.errors import UserError

Path = tuple[str | int, ...]
"""Keys and list indices that lead to a value."""


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a text that the user wrote; a line of 0 means the file as a whole."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing to change. `on_key` points at the key of `path` and not at its value."""

    what: str
    path: Path = ()
    got: str = ""
    expected: str = ""
    nearest: str | None = None
    on_key: bool = False
    at: Position | None = None
    where: str = ""  # the points of a sweep at which it arises, if not at all

    def placed(self, position: Position) -> Mistake:
        """The same mistake at a place in a text, unless it has one."""
        return self if self.at else replace(self, at=position)

    def __str__(self) -> str:
        head = [str(self.at)] if self.at else []
        head += [dotted(self.path)] if self.path else []
        told = [self.what]
        told += [f"got {self.got}"] if self.got else []
        told += [f"expected {self.expected}"] if self.expected else []
        told += [f"did you mean {self.nearest!r}?"] if self.nearest else []
        where = f" (at {self.where})" if self.where else ""
        return ": ".join([*head, ", ".join(told)]) + where


class Mistakes(UserError):
    """All mistakes of an input at once, one line each, in order of their places."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        ordered = sorted(mistakes, key=lambda mistake: mistake.at or Position(""))
        self.mistakes = list(dict.fromkeys(ordered))
        super().__init__("\n".join(dict.fromkeys(map(str, self.mistakes))))


def near_file(file: File) -> str | None:
    """The file beside one that is not there whose name looks most like it."""
    try:
        names = [each.name for each in file.parent.iterdir()]
    except OSError:
        return None
    near = get_close_matches(file.name, names, n=1, cutoff=0.75)  # endings are alike anyway
    return str(file.parent / near[0]) if near else None


def dotted(path: Path) -> str:
    """A path as users write it, `workload.arrivals.rate`."""
    return ".".join(map(str, path))


def shown(value: Any) -> str:
    """A value of a YAML as an error message names it."""
    if isinstance(value, dict):
        return "a mapping of " + ", ".join(map(str, value)) if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Names one after the other, the first ones where they are many."""
    known = list(names)
    rest = f", … ({len(known)} in all)" if len(known) > limit else ""
    return ", ".join(known[:limit]) + rest
