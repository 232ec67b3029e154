"""JSON lines: files of one object a line, read as columns in blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.errors import UserError
from sim.registry import nearest
from workloads.columns import Cell, Column
from workloads.files import Block, blocks

Objects = list[dict[str, Any]]

_NUMBERS = {int, float}


def read_json_lines(
    path: Path, wanted: Sequence[Column]
) -> Iterator[tuple[Block, Objects, list[NDArray[np.int64]]]]:
    """The objects of a file and their wanted members as columns, each block with the lines that it came from.

    The first object tells the names for all. Raises UserError with `file:line` for a line that is no JSON
    object, a missing member, one that is not as its column expects, and an empty file.
    """
    members: list[tuple[str, Cell]] | None = None
    for block in blocks(path):
        objects = _objects(block)
        if not objects:
            continue
        if members is None:
            names = list(objects[0])
            found = [column.find(names, block.where(0)) for column in wanted]
            members = [(names[place], cell) for place, cell in found]
        yield block, objects, [_column(block, objects, name, cell) for name, cell in members]
    if members is None:
        raise UserError(f"{path}:1: the file is empty, expected a JSON object on every line")


def member(block: Block, objects: Objects, name: str) -> list[Any]:
    """One member of every object. Raises UserError for the first object without it."""
    try:
        return [entry[name] for entry in objects]
    except KeyError:
        row = next(row for row, entry in enumerate(objects) if name not in entry)
        guess = nearest(name, list(objects[row]))
        hint = f"; did you mean {name!r} instead of {guess!r}?" if guess else ""
        got = ", ".join(objects[row]) or "an empty object"
        raise UserError(f"{block.where(row)}: no member {name!r}: got {got}{hint}") from None


def _objects(block: Block) -> Objects:
    try:
        # One call for all lines is three times as fast as one for each.
        objects = json.loads(f"[{','.join(block.lines)}]")
        if len(objects) == len(block.lines) and set(map(type, objects)) == {dict}:
            return objects  # type: ignore[no-any-return]
    except (ValueError, RecursionError):
        pass
    return [_object(f"{block.path}:{number}", line) for number, line in block.numbered()]


def _object(where: str, line: str) -> dict[str, Any]:
    line = line.rstrip()
    shown = repr(line if len(line) <= 60 else line[:60] + "...")
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.colno}: not JSON: {error.msg}: got {shown}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}: got {shown}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: got {shown}, expected a JSON object")
    return entry


def _column(block: Block, objects: Objects, name: str, cell: Cell) -> NDArray[np.int64]:
    values = member(block, objects, name)
    try:
        return _converted(values, cell)
    except (ValueError, OverflowError):
        for row, value in enumerate(values):
            try:
                _converted([value], cell)
            except (ValueError, OverflowError):
                got = json.dumps(value)
                raise UserError(f"{block.where(row)}: {name}: got {got}, expected {cell.expected}") from None
        raise


def _converted(values: list[Any], cell: Cell) -> NDArray[np.int64]:
    if not set(map(type, values)) <= _NUMBERS:
        raise ValueError("not a number")
    return cell.convert(np.array(values, dtype=np.float64))
