"""Columns: which names a column goes by, and how its entries become whole numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.errors import UserError
from sim.units import FOREVER, SECOND

UNITS = {"_ns": 1, "_us": 1_000, "_ms": 1_000_000, "_s": SECOND}
"""Endings of a name that tell the unit of a time, in ns."""


class Cell(ABC):
    """How the entries of a column become whole numbers."""

    dtype: str = "f8"
    """numpy type that an entry is read as."""
    expected: str
    """What an entry has to be, for error messages."""

    @abstractmethod
    def convert(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        """Whole numbers, entry by entry. Raises ValueError if any entry is not as expected."""


class TokenCount(Cell):
    """A number of tokens."""

    expected = "a whole number of tokens from 0 to 2147483647"

    def convert(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        """The same number."""
        if not ((raw >= 0) & (raw < 1 << 31) & (raw == np.floor(raw))).all():
            raise ValueError(self.expected)
        return raw.astype(np.int64)


class Clock(Cell):
    """A time since the start of the trace, in a unit of so many ns."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        name = {1: "nanoseconds", 1_000: "microseconds", 1_000_000: "milliseconds", SECOND: "seconds"}[unit]
        self.expected = f"a time in {name} from 0 to {FOREVER / unit:.3g}"

    def convert(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        """ns, ties to even."""
        with np.errstate(over="ignore"):
            times = raw * float(self.unit)
        if not ((times >= 0) & (times < FOREVER)).all():
            raise ValueError(self.expected)
        return np.rint(times).astype(np.int64)


class UtcStamp(Cell):
    """A date and time of day in UTC, with up to nine digits of a second."""

    dtype = "S40"
    expected = "a time such as 2023-11-16 18:17:03.9799600, with or without +00:00"

    def convert(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        """ns since 1970."""
        raw = np.strings.replace(raw, b"+00:00", b"")
        # numpy itself would take "now", a year alone and any offset.
        lengths = np.strings.str_len(raw)
        dashes = np.strings.count(raw, b"-") == 2
        if not (dashes & (lengths >= 19) & (lengths <= 29)).all() or np.strings.count(raw, b"+").any():
            raise ValueError(self.expected)
        times = raw.astype("S29").astype("M8[ns]")
        if np.isnat(times).any():
            raise ValueError(self.expected)
        return times.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Column:
    """What a column holds, the names that it goes by, and how to read it under the name that was found.

    Names are compared without regard to case, spaces, hyphens and underscores.
    """

    what: str
    names: Sequence[str]
    cell: Callable[[str], Cell]
    shown: str = ""  # the names as error messages list them
    option: str = ""  # the field of the format by which users name theirs

    def find(self, header: Sequence[str], where: str) -> tuple[int, Cell]:
        """The column's place in a header, and its cell. Raises UserError if it is not there."""
        plain = [_plain(name) for name in header]
        for name in self.names:
            if _plain(name) in plain:
                return plain.index(_plain(name)), self.cell(name)
        pairs = ((_likeness(one, other), one, other) for one in header for other in self.names)
        likeness, wrong, right = max(pairs, default=(0.0, "", ""))
        hint = f"; did you mean {right!r} instead of {wrong.strip()!r}?" if likeness > 0.6 else ""
        mapped = f" ({self.option} names a column that is called otherwise)" if self.option else ""
        got = ", ".join(name.strip() for name in header) or "none"
        raise UserError(
            f"{where}: no column for {self.what}: got {got}; "
            f"expected {self.shown or ', '.join(self.names)}{hint}{mapped}"
        )


def named(what: str, name: str, cell: Cell) -> Column:
    """A column that has one name only."""
    return Column(what, (name,), lambda _: cell)


def chosen(column: Column, name: str | None, option: str) -> Column:
    """The column that a user names by an option of the format, else the one of the usual names."""
    if not name:
        return replace(column, option=option)
    return named(column.what, name, column.cell(name))


def time_column(*stems: str) -> Column:
    """A column of times, in seconds unless its name ends in another unit."""
    names = [stem + unit for stem in stems for unit in ("", *UNITS)]
    shown = f"{', '.join(stems)} (in seconds, or with _ms, _us or _ns at the end)"
    return Column("the arrival time", names, lambda name: Clock(unit_of(name)), shown)


def unit_of(name: str) -> int:
    """The unit (ns) that the ending of a time's name tells; seconds if it tells none."""
    lower = name.strip().lower()
    return next((unit for ending, unit in UNITS.items() if lower.endswith(ending)), SECOND)


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, _plain(one), _plain(other)).ratio()


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " -_")


TOKENS = TokenCount()
ARRIVAL = time_column(
    "arrival_time", "arrived_at", "arrival", "timestamp", "req_time", "request_time", "start_time", "time"
)  # fmt: skip
PROMPT = Column(
    "prompt tokens",
    (
        "prompt_tokens", "num_prompt_tokens", "num_prefill_tokens", "prefill_tokens", "input_tokens",
        "context_tokens", "request_tokens", "input_length", "prompt_length", "input_len", "prompt_len",
        "input_toks", "input", "prompt",
    ),
    lambda _: TOKENS,
)  # fmt: skip
OUTPUT = Column(
    "output tokens",
    (
        "output_tokens", "num_output_tokens", "num_decode_tokens", "decode_tokens", "generated_tokens",
        "response_tokens", "completion_tokens", "output_length", "output_len", "output_toks", "output",
    ),
    lambda _: TOKENS,
)  # fmt: skip
