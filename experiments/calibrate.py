"""`kvsim calibrate`: the attention core measured on a device, written as a timing profile."""

from __future__ import annotations

import os
import sys
from io import StringIO
from pathlib import Path
from typing import Any

from experiments.text import aligned, table
from sim.errors import UserError

WIDTH = 160


def run_calibrate(device: str, out: Path, quick: bool) -> int:
    """Measure, print a table, write the profile; 0 if done.

    The file appears when everything is measured, or stays as it was. Raises UserError for a device that is not
    there and for a file that cannot be written, before anything is measured.
    """
    from attention.calibration.calibrate import calibrate
    from attention.calibration.measuring import find_device
    from experiments.identity import version

    find_device(device)
    fresh = _claimed(out)
    try:
        profile = calibrate(device, quick, _progress if sys.stderr.isatty() else None)
        profile["versions"]["kvsim"] = version()
        fresh.write_text(written(profile), encoding="utf-8")
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)
    print(told(profile))
    print(f"profile: {out}\nuse it: timing: {{kind: calibrated, profile: {out}}}")
    return 0


def _claimed(out: Path) -> Path:
    """The file that will take the place of `out`, made empty to see that it can be."""
    if out.is_dir():
        raise UserError(f"--out: got {out}, a folder, expected a file")
    fresh = out.with_name(f".unfinished-{out.name}-{os.getpid()}")
    try:
        fresh.touch()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--out: {out} cannot be written: {reason}") from None
    return fresh


def _progress(done: int, number: int) -> None:
    end = "\n" if done == number else ""
    print(f"\rmeasuring {done} of {number}", end=end, file=sys.stderr, flush=True)


def written(profile: dict[str, Any]) -> str:
    """The profile as YAML: mappings and lists of numbers in one line, everything else in a line of its own."""
    from ruamel.yaml import YAML

    yaml = YAML(pure=True)
    yaml.width = WIDTH
    stream = StringIO()
    stream.write(f"# Timing profile of {profile['device']}, {profile['dtype']}, made by kvsim calibrate.\n")
    yaml.dump(_styled(profile), stream)
    return stream.getvalue()


def _styled(value: Any) -> Any:
    """The same data as ruamel's types, which know how they are written."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, dict):
        keys = (int(key) if key.isdecimal() else key for key in value)
        styled: Any = CommentedMap(zip(keys, map(_styled, value.values()), strict=True))
        short = not any(isinstance(inner, dict | list) for inner in value.values())
    elif isinstance(value, list):
        styled = CommentedSeq(map(_styled, value))
        short = not any(isinstance(inner, str) for inner in value)
    else:
        return value
    if short:
        styled.fa.set_flow_style()
    return styled


def told(profile: dict[str, Any]) -> str:
    """Coefficients and errors of every term."""
    rows, costs = [], []
    for term, errors in profile["fit"].items():
        held_back = errors.get("held_back", {})
        shares = [
            part.get(name) for part in (errors["fitted"], held_back) for name in ("median_error", "max_error")
        ]
        cases = errors["fitted"]["cases"] + held_back.get("cases", 0)
        rows.append([term, str(cases), *map(_percent, shares)])
        costs.append((term, _coefficients(profile[term])))
    header = ["term", "cases", "error", "largest", "held back", "largest"]
    title = (
        f"{profile['device']}, {profile['dtype']}, {profile['date']}: copy {profile['copy_gb_per_s']:g} GB/s "
        f"(read + written), read {profile['read_gb_per_s']:g} GB/s\n"
        "median and largest relative error of the fit, and of what it never saw"
    )
    return table(title, header, rows) + "\n" + "\n".join(aligned(costs))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _coefficients(cost: dict[str, Any]) -> str:
    parts = []
    for name, value in cost.items():
        if isinstance(value, dict):
            points = ", ".join(f"{number}: {point:g}" for number, point in value.items())
            parts.append(f"{name} by tokens {points}")
        elif value:
            parts.append(f"{name} {value:g}")
    return ", ".join(parts)
