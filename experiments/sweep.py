"""A sweep: all points and replications of an experiment, run where they are not stored yet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from experiments import identity
from experiments.axes import WHOLE
from experiments.config import Plan
from experiments.mistakes import dotted
from experiments.performance import Failure, Job
from experiments.results import Results, Row, flow
from experiments.workers import Watch, perform_all

Display = Callable[[list[Job]], AbstractContextManager[Watch]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep came to: a row for every stored run, and why others failed, with the points that did."""

    folder: Path
    rows: list[Row]
    failures: dict[Failure, list[str]]
    reused: int


def run_sweep(plan: Plan, out: Path, processes: int | None = None, display: Display | None = None) -> Outcome:
    """Run what is not stored, then write the tables of all. Raises UserError if `out` cannot be written."""
    results = Results(out / plan.name)
    results.open()
    try:
        runs = list(_runs(plan, results.folder))
        jobs = {job.run_id: job for _, job in runs}  # points that say the same in other words run once
        todo = [job for job in jobs.values() if results.summary(job.run_id) is None]
        failures: dict[str, Failure] = {}
        try:
            with display(todo) if display else nullcontext(_nobody) as watch:
                for index, failure in perform_all(todo, processes or _cores(), watch):
                    watch(index, None)
                    if failure is not None:
                        failures[todo[index].run_id] = failure
        finally:
            results.sweep_up()
            summaries = {run_id: results.summary(run_id) for run_id in jobs}
            rows = [{**row, **figures} for row, job in runs if (figures := summaries[job.run_id]) is not None]
            if rows:
                results.write_runs(rows)
        points: dict[Failure, list[str]] = {}
        for row, job in runs:
            if job.run_id in failures:
                points.setdefault(failures[job.run_id], []).append(_told(row))
        return Outcome(results.folder, rows, points, len(jobs) - len(todo))
    finally:
        results.close()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _nobody(index: int, over: int | None) -> None:
    """Watches nothing."""


def _runs(plan: Plan, folder: Path) -> Iterator[tuple[Row, Job]]:
    """Every run in the sweep's order, with the beginning of its row in runs.csv."""
    content = cache(identity.content_hash)
    plugins = {path: content(path) for path in plan.plugins}
    for point in plan.points:
        settings = {key: value for key, value in point.settings.items() if key not in WHOLE}
        inputs = {dotted(path): content(file) for path, file in point.files.items()}
        for replication in range(plan.replications):
            run_id = identity.run_id(settings, replication, inputs, list(plugins.values()))
            manifest = {
                "name": plan.name,
                "purpose": plan.purpose,
                "run_id": run_id,
                "seed": settings["seed"],
                "replication": replication,
                "swept": point.swept,
                "config": {"name": plan.name, "replications": plan.replications, **settings},
                "written": {**point.written, "name": plan.name, "plugins": plan.plugins},
                "code": identity.code_version(),
                "inputs": plugins | {file: inputs[dotted(path)] for path, file in point.files.items()},
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            row = {"run_id": run_id, "replication": replication, **point.swept}
            yield row, Job(run_id, str(folder), settings, replication, plan.plugins, manifest)


def _told(row: Row) -> str:
    """What sets a run apart, for messages."""
    told = {key: value for key, value in row.items() if key != "run_id" and (key != "replication" or value)}
    return ", ".join(f"{key}={flow(value)}" for key, value in told.items()) or "the run"
