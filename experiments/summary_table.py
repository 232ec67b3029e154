"""The summary table: a few figures of every run, side by side on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.results import Row
from experiments.text import aligned, tier_told

MOST_ROWS = 60
LOWER_BOUND = (
    "prefix hits are a lower bound: the trace names content by blocks, the allocator's are no multiple"
)
_ALWAYS = (
    "requests_finished",
    "request_throughput",
    "normalized_latency_mean_s",
    "ttft_mean_s",
    "mean_running",
    "token_states_share",
    "free_share",
    "cpu_s",
)
"""Figures that every table has; of the others only those of which some run has any."""
_LONGER = 1.5
"""How much longer some block tables have to be than others for the table to have their length."""
_COSTLY = 0.01
"""Share of a run that preemptions have to cost for the table to tell."""
_OF_A_TIER = {"kind", "name", "capacity_gb", "num_blocks"}
"""What a tier's label tells."""
_FIGURES = {
    "requests_finished": "finished",
    "requests_rejected": "rejected",
    "request_throughput": "requests/s",
    "normalized_latency_mean_s": "s/token",
    "ttft_mean_s": "TTFT s",
    "mean_running": "running",
    "preemptions": "preempted",
    "recovery_s": "recovery s",
    "swap_stall_s": "stalled s",
    "prefix_hit_rate": "hits %",
    "blocks_saved_share": "shared %",
    "mean_table_length": "table",
    "kv_bytes_saved_share": "KV saved %",
    "quantization_max_error": "error",
    "token_states_share": "tokens %",
    "reserved_share": "reserved %",
    "internal_share": "internal %",
    "external_share": "external %",
    "free_share": "free %",
    "cpu_s": "CPU s",
}


def summary_table(rows: Sequence[Row], swept: Sequence[str]) -> str:
    """One line a run: what was swept, then the figures that tell most; all figures are in runs.csv."""
    several = any(row["replication"] for row in rows)
    settings = [*swept, *(["replication"] if several else [])]
    titles = dict(_FIGURES) | {f"{tier}_hit_rate": f"{tier} hits %" for tier in ("device", *tiers_of(rows))}
    figures = [name for name in titles if _is_shown(name, rows, swept)]
    head = [*settings, *(titles[name] for name in figures)]
    body = [
        [
            *(_setting(name, row[name]) for name in settings),
            *(_figure(name, row.get(name)) for name in figures),
        ]
        for row in rows
    ]
    numbers = [all(_is_number(row[name]) for row in rows) for name in settings] + [True] * len(figures)
    lines = aligned([head, *body[:MOST_ROWS]], numbers)
    more = [f"… {len(rows) - MOST_ROWS} more in runs.csv"] if len(rows) > MOST_ROWS else []
    return "\n".join([*lines, *more])


def _is_shown(name: str, rows: Sequence[Row], swept: Sequence[str]) -> bool:
    """Whether a figure stands in the table: no column is there to hold zeros or what another one says."""
    known = [row[name] for row in rows if row.get(name) is not None]
    if name in _ALWAYS:
        return bool(known)
    if name == "mean_table_length":
        lengths = [length for length in known if not math.isnan(length)]
        telling = any(path.split(".")[0] == "allocator" for path in swept)
        return telling and bool(lengths) and max(lengths) > _LONGER * min(lengths)
    if name in ("recovery_s", "swap_stall_s"):
        told = name == "recovery_s" or any(row.get(name) != row.get("recovery_s") for row in rows)
        return told and any((row.get(name) or 0) > _COSTLY * row["duration_s"] for row in rows)
    return any(_figure(name, value).strip("-0.") for value in known)


