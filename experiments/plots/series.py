"""Numbers behind figures: exact means over time bins of recorded columns, and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_ROWS = 1 << 18  # rows held at once: a run of a million requests is read in pieces
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean over replications; `half` is half the width of its 95 % interval, 0 for a single replication."""

    value: float
    half: float


def mean(values: Sequence[float]) -> Mean:
    """Mean with its 95 % interval by Student's t, over what is a number.

    >>> mean([1.0, 2.0, 3.0])
    Mean(value=2.0, half=2.4843...)
    """
    known = [value for value in values if not math.isnan(value)]
    n = len(known)
    if not n:
        return Mean(math.nan, 0.0)
    centre = math.fsum(known) / n
    if n == 1:
        return Mean(centre, 0.0)
    deviation = math.sqrt(math.fsum((value - centre) ** 2 for value in known) / (n - 1))
    return Mean(centre, t_quantile(n - 1) * deviation / math.sqrt(n))


def alike(one: float, other: float) -> bool:
    """Whether two figures are the same within a hundredth: nothing for a caption to compare."""
    return max(one, other) <= 1.01 * min(one, other)


def t_quantile(freedom: int) -> float:
    """Student's t beyond which lie 5 % on both sides together (three digits)."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom


@dataclass(frozen=True, slots=True)
class Binned:
    """Time-weighted means of some columns over bins of time: mean i holds from edge i to edge i + 1."""

    edges: np.ndarray
    means: dict[str, np.ndarray]


def memory_over_time(folder: Path, columns: Sequence[str], width: float) -> Binned:
    """Bin a recorded `memory.parquet`, whose rows hold until the next, from its first row to its last."""
    path = folder / "memory.parquet"
    return _binned(_holding(path, columns), columns, _edges(*_span(path, "time"), width))


def steps_over_time(folder: Path, columns: Sequence[str], width: float) -> Binned:
    """Bin a recorded `steps.parquet` from time 0 on; between steps columns count as 0."""
    path = folder / "steps.parquet"
    return _binned(_lasting(path, columns), columns, _edges(0.0, _span(path, "time", "duration")[1], width))


def recorded_until(folder: Path, table: str) -> float:
    """When the rows of `memory` or `steps` end; 0 if that table was not recorded or is empty."""
    return _span(folder / f"{table}.parquet", "time", *(["duration"] if table == "steps" else []))[1]


def _edges(start: float, end: float, width: float) -> np.ndarray:
    """Bins of a width from start to end; the last one may be narrower."""
    bins = max(math.ceil((end - start) / width - 1e-9), 1)
    return np.append(start + width * np.arange(bins), end)


def column(folder: Path, table: str, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Whole columns of a recorded table as floats, None if it was not recorded or is empty."""
    import pyarrow.parquet as pq

    path = folder / f"{table}.parquet"
    if not path.is_file():
        return None
    read = pq.read_table(path, columns=list(names))
    if not read.num_rows:
        return None
    return {name: read[name].to_numpy() for name in names}


def _binned(
    pieces: Iterator[tuple[np.ndarray, dict[str, np.ndarray]]], columns: Sequence[str], edges: np.ndarray
) -> Binned:
    """Means between edges: the integral up to every edge, then differences.

    Each piece has the corners of piecewise linear integrals: instants, and integrals since the piece began.
    """
    total = {name: np.zeros_like(edges) for name in columns}
    for instants, integrals in pieces:
        for name in columns:
            total[name] += np.interp(edges, instants, integrals[name])
    width = np.diff(edges)
    return Binned(edges, {name: np.diff(integral) / width for name, integral in total.items()})


def _holding(path: Path, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Integrals of columns that hold until the next row; a piece's last row opens the next piece."""
    kept: dict[str, np.ndarray] | None = None
    for piece in _pieces(path, ["time", *columns]):
        if kept is not None:
            piece = {name: np.concatenate((kept[name], values)) for name, values in piece.items()}
        spans = np.diff(piece["time"])
        yield piece["time"], {name: _from_zero(np.cumsum(piece[name][:-1] * spans)) for name in columns}
        kept = {name: values[-1:] for name, values in piece.items()}


def _lasting(path: Path, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Integrals of columns that have their value for the step's duration and are 0 elsewhere."""
    for piece in _pieces(path, ["time", "duration", *columns]):
        start, span = piece["time"], piece["duration"]
        # Corners start, end, start, end, ...; an end may pass the next start by a rounding error.
        instants = np.maximum.accumulate(np.column_stack((start, start + span)).ravel())
        integrals = {}
        for name in columns:
            done = _from_zero(np.cumsum(piece[name] * span))
            integrals[name] = np.column_stack((done[:-1], done[1:])).ravel()
        yield instants, integrals


def _from_zero(sums: np.ndarray) -> np.ndarray:
    return np.concatenate(([0.0], sums))


def _pieces(path: Path, columns: list[str]) -> Iterator[dict[str, np.ndarray]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=columns):
            if batch.num_rows:
                yield {name: batch.column(name).to_numpy().astype(float, copy=False) for name in columns}


def _span(path: Path, *columns: str) -> tuple[float, float]:
    """First row's time, and the last row's sum of `columns`; zeros if the table is absent or empty."""
    import pyarrow.parquet as pq

    if not path.is_file():
        return 0.0, 0.0
    with pq.ParquetFile(path) as file:
        groups = [group for group in range(file.num_row_groups) if file.metadata.row_group(group).num_rows]
        if not groups:
            return 0.0, 0.0
        first = file.read_row_group(groups[0], columns=["time"])["time"][0].as_py()
        last: Any = file.read_row_group(groups[-1], columns=list(columns))
    return float(first), float(sum(last[name][-1].as_py() for name in columns))
