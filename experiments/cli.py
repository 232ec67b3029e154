"""The command line: what every command of kvsim does, and what its exit codes mean."""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments.options import MISTAKE, parser

DONE, FAILED, INTERRUPTED = 0, 1, 130
SAME_INTERRUPT_S = 3.0
"""Seconds after an interrupt in which another says nothing new."""
_PACKAGES = ("sim", "workloads", "attention", "experiments")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as under nohup
        signal.signal(signal.SIGINT, _Interrupts())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show is no reason to stop
    try:
        code = run_command(sys.argv[1:] if arguments is None else arguments)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done but to go
    sys.exit(code)


class _Interrupts:
    """Answers SIGINT: several in quick succession are one, so that what an interrupt cleans up is not cut short."""

    def __init__(self) -> None:
        self.heard = -math.inf

    def __call__(self, number: int, frame: object) -> None:
        if time.monotonic() - self.heard > SAME_INTERRUPT_S:
            self.heard = time.monotonic()
            raise KeyboardInterrupt


def run_command(arguments: Sequence[str]) -> int:
    """Run a command; 0 done, 1 a check or a point failed, 2 the user's mistake."""
    top = parser()
    _refuse_unknown_command(top, arguments)
    options = top.parse_args(arguments)
    if options.version:
        from experiments.identity import version

        print(f"kvsim {version()}")
        return DONE
    if options.command is None:
        top.print_help()
        return MISTAKE
    try:
        code = _COMMANDS[options.command](options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        stored = "; what is stored stays, the same command goes on from there"
        return _say(f"interrupted{stored if options.command == 'run' else ''}", INTERRUPTED)
    except BrokenPipeError:  # kvsim list | head
        _close_stdout()
        return DONE
    except Exception as error:
        if options.debug:
            raise
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(_PACKAGES):
            here = "run pip install -e . in kvsim's folder, and use that environment's Python"
            return _say(f"kvsim: {error.name} is not installed: {here}", MISTAKE)
        if isinstance(error, OSError) and error.errno is not None:
            where = error.filename or "standard output"
            if not error.filename:
                _close_stdout()  # what it holds cannot be written at the end either
            return _say(f"kvsim: {where}: {str(error.strerror).lower()}", FAILED)
        from sim.errors import UserError

        if isinstance(error, UserError):
            return _say(str(error), MISTAKE)
        if isinstance(error, OSError):
            return _say(f"kvsim: {error}", FAILED)
        return _say(f"kvsim: {type(error).__name__}: {error} (a fault of kvsim; --debug shows where)", FAILED)


def _refuse_unknown_command(top: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    word = next((argument for argument in arguments if not argument.startswith("-")), None)
    if word is None or word in _COMMANDS:
        return
    from difflib import get_close_matches

    near = get_close_matches(word, _COMMANDS, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else ""
    top.error(f"unknown command, got {word!r}, expected one of {', '.join(_COMMANDS)}{hint}")


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _tell(message: str) -> None:
    """Print, where somebody still reads; who does not shall not stop the rest of a run (kvsim run | head)."""
    try:
        print(message, flush=True)
    except BrokenPipeError:
        _close_stdout()


def _close_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(options: argparse.Namespace) -> int:
    from experiments.config import load
    from experiments.progress import bar
    from experiments.remarks import remarks
    from experiments.summary_table import summary_table, tell
    from experiments.sweep import run_sweep

    plan = load(options.config, options.sets, probe=not options.no_probe)
    outcome = run_sweep(plan, options.out, options.jobs, bar)
    if outcome.rows:
        _tell(summary_table(outcome.rows, plan.swept))
        for line in [*tell(outcome.rows), *remarks(outcome.rows, outcome.folder)]:
            _tell(line)
    for failure, points in outcome.failures.items():
        others = f" and {len(points) - 1} more" if len(points) > 1 else ""
        told = failure.details if options.debug else failure.message
        _say(f"failed: {points[0]}{others}: {told}", FAILED)
    stored = f", {outcome.reused} of them stored before" if outcome.reused else ""
    _tell(f"{_counted(len(outcome.rows))} in {outcome.folder}{stored}")
    if outcome.rows and not options.no_plots:
        _draw(outcome.folder)
    if any(failure.mistake for failure in outcome.failures):
        return MISTAKE
    return FAILED if outcome.failures else DONE


def _counted(runs: int) -> str:
    return f"{runs} run{'s' if runs != 1 else ''}"


def _draw(folder: Path) -> None:
    from experiments.plots.stored import draw
    from experiments.report import write_report

    _tell(f"plots: {len(draw(folder))} in {folder / 'plots'}")
    _tell(f"report: {write_report(folder)}")


def _check(options: argparse.Namespace) -> int:
    from experiments.config import load
    from experiments.rehearsal import read_traces

    plan = load(options.config, options.sets)
    requests = read_traces(point.settings for point in plan.points)
    read = f", {requests:,} requests of traces read" if requests else ""
    print(f"{options.config}: ok, {_counted(len(plan.points) * plan.replications)}{read}")
    return DONE


def _list(options: argparse.Namespace) -> int:
    from experiments.listing import listing
    from experiments.plugins import load_all

    load_all(options.plugins)
    print(listing(options.kind))
    return DONE


def _schema(options: argparse.Namespace) -> int:
    import json

    from experiments.config import experiment_schema
    from experiments.plugins import load_all

    load_all(options.plugins)

    print(json.dumps(experiment_schema().json_schema(), indent=1))
    return DONE


def _plot(options: argparse.Namespace) -> int:
    from experiments.plots.stored import draw

    _look_at_runs(options.directory)
    for path in draw(options.directory):
        print(path)
    return DONE


def _report(options: argparse.Namespace) -> int:
    from experiments.report import write_report

    _look_at_runs(options.directory)
    print(write_report(options.directory))
    return DONE


def _look_at_runs(directory: Path) -> None:
    """Raises UserError for a damaged run; runs whose folders are gone are told, as what needs them is not drawn."""
    from experiments.mistakes import listed
    from experiments.plots.reading import read_experiment
    from experiments.results import check_tables

    folders = [run.folder for run in read_experiment(directory).runs]
    check_tables(folders)
    gone = [folder.name for folder in folders if not folder.is_dir()]
    if gone:
        told = f"the folders of {len(gone)} of {len(folders)} runs are missing: {listed(gone, 5)}"
        _say(f"{directory}: {told}; figures of what they hold leave them out", DONE)


def _validate(options: argparse.Namespace) -> int:
    from experiments.validate import run_validate

    return run_validate(options.device)


def _calibrate(options: argparse.Namespace) -> int:
    from experiments.calibrate import run_calibrate

    return run_calibrate(options.device, options.out, options.quick)


def _parity(options: argparse.Namespace) -> int:
    from experiments.parity.replay import run_parity

    return run_parity(options.files)


def _hit_rate(options: argparse.Namespace) -> int:
    from experiments.hit_rate import run_hit_rate

    print(run_hit_rate(options.trace, options.format, options.capacity, options.eviction), end="")
    return DONE


def _fit(options: argparse.Namespace) -> int:
    from experiments.fit import run_fit

    run_fit(options.config, options.sets, options.measured, options.out, blocks=options.blocks)
    return DONE


def _compare(options: argparse.Namespace) -> int:
    from experiments.fit import run_compare

    run_compare(options.config, options.sets, options.measured)
    return DONE


def _demo(options: argparse.Namespace) -> int:
    from experiments.demo import run_demo

    return run_demo()


def _bench(options: argparse.Namespace) -> int:
    from experiments.bench.suite import run_bench

    return run_bench(options.name)


_COMMANDS = {
    "run": _run, "check": _check, "list": _list, "schema": _schema, "plot": _plot, "report": _report,
    "validate": _validate, "calibrate": _calibrate, "parity": _parity, "hit-rate": _hit_rate,
    "fit": _fit, "compare": _compare, "demo": _demo, "bench": _bench,
}  # fmt: skip
