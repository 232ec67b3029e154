"""Calibration: what a device's operators take over a grid of shapes, as costs fitted to it with their errors."""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from attention.calibration import measuring
from attention.calibration.fitting import Errors, Observation, fit, monotone, predict
from attention.calibration.grid import GRIDS, TERMS, Case, Grid, cases
from attention.calibration.measuring import Stopwatch, find_device
from attention.calibration.precision import cache_errors
from attention.calibration.trials import Bench, capturable, default_dtype
from sim.timing.profile import Curve

DIGITS = 4

Progress = Callable[[int, int], None]
Measured = list[tuple[Case, float]]


def calibrate(
    device: str = "auto", quick: bool = False, progress: Progress | None = None, grid: Grid | None = None
) -> dict[str, Any]:
    """A profile of a device as plain data, as `sim.timing.profile.Profile` describes it.

    Args:
        device: auto, cpu, cuda, cuda:1.
        quick: A small grid, which takes seconds instead of minutes.
        progress: Called with (measured, all) calls to measure.
        grid: Another grid than those of the device.

    Raises UserError for a device that is not there.
    """
    place = find_device(device)
    grid = grid or GRIDS[place.type, quick]
    dtype = default_dtype(place)
    copy, read = measuring.bandwidths(place)
    with torch.no_grad():
        measured = measure(
            list(cases(grid, Bench(place, dtype, grid.num_bytes(dtype.itemsize)))),
            place,
            grid.passes,
            progress,
        )
    profile: dict[str, Any] = {
        "device": measuring.device_name(place),
        "kind": place.type,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "copy_gb_per_s": rounded(copy / 1e9),
        "read_gb_per_s": rounded(read / 1e9),
    }
    errors, residuals = {}, {}
    for term in TERMS:
        profile[term], errors[term], residuals[term] = fitted(
            term, [pair for pair in measured if pair[0].term == term]
        )
    shapes = {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(grid).items()
    }
    shapes["heads"] = [f"{query}/{kv}x{size}" for query, kv, size in grid.heads]
    with measuring.one_thread():
        precision = cache_errors(place, dtype)
    profile["quantization"] = {
        name: {figure: rounded(value) for figure, value in figures.items()}
        for name, figures in precision.items()
    }
    return {**profile, "fit": errors, "grid": shapes, "residuals": residuals}


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    known = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("triton", "kvsim"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = "not installed"
    if torch.version.cuda:
        known["cuda"] = torch.version.cuda
    return known


def measure(
    wanted: Sequence[Case], device: torch.device, passes: int, progress: Progress | None = None
) -> Measured:
    """Every case with its seconds: the median over passes through all of them, which slow drifts of a busy machine
    reach alike; where there is one pass, of several rounds.
    """
    graphs = ("decode", "prefill", "dense") if capturable(device) else ("dense",)
    laps: list[list[float]] = [[] for _ in wanted]
    for turn in range(passes):
        for number, case in enumerate(wanted):
            watch = Stopwatch(case.calls(), device, case.term in graphs)
            laps[number].append(watch.median() if passes == 1 else watch.lap())
            if progress is not None:
                progress(turn * len(wanted) + number + 1, passes * len(wanted))
    return [(case, statistics.median(taken)) for case, taken in zip(wanted, laps, strict=True)]


def fitted(term: str, measured: Measured) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Coefficients from the cases that the fit may see; errors on these and on the others; a line for each case."""
    seen = [case.observed(seconds) for case, seconds in measured if not case.held_back]
    every = [case.observed(seconds) for case, seconds in measured]
    if term == "dense":
        coefficients, predictions = _dense(seen, every)
    else:
        found = {name: rounded(value) for name, value in fit(seen).items()}
        coefficients, predictions = dict(found), predict(found, every)
    told: dict[str, Any] = {}
    for name, held_back in (("fitted", False), ("held_back", True)):
        rows = [index for index, (case, _) in enumerate(measured) if case.held_back is held_back]
        if rows:
            errors = Errors.of([predictions[row] for row in rows], [measured[row][1] for row in rows])
            told[name] = {
                "cases": errors.calls,
                "median_error": rounded(errors.median),
                "max_error": rounded(errors.largest),
            }
    lines = [
        f"{case.name} = {seconds * 1e6:.0f} us, fit {predicted / seconds - 1:+.1%}"
        + (", held back" if case.held_back else "")
        for (case, seconds), predicted in zip(measured, predictions, strict=True)
    ]
    return coefficients, told, lines


def _dense(seen: Sequence[Observation], every: Sequence[Observation]) -> tuple[dict[str, Any], list[float]]:
    """A base, and a time per weight for every token count that the fit saw; amounts are named by token counts."""
    tokens = sorted({int(name) for seen_one in seen for name in seen_one.amounts if name.isdecimal()})
    names = ["base_us", *map(str, tokens)]
    rows = [Observation({name: one.amounts.get(name, 0.0) for name in names}, one.seconds) for one in seen]
    found = fit(rows)
    points = [rounded(value) for value in monotone([found[str(number)] for number in tokens])]
    curve, base = Curve(list(zip(tokens, points, strict=True))), rounded(found["base_us"])
    predictions = []
    for one in every:
        (name,) = (name for name in one.amounts if name.isdecimal())
        predictions.append(base * one.amounts["base_us"] + curve(int(name)) * one.amounts[name])
    by_tokens = {str(number): point for number, point in zip(tokens, points, strict=True)}
    return {"base_us": base, "ms_per_billion_weights": by_tokens}, predictions


def rounded(value: float) -> float:
    """A figure with as many digits as a measurement has."""
    return float(f"{value:.{DIGITS}g}")
