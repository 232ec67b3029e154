"""`kvsim bench paper`: the published figures of PagedAttention (Kwon et al., SOSP 2023) beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.text import table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LATENCY = 0.1
"""Normalised latency (s/token) at which sustained request rates are compared."""

RATE = "workload.arrivals.rate"
Row = Mapping[str, Any]


def bench_paper(folder: Path) -> str:
    """Tables of published and simulated figures."""
    rows = _sweep(CONFIGS / "paper.yaml", folder)
    of = {
        name: [row for row in rows if name in str(row["allocator"])]
        for name in ("max", "pow2", "oracle", "paged")
    }
    at_two = {name: next(row for row in found if row[RATE] == 2.0) for name, found in of.items()}
    slots = _slots(folder, at_two["max"])
    lines = [["slots, OPT-13B in 12 GiB", "15.7K", f"{slots:,}", _verdict(slots == 15_728)]]
    for name, published in (("max", 7.00), ("pow2", 9.81), ("oracle", 13.62), ("paged", 30.42)):
        lines.append(_close(f"batch at 2 requests/s, {name}", published, at_two[name]["mean_running"], 0.10))
    for part, published in (
        ("token_states", 20.4),
        ("reserved", 13.3),
        ("internal", 57.3),
        ("external", 8.9),
    ):
        share = 100 * at_two["max"][f"{part}_share"]
        lines.append(_near(f"{part} of Orca (Max), %", published, share, 1.5))
    used = 100 * at_two["paged"]["allocated_token_states_share"]
    lines.append(["token states of allocated, paged, %", ">= 96", f"{used:.1f}", _verdict(used >= 96)])
    sustained = {name: _sustained(found) for name, found in of.items()}
    for name, low, high in (("oracle", 1.7, 2.7), ("max", 2.7, 8.0)):
        ratio = sustained["paged"] / sustained[name]
        what = f"rate of paged over {name} at {LATENCY} s/token"
        lines.append([what, f"{low}-{high}", f"{ratio:.2f}", _verdict(low <= ratio <= high)])
    for width, published in ((2, 6.09), (4, 8.53), (6, 9.79)):
        (row,) = _sweep(
            CONFIGS / "sharing_parallel.yaml", folder, "sweep=null", f"workload.sampling.n={width}"
        )
        saved = 100 * row["blocks_saved_share"]
        lines.append(_near(f"blocks saved by sharing, Alpaca, n = {width}, %", published, saved, 2.0))
    return table(
        "PagedAttention (SOSP 2023), OPT-13B on one A100-40GB", ["figure", "published", "ours", ""], lines
    )


def _sweep(config: Path, folder: Path, *sets: str) -> list[dict[str, Any]]:
    from experiments.config import load
    from experiments.sweep import run_sweep

    outcome = run_sweep(load(config, sets, probe=False), folder)
    for failure in outcome.failures:
        raise RuntimeError(failure.message)
    return outcome.rows


def _slots(folder: Path, row: Row) -> int:
    import json

    manifest = json.loads((folder / "paper" / row["run_id"] / "manifest.json").read_text(encoding="utf-8"))
    return int(manifest["capacity"]["num_slots"])


def _sustained(rows: Sequence[Row]) -> float:
    """Rate at which normalised latency reaches LATENCY, linear between the rates simulated."""
    before = None
    for row in sorted(rows, key=lambda row: row[RATE]):
        latency = row["normalized_latency_mean_s"]
        if latency > LATENCY and before is not None:
            low, start = before
            return float(low + (row[RATE] - low) * (LATENCY - start) / (latency - start))
        before = row[RATE], latency
    assert before is not None
    return float(before[0])


def _close(what: str, published: float, ours: float, tolerance: float) -> list[str]:
    return [what, f"{published:.2f}", f"{ours:.2f}", _verdict(abs(ours / published - 1) <= tolerance)]


def _near(what: str, published: float, ours: float, tolerance: float) -> list[str]:
    return [what, f"{published:g}", f"{ours:.1f}", _verdict(abs(ours - published) <= tolerance)]


def _verdict(holds: bool) -> str:
    return "ok" if holds else "missed"
