"""`kvsim validate`: the attention core against plain attention over its whole matrix."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from experiments.text import aligned

if TYPE_CHECKING:
    from attention.validation.validate import Row

HEADER = ("property", "implementation", "type", "cases", "worst error", "bound", "share", "ok")
NUMBERS = (False, False, False, True, True, True, True, False)


def run_validate(device: str) -> int:
    """Print the table of errors; 0 if every bound holds, else 1.

    Raises UserError for a device that is not there.
    """
    from attention.calibration.measuring import find_device, one_thread
    from attention.validation.validate import implementations, validate

    where = find_device(device)
    with one_thread(), _line() as progress:
        rows = validate(where, progress=progress)
    print(
        f"paged attention on {where} against plain attention in float64: {', '.join(implementations(where))}\n"
    )
    print("\n".join(table(rows)))
    over = [row for row in rows if not row.ok]
    print(f"\n{sum(row.cases for row in rows):,} comparisons, {told(over)}")
    return 1 if over else 0


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines under a header."""
    lines: list[Sequence[str]] = [HEADER]
    for row in rows:
        share = "-" if not row.bound else f"{row.share:.3f}"
        figures = str(row.cases), f"{row.error:.2e}", f"{row.bound:.2e}", share
        lines.append((row.name, row.implementation, row.dtype, *figures, "ok" if row.ok else "OVER"))
    return aligned(lines, NUMBERS)


def told(over: Sequence[Row]) -> str:
    """What is over its bound, in words."""
    if not over:
        return "all within their bounds"
    names = [f"{row.name} ({row.implementation}, {row.dtype})" for row in over]
    return f"over their bounds: {'; '.join(names)}"


@contextmanager
def _line() -> Iterator[Callable[[str], None]]:
    """What is being validated, on one line of the terminal; nothing where nobody watches."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update