def tiers_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tiers behind the device that runs had, by what their figures are called."""
    names = dict.fromkeys(name for row in rows for name in row if name.endswith("_hit_rate"))
    return [
        name.removesuffix("_hit_rate") for name in names if name not in ("prefix_hit_rate", "device_hit_rate")
    ]


def tell(rows: Sequence[Row]) -> list[str]:
    """What is to be said of the runs beside their figures."""
    told = (
        hits_told(rows),
        thrashing_told(rows),
        probe_told(rows),
        quantization_told(rows),
        calibration_told(rows),
    )
    return [lines for lines in told if lines]


def hits_told(rows: Sequence[Mapping[str, Any]]) -> str:
    """That hits are a lower bound, where a trace names content too coarsely for the blocks; else empty."""
    coarse = sum(row.get("prefix_hits_exact") is False for row in rows)
    if not coarse:
        return ""
    return LOWER_BOUND + (f" ({coarse} of {len(rows)} runs)" if len(rows) > 1 else "")


def thrashing_told(rows: Sequence[Row]) -> str:
    """What was computed again and again, a line for the worst run; empty if no request was."""
    thrashed = [row for row in rows if row.get("requests_thrashed")]
    if not thrashed:
        return ""
    worst = max(thrashed, key=lambda row: int(row["recomputed_tokens"]))
    where = f", worst in {worst['run_id']}" if len(rows) > 1 else ""
    return (
        f"thrashing in {len(thrashed)} of {len(rows)} runs{where}: {worst['requests_thrashed']:,} requests prefilled "
        f"3 times or more, one {worst['max_prefills']:,} times; {worst['recomputed_tokens']:,} tokens computed again"
    )


def probe_told(rows: Sequence[Row]) -> str:
    """How many steps were checked, and how far attention was off; empty if no run was probed."""
    probed = [row for row in rows if row.get("probe_steps")]
    if not probed:
        return ""
    checked, steps = (sum(row[name] for row in probed) for name in ("probe_steps", "steps"))
    errors = [row["probe_max_error"] for row in probed if row["probe_max_error"] is not None]
    error = f", largest error of attention {max(errors):.1e}" if errors else ""
    return f"probe: {checked:,} of {steps:,} steps checked{error}"


def quantization_told(rows: Sequence[Row]) -> str:
    """How far less precise K and V put attention off at most, and their elements; empty if none was seen."""
    seen = [row for row in rows if row.get("quantization_max_error") is not None]
    if not seen:
        return ""
    worst = max(seen, key=lambda row: float(row["quantization_max_error"]))
    where = f" in {worst['run_id']}" if len(rows) > 1 else ""
    return (
        f"quantised K and V put attention off by {worst['quantization_max_error']:.2g} at most{where}, of values of "
        f"unit variance; single K and V by {worst['quantization_value_error']:.2g}, "
        f"{100 * worst['quantization_bound_share']:.0f} % of their bound"
    )


def calibration_told(rows: Sequence[Row]) -> str:
    """How well attention's time was predicted on sampled steps, a line a run that timed them; empty if none did."""
    lines = []
    for row in rows:
        if not row.get("calibrated_steps"):
            continue
        errors = []
        for name, told in (("before", "by the profile"), ("after", "refined by other steps of the run")):
            median, largest = (row.get(f"attention_error_{name}_{kind}") for kind in ("median", "max"))
            if median is not None and largest is not None:
                errors.append(f"{told} {100 * median:.1f} % off, at most {100 * largest:.0f} %")
        lines.append(f"attention on {row['calibrated_steps']} steps: {'; '.join(errors) or 'no prediction'}")
    return "\n".join(lines)


def _setting(name: str, value: Any) -> str:
    if name == "tiers" and value and all(each.keys() <= _OF_A_TIER for each in value):
        return " + ".join(map(tier_told, value))
    return _brief(value)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(
            _brief(inner) if key == "kind" else f"{key}={_brief(inner)}" for key, inner in value.items()
        )
    if isinstance(value, list):
        return " + ".join(map(_brief, value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as in the YAML
    return str(value)


def _figure(name: str, value: Any) -> str:
    if value is None or value != value:
        return "-"
    if name.endswith(("_share", "_rate")):
        return f"{100 * value:.1f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
