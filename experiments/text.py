"""Text: aligned columns for the terminal, and settings in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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


def tier_told(tier: Mapping[str, Any]) -> str:
    """A tier in words.

    >>> tier_told({"kind": "host", "capacity_gb": 32}), tier_told({"kind": "nvme", "num_blocks": 500})
    ('host 32 GB', 'nvme 500 blocks')
    """
    name = tier.get("name") or tier["kind"]
    if tier.get("num_blocks") is not None:
        return f"{name} {tier['num_blocks']:,} blocks"
    return f"{name} {tier['capacity_gb']:,g} GB" if "capacity_gb" in tier else str(name)
