"""Text: aligned columns for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]], numbers: Sequence[bool] = (), gap: str = "  ") -> list[str]:
    """Rows as lines with their cells under each other; cells of a numeric column stand to the right."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [*numbers, *[False] * (len(widths) - len(numbers))]
    return [
        gap.join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in table
    ]


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title over aligned columns, the first to the left, the others to the right."""
    numbers = [False, *[True] * (len(header) - 1)]
    return "\n".join([title, *aligned([header, *rows], numbers)]) + "\n"
