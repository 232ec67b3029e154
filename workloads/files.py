"""Text files: read in blocks of lines, plain or gzipped, with the place of every line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sim.errors import UserError
from sim.registry import nearest

BLOCK = 1 << 18
"""Characters read at once, to the end of the line."""


@dataclass(frozen=True, slots=True)
class Block:
    """Lines of a file that follow each other; the first of them is number `first`, counted from 1."""

    path: Path
    first: int
    lines: list[str]

    def numbered(self) -> Iterator[tuple[int, str]]:
        """The lines that are not blank, with their numbers."""
        return ((number, line) for number, line in enumerate(self.lines, self.first) if not line.isspace())

    def where(self, row: int) -> str:
        """`file:line` of a row, counted from 0 over the lines that are not blank."""
        numbers = [number for number, _ in self.numbered()]
        return f"{self.path}:{numbers[row]}"


def blocks(path: Path) -> Iterator[Block]:
    """The file's lines in order, never all in memory.

    Files that begin like gzip are unpacked; a byte order mark is dropped, any line end is taken, and bytes
    that are not UTF-8 are replaced. Raises UserError if the file cannot be read.
    """
    first = 1
    try:
        with path.open("rb") as raw, _text(raw) as file:
            while lines := file.readlines(BLOCK):
                yield Block(path, first, lines)
                first += len(lines)
    except FileNotFoundError:
        guess = nearest(path.name, _neighbours(path))
        hint = f"; did you mean {str(path.with_name(guess))!r}?" if guess else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _text(raw: io.BufferedReader) -> io.TextIOWrapper:
    binary = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace")


def _neighbours(path: Path) -> list[str]:
    try:
        return [other.name for other in path.parent.iterdir() if other.is_file()]
    except OSError:
        return []
