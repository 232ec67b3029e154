"""Figures of an experiment, drawn from its stored results alone; what was swept decides which are drawn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.plots.drawing import Drawing
from experiments.plots.reading import read_experiment
from experiments.plots.results import BLOCK_SIZE, Experiment
from sim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SOFTWARE = "kvsim"
_ORDER = (
    "waste_over_time",
    "waste_shares",
    "merit_bars",
    "request_rate",
    "running_batch",
    "block_size",
    "recovery",
    "hits_by_tier",
    "precision",
    "block_tables",
    "sweep_",
    "latency",
)


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure as stored: its PNG, which carries title and caption in its metadata."""

    path: Path
    title: str
    caption: str


def draw(directory: Path, progress: Callable[[Path], None] | None = None) -> list[Path]:
    """Draw all figures of `results/<name>` into its `plots/`, each as PNG and PDF; returns the PNGs.

    `progress` is called with each PNG when it is written. Figures of an earlier sweep are taken away; files
    from elsewhere stay.
    """
    from pyarrow import ArrowInvalid

    from experiments.plots.style import style

    experiment = read_experiment(directory)
    folder = directory / "plots"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); expected a folder that can be written"
        ) from None
    written: list[Path] = []
    with style():
        try:
            for name, drawing in _drawings(experiment):
                path = folder / f"{name}.png"
                _save(drawing, path)
                written.append(path)
                if progress:
                    progress(path)
        except ArrowInvalid as error:
            raise UserError(
                f"{directory}: a table of a stored run cannot be read ({error}); 'kvsim run' repeats damaged runs"
            ) from None
    for plot in stored_plots(directory):
        if plot.path not in written:
            plot.path.unlink(missing_ok=True)
            plot.path.with_suffix(".pdf").unlink(missing_ok=True)
    return written


def stored_plots(directory: Path) -> list[Plot]:
    """The figures that `draw` left in `plots/`, in order, with their captions."""
    from PIL import Image

    found = []
    for path in sorted((directory / "plots").glob("*.png"), key=_place):
        try:
            with Image.open(path) as image:
                words = dict(image.info)
        except OSError:
            continue
        if words.get("Software") == _SOFTWARE:
            found.append(Plot(path, str(words.get("Title", path.stem)), str(words.get("Description", ""))))
    return found


def _place(path: Path) -> tuple[int, str]:
    places = [i for i, start in enumerate(_ORDER) if path.name.startswith(start)]
    return (places or [len(_ORDER)])[0], path.name


def _drawings(experiment: Experiment) -> Iterator[tuple[str, Drawing]]:
    """File name and drawing of every figure that the results give."""
    from experiments.plots import (
        merits,
        precision,
        rate,
        recovery,
        requests,
        shares,
        sweep,
        tables,
        tiers,
        time,
    )

    others = [axis for axis in experiment.axes if axis not in (experiment.rate, BLOCK_SIZE)]
    makers: list[tuple[str, Callable[[], Drawing | None]]] = [
        ("waste_over_time", lambda: time.waste_over_time(experiment)),
        ("waste_shares", lambda: shares.waste_shares(experiment)),
        ("merit_bars", lambda: merits.merit_bars(experiment)),
        ("request_rate", lambda: rate.request_rate(experiment)),
        ("running_batch", lambda: time.running_batch(experiment)),
        ("block_size", lambda: sweep.block_size(experiment)),
        ("recovery", lambda: recovery.recovery(experiment)),
        ("hits_by_tier", lambda: tiers.hits_by_tier(experiment)),
        ("precision", lambda: precision.precision(experiment)),
        ("block_tables", lambda: tables.block_tables(experiment)),
        *((f"sweep_{_file_name(axis)}", lambda axis=axis: sweep.sweep(experiment, axis)) for axis in others),
        ("latency", lambda: requests.latency(experiment)),
    ]
    for name, make in makers:
        drawing = make()
        if drawing is not None:
            yield name, drawing


def _save(drawing: Drawing, path: Path) -> None:
    """Write PNG and PDF, each under another name first, so that a figure is whole or not there."""
    words = {"Title": drawing.title, "Description": drawing.caption, "Software": _SOFTWARE}
    fixed = {"Title": drawing.title, "Subject": drawing.caption, "Creator": _SOFTWARE, "CreationDate": None}
    try:
        _replace(drawing.figure, path, words)
        _replace(drawing.figure, path.with_suffix(".pdf"), fixed)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); expected a folder that can be written"
        ) from None


def _replace(figure: Figure, path: Path, metadata: Mapping[str, str | None]) -> None:
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format=path.suffix[1:], metadata=metadata)
    os.replace(part, path)


def _file_name(axis: str) -> str:
    return axis.replace(".", "_")
