"""Progress: a bar on the terminal while runs are performed; nothing where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from experiments.performance import Job
from experiments.workers import Watch


@contextmanager
def bar(jobs: Sequence[Job]) -> Iterator[Watch]:
    """Shows how far the jobs are, each weighing the same, by the share of its requests that are over."""
    if not jobs or not sys.stderr.isatty():
        yield lambda index, over: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shares = [0.0] * len(jobs)
    columns = (BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=len(jobs), done=f"0/{len(jobs)} runs")

        def watch(index: int, over: int | None) -> None:
            total = jobs[index].settings["workload"].get("num_requests")
            shares[index] = 1.0 if over is None else min(0.99, over / total) if total else 0.0
            done = sum(share == 1.0 for share in shares)
            shown.update(task, completed=sum(shares), done=f"{done}/{len(jobs)} runs")

        yield watch
