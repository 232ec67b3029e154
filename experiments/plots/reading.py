"""Reads the runs of an experiment from its folder: finds policies and axes in what was swept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from experiments.plots.labels import policy_labels
from experiments.plots.results import SESSION_RATE, Experiment, Run
from sim.errors import UserError

REQUEST_RATE = "workload.arrivals.rate"
_SIZE = re.compile(r"\s*([\d.]+)\s*([KMGT]i?)?B?\s*", re.IGNORECASE)
_LETTERS = " KMGT"
_NOT_SWEPT = ("run_id", "replication", "seed")  # a swept seed gives further replications


def read_experiment(directory: Path) -> Experiment:
    """Read `runs.parquet` and the manifests beside it. Raises UserError where there is nothing to draw."""
    rows = _rows(directory)
    summary_keys = _summary_keys(rows)
    swept = [key for key in rows[0] if key not in summary_keys and key not in _NOT_SWEPT]
    configs = [_config(manifest(directory / str(row["run_id"]))) for row in rows]
    columns = {path: list(map(_value, configs, [path] * len(rows), rows)) for path in swept}

    numbers = {path: _numbers(path, values) for path, values in columns.items()}
    words = [path for path, values in numbers.items() if values is None]
    settings = _settings(columns, words, len(rows))
    free = {path: values for path, values in numbers.items() if values and _varies(values, settings)}
    fixed = [path for path in swept if path not in free]
    if any((config.get("workload") or {}).get("session") for config in configs):
        free = {SESSION_RATE if path == REQUEST_RATE else path: values for path, values in free.items()}
    axes, tied = _untied(free)
    settings = _settings(columns, fixed, len(rows))
    first = {key: settings.index(key) for key in settings}
    told = [configs[i] or {path: rows[i][path] for path in fixed} for i in first.values()]
    policies = dict(zip(first, _distinct(policy_labels(told, free)), strict=True))

    repeats = sorted({(row.get("seed") or 0, row.get("replication") or 0) for row in rows})
    runs = [
        Run(
            run_id=str(row["run_id"]),
            folder=directory / str(row["run_id"]),
            replication=repeats.index((row.get("seed") or 0, row.get("replication") or 0)),
            policy=policies[settings[i]],
            at={axis: axes[axis][i] for axis in axes},
            summary={key: row[key] for key in summary_keys if key in row},
        )
        for i, row in enumerate(rows)
    ]
    runs.sort(key=lambda run: run.replication)
    values = {axis: sorted(set(column)) for axis, column in axes.items()}
    return Experiment(directory, list(policies.values()), values, tied, runs)


def _settings(columns: dict[str, list[Any]], paths: list[str], runs: int) -> list[tuple[str, ...]]:
    """For each run its values on some swept paths, as one key."""
    return [tuple(repr(columns[path][i]) for path in paths) for i in range(runs)]


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run, empty if the run's folder is gone."""
    try:
        loaded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{folder / 'manifest.json'}: not JSON ({error}); expected the file that 'kvsim run' wrote"
        ) from None
    return loaded if isinstance(loaded, dict) else {}


def _rows(directory: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = "expected the folder of an experiment as 'kvsim run' leaves it, with runs.parquet in it"
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder; {expected}")
    table = directory / "runs.parquet"
    if not table.is_file():
        inside = sorted(path.parent.name for path in directory.glob("*/runs.parquet"))
        if inside:
            hint = f"; did you mean {directory / inside[0]}?"
        elif (directory.resolve().parent / "runs.parquet").is_file():
            hint = f"; {directory} is one run, did you mean {directory.parent}?"
        else:
            hint = ""
        raise UserError(f"{directory}: no runs to draw, runs.parquet is missing; {expected}{hint}")
    try:
        rows = pq.read_table(table).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{table}: cannot be read ({error}); expected the table that 'kvsim run' wrote"
        ) from None
    if not rows:
        raise UserError(f"{table}: holds no runs; expected one row per finished run")
    if "run_id" not in rows[0]:
        raise UserError(f"{table}: no column run_id; got {', '.join(rows[0])}")
    return list(rows)


def _summary_keys(rows: list[dict[str, Any]]) -> list[str]:
    """Columns of runs.parquet that are figures of the summary, not swept paths: it starts with duration_s."""
    names = list(rows[0])
    return names[names.index("duration_s") :] if "duration_s" in names else []


def _config(loaded: dict[str, Any]) -> dict[str, Any]:
    config = loaded.get("config")
    return config if isinstance(config, dict) else {}


def _value(config: dict[str, Any], path: str, row: dict[str, Any]) -> Any:
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return row[path]
        value = value[part]
    # Of a swept mapping only what was written there counts: the configuration also has what other axes put in.
    return row[path] if isinstance(value, dict) else value


def _numbers(path: str, values: list[Any]) -> list[float] | None:
    """The values as floats if each is a number or a size such as `12 GiB` (then in GiB), else None."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        scale = 2.0**30 if path == "kv_memory" else 1.0
        return [value / scale for value in values]
    sizes = [_SIZE.fullmatch(value) if isinstance(value, str) else None for value in values]
    if not all(sizes):
        return None
    return [float(size[1]) * _unit(size[2]) / 2.0**30 for size in sizes if size]


def _unit(prefix: str | None) -> float:
    letter = (prefix or " ")[0].upper()
    return (1024.0 if (prefix or "").endswith("i") else 1000.0) ** _LETTERS.index(letter)


def _varies(values: list[float], settings: list[tuple[str, ...]]) -> bool:
    """True if a number takes more than one value within one setting of all that is not a number."""
    seen: dict[tuple[str, ...], set[float]] = {}
    for value, key in zip(values, settings, strict=True):
        seen.setdefault(key, set()).add(value)
    return any(len(found) > 1 for found in seen.values())


def _untied(free: dict[str, list[float]]) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Axes, and for each the numbers that were zipped with it and so move with it."""
    axes: dict[str, list[float]] = {}
    tied: dict[str, list[str]] = {}
    for path, values in free.items():
        leader = next(
            (axis for axis in axes if len(set(zip(axes[axis], values, strict=True))) == len(set(axes[axis]))),
            None,
        )
        if leader is None:
            axes[path] = values
        else:
            tied.setdefault(leader, []).append(path)
    return axes, tied


def _distinct(labels: list[str]) -> list[str]:
    """Labels, numbered where two are alike."""
    return [
        f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]
