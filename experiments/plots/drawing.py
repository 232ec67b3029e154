"""A figure with the words that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure, its title, and a caption that states what it shows, from the data."""

    figure: Figure
    title: str
    caption: str


def sentence(*parts: str) -> str:
    """One sentence from the parts that are not empty, with semicolons between."""
    return "; ".join(part for part in parts if part) + "."
