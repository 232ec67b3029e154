"""CSV tables with a header, read as columns in blocks: at once if all is well, line by line if it is not."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim.errors import UserError
from workloads.columns import Column
from workloads.files import Block, blocks

IGNORED = "U1"
"""numpy type of columns that nobody reads."""


def read_csv(path: Path, wanted: Sequence[Column]) -> Iterator[tuple[Block, list[NDArray[np.int64]]]]:
    """The wanted columns of a comma-separated file, each block with the lines that it came from.

    A row is a line. Raises UserError with `file:line` for a header without the wanted columns, a row with too
    many or too few fields, an entry that is not as its column expects, and a file without rows.
    """
    table: _Table | None = None
    empty = True
    for block in blocks(path):
        if table is None:
            header = next(block.numbered(), None)
            if header is None:
                continue
            number, line = header
            table = _Table(f"{path}:{number}", line, wanted)
            block = Block(path, number + 1, block.lines[number + 1 - block.first :])
        columns = table.columns(block)
        if len(columns[0]):
            empty = False
            yield block, columns
    if table is None:
        names = ", ".join(column.names[0] for column in wanted)
        raise UserError(f"{path}:1: the file is empty, expected a header such as {names}")
    if empty:
        raise UserError(f"{path}: no rows under the header")


class _Table:
    """The columns that a header promises."""

    def __init__(self, where: str, line: str, wanted: Sequence[Column]) -> None:
        self.names = [name.strip() for name in _fields(line, where)]
        found = [column.find(self.names, where) for column in wanted]
        self.places = [place for place, _ in found]
        self.cells = [cell for _, cell in found]
        types = {place: cell.dtype for place, cell in found}
        self.dtype = [(str(place), types.get(place, IGNORED)) for place in range(len(self.names))]

    def columns(self, block: Block) -> list[NDArray[np.int64]]:
        """The block's rows, column by column."""
        try:
            return self._quickly(block)
        except ValueError:
            return self._carefully(block)

    def _quickly(self, block: Block) -> list[NDArray[np.int64]]:
        """All rows at once. Raises ValueError if anything about them is unusual."""
        lines = block.lines
        if not any(not line.isspace() for line in lines):
            return [np.empty(0, dtype=np.int64) for _ in self.cells]
        raw = np.loadtxt(lines, dtype=self.dtype, delimiter=",", comments=None, quotechar='"', ndmin=1)
        if len(raw) != len(lines) and len(raw) != sum(1 for _ in block.numbered()):
            raise ValueError("a row is not a line")
        return [cell.convert(raw[str(place)]) for place, cell in zip(self.places, self.cells, strict=True)]

    def _carefully(self, block: Block) -> list[NDArray[np.int64]]:
        """Row by row, to find the one that is wrong, or to take what is unusual but right."""
        rows = [self._row(f"{block.path}:{number}", line) for number, line in block.numbered()]
        return [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]

    def _row(self, where: str, line: str) -> list[int]:
        fields = _fields(line, where)
        if len(fields) != len(self.names):
            raise UserError(
                f"{where}: wrong number of fields: got {len(fields)}, expected {len(self.names)} "
                f"({', '.join(self.names)})"
            )
        row = []
        for place, cell in zip(self.places, self.cells, strict=True):
            try:
                row.append(int(cell.convert(np.array([fields[place].strip()]).astype(cell.dtype))[0]))
            except ValueError:
                got = fields[place]
                raise UserError(
                    f"{where}: {self.names[place]}: got {got!r}, expected {cell.expected}"
                ) from None
        return row


def _fields(line: str, where: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error as error:
        raise UserError(f"{where}: not a row of comma-separated fields: {error}") from None
