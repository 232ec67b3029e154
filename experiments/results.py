"""Results: the folder of an experiment, in which a run is there as a whole or not at all."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sim.errors import UserError

Row = dict[str, Any]
UNFINISHED = ".unfinished-"
"""Starts the names of folders that runs in flight write into."""
PARQUET = b"PAR1"


class Results:
    """`<out>/<name>/`: one folder per run, and tables of all runs of the last sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    def open(self) -> None:
        """Make the folder and keep others from writing into it. Raises UserError if it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"{UNFINISHED}probe-{os.getpid()}"
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"{self.folder}: cannot be written: {reason}, expected a folder for results (set --out)"
            ) from None
        self._take_lock()
        self.sweep_up()

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"{self.folder}: another kvsim is writing there; wait for it, or choose --out"
            ) from None
        except OSError:  # a file system without locks
            self.close()

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def sweep_up(self) -> None:
        """Remove what killed runs have left."""
        for left in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def summary(self, run_id: str) -> Row | None:
        """The summary of a stored run, None if it has to be run: it is not there, or damaged."""
        place = self.folder / run_id
        loaded = _read_json(place / "summary.json")
        whole = loaded is not None and _read_json(place / "manifest.json") is not None
        return loaded if whole and not any(damaged_tables(place)) else None

    def write_runs(self, rows: Sequence[Row]) -> None:
        """Write runs.csv and runs.parquet, one row a run in the order given."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: _uniform([row.get(name) for row in rows]) for name in names}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(
            zip(*([_cell(value) for value in column] for column in columns.values()), strict=True)
        )
        _replace(self.folder / "runs.csv", text.getvalue().encode())
        _replace(self.folder / "runs.parquet", _parquet(columns))


@contextmanager
def run_folder(folder: Path, run_id: str) -> Iterator[Path]:
    """A folder to write a run into; it takes its place when the block ends, and goes if the block fails."""
    unfinished = folder / f"{UNFINISHED}{run_id}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        place = folder / run_id
        if place.exists():  # damaged, or else it would not have been run again
            place.rename(unfinished / "replaced")
        unfinished.rename(place)
        shutil.rmtree(place / "replaced", ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def damaged_tables(place: Path) -> Iterator[Path]:
    """Tables of a run that end before they should: a parquet file begins and ends with the same four letters."""
    for table in sorted(place.glob("*.parquet")):
        try:
            with table.open("rb") as file:
                head = file.read(len(PARQUET))
                file.seek(-min(len(PARQUET), table.stat().st_size), os.SEEK_END)
                if table.stat().st_size <= 2 * len(PARQUET) or head != PARQUET or file.read() != PARQUET:
                    yield table
        except OSError:
            yield table


def check_tables(places: Iterable[Path]) -> None:
    """Raises UserError at the first table of a run that is damaged."""
    for table in itertools.chain.from_iterable(map(damaged_tables, places)):
        raise UserError(
            f"{table}: damaged, or cut short; run the experiment again (kvsim run), which replaces this run alone"
        )


def _read_json(file: Path) -> Row | None:
    """What a JSON file holds; None where it is not there, damaged or no mapping."""
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def write_json(file: Path, content: Row) -> None:
    """Write a JSON file; what is not a number becomes null."""
    file.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _replace(file: Path, content: bytes) -> None:
    fresh = file.with_name(f"{UNFINISHED}{file.name}")
    fresh.write_bytes(content)
    fresh.replace(file)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value


def _uniform(values: list[Any]) -> list[Any]:
    """One type for a column: numbers and flags as they are, a mixture or anything else as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds <= {int, float, bool, str}:
        return values
    return [flow(value) for value in values]


def flow(value: Any) -> str:
    """A value as one would write it into a line of YAML, `{kind: contiguous, reserve: max}`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return "null" if value is None else str(_cell(value))


def _parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from experiments.recording import column

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([column(values) for values in columns.values()], names=list(columns)), sink)
    return bytes(sink.getvalue())
