"""The report of an experiment: one HTML page with its table, its figures and how it was run."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.plots.labels import axis_label, axis_name, flattened, listed, lowered, number
from experiments.plots.reading import manifest, read_experiment
from experiments.plots.results import Experiment, Run
from experiments.plots.series import mean
from experiments.plots.stored import Plot, draw, stored_plots
from experiments.report_page import page
from experiments.summary_table import hits_told, tiers_of
from sim.errors import UserError

#: Groups of columns: key in the summary, heading, unit, factor.
_SERVICE = (
    ("request_throughput", "Throughput", "requests/s", 1.0),
    ("output_token_throughput", "Output", "tokens/s", 1.0),
    ("normalized_latency_mean_s", "Normalised latency", "s/token", 1.0),
    ("ttft_mean_s", "TTFT, mean", "s", 1.0),
    ("ttft_p99_s", "TTFT, p99", "s", 1.0),
    ("tpot_mean_s", "TPOT, mean", "ms", 1e3),
    ("e2e_mean_s", "End to end, mean", "s", 1.0),
)
_MEMORY = (
    ("mean_running", "Mean batch", "requests", 1.0),
    ("preemptions", "Preemptions", "count", 1.0),
    ("token_states_share", "Token states", "%", 100.0),
    ("reserved_share", "Reserved", "%", 100.0),
    ("internal_share", "Internal", "%", 100.0),
    ("external_share", "External", "%", 100.0),
    ("free_share", "Free", "%", 100.0),
)
_OPTIONAL = (
    ("requests_rejected", "Rejected", "requests", 1.0),
    ("requests_thrashed", "Thrashed", "requests", 1.0),
    ("blocks_saved_share", "Saved by sharing", "%", 100.0),
    ("prefix_hit_rate", "Prefix hits", "%", 100.0),
    ("mean_table_length", "Block table", "entries", 1.0),
    ("decode_attention_ms", "Attention of a token", "ms", 1.0),
    ("kv_bytes_saved_share", "Saved by precision", "%", 100.0),
    ("quantization_max_error", "Error of attention", "absolute", 1.0),
)
_Column = tuple[str, str, str, float]


def write_report(directory: Path) -> Path:
    """Write `report.html` into `results/<name>`; figures are drawn first where they are older than the runs."""
    experiment = read_experiment(directory)
    plots = stored_plots(directory)
    runs = (directory / "runs.parquet").stat().st_mtime
    if not plots or min(plot.path.stat().st_mtime for plot in plots) < runs:
        draw(directory)
        plots = stored_plots(directory)
    manifests = [manifest(run.folder) for run in experiment.runs]
    name = str(manifests[0].get("name") or directory.resolve().name)
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="purpose">{escape(_purpose(experiment, manifests[0]))}</p>',
        "<h2>Results</h2>",
        *_tables(experiment),
        "<h2>Figures</h2>",
        *(_figure(number_, plot) for number_, plot in enumerate(plots, 1)),
        "<h2>How it was run</h2>",
        *_how(experiment, manifests),
    ]
    path = directory / "report.html"
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(page(name, body), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; expected a folder to write to"
        ) from None
    return path


def _purpose(experiment: Experiment, first: dict[str, Any]) -> str:
    """What the experiment is for in its author's words, else what it compares."""
    written = first.get("purpose") or first.get("description")
    if written:
        return str(written)
    policies = listed(experiment.policies)
    axes = []
    for axis, values in experiment.axes.items():
        name, unit = axis_name(axis)
        span = f"{number(values[0])} to {number(values[-1])} {unit}".rstrip()
        axes.append(f"{len(values)} values of {lowered(name)} ({span})")
    over = f" over {listed(axes)}" if axes else ""
    what = f"Compares {policies}{over}" if len(experiment.policies) > 1 or axes else f"One run of {policies}"
    return what + "."


def _tables(experiment: Experiment) -> list[str]:
    """One row per policy and point, in two tables that fit a printed page side to side."""
    points: dict[tuple[str, tuple[float, ...]], list[Run]] = {}
    for run in experiment.runs:
        points.setdefault((run.policy, tuple(run.at.values())), []).append(run)
    places = {policy: place for place, policy in enumerate(experiment.policies)}
    rows = sorted(points.items(), key=lambda item: (places[item[0][0]], item[0][1]))
    tiers = tiers_of([run.summary for run in experiment.runs])
    hits = tuple((f"{tier}_hit_rate", f"Hits on {tier}", "%", 100.0) for tier in tiers)
    extra = tuple(c for c in (*_OPTIONAL, *hits) if any(run.summary.get(c[0]) for run in experiment.runs))
    seen = len({run.replication for run in experiment.runs})
    notes = ["Shares and the mean batch are weighted by time over the loaded period."]
    if bounded := hits_told([run.summary for run in experiment.runs]):
        notes.append(f"{bounded[:1].upper()}{bounded[1:]}.")
    if seen > 1:
        notes.append(f"Means of {seen} replications with 95 % intervals (Student's t).")
    return [
        _table("Service", experiment, rows, _SERVICE),
        _table("Batch and KV memory", experiment, rows, _MEMORY + extra),
        f'<p class="note">{escape(" ".join(notes))} TTFT: time to first token. TPOT: time per output token.</p>',
    ]


def _table(
    caption: str,
    experiment: Experiment,
    rows: Sequence[tuple[tuple[str, tuple[float, ...]], list[Run]]],
    columns: Sequence[_Column],
) -> str:
    axes = [(axis, *axis_name(axis), 1.0) for axis in experiment.axes]
    head = '<th scope="col">Policy</th>'
    head += "".join(
        f'<th scope="col" class="n">{escape(label)}<br><span class="unit">{escape(unit)}</span></th>'
        for _, label, unit, _ in (*axes, *columns)
    )
    lines = []
    before = ""
    for (policy, place), runs in rows:
        begins = ' class="first"' if policy != before else ""
        label = escape(policy) if policy != before else f'<span class="again">{escape(policy)}</span>'
        cells = "".join(f'<td class="n">{number(value)}</td>' for value in place)
        cells += "".join(f'<td class="n">{_cell(runs, key, factor)}</td>' for key, _, _, factor in columns)
        lines.append(f'<tr{begins}><th scope="row">{label}</th>{cells}</tr>')
        before = policy
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(runs: list[Run], key: str, factor: float) -> str:
    value = mean([run.figure(key, factor) for run in runs])
    if math.isnan(value.value):
        shown = "–"
    elif key.endswith("_share"):
        shown = f"{value.value:.1f}"
    else:
        shown = number(value.value, zeros=not all(isinstance(run.summary[key], int) for run in runs))
    spread = f' <span class="half">± {number(value.half, 2)}</span>' if value.half else ""
    return shown + spread


def _figure(place: int, plot: Plot) -> str:
    """A figure with its caption, the image inside the page, as wide as in print and a quarter more."""
    data = plot.path.read_bytes()
    width = int.from_bytes(data[16:20], "big") / 300 * 1.25  # a PNG's header holds its width in pixels
    image = base64.b64encode(data).decode("ascii")
    return (
        f'<figure><img style="width:{width:.2f}in" alt="{escape(plot.title)}" '
        f'src="data:image/png;base64,{image}">'
        f"<figcaption><b>Figure {place}. {escape(plot.title)}.</b> {escape(plot.caption)}</figcaption></figure>"
    )


def _how(experiment: Experiment, manifests: list[dict[str, Any]]) -> list[str]:
    """The configuration that all runs share, what was swept, seeds, versions and cost."""
    first = manifests[0]
    config = first.get("config") or {}
    leaves = [flattened(told.get("config") or {}) for told in manifests]
    common = {
        path: value for path, value in leaves[0].items() if all(leaf.get(path) == value for leaf in leaves)
    }
    hidden = {*common, *experiment.axes, *(path for tied in experiment.tied.values() for path in tied)}
    own = {
        run.policy: [f"{path}: {_scalar(value)}" for path, value in leaf.items() if path not in hidden]
        for run, leaf in zip(experiment.runs, leaves, strict=True)
    }
    swept = [
        f"{axis_label(axis)}: {', '.join(map(number, values))}" for axis, values in experiment.axes.items()
    ]
    seeds = sorted({str(told["seed"]) for told in manifests if "seed" in told})
    versions = {"kvsim": first.get("code")} | (first.get("versions") or {})
    inputs = {path: digest for told in manifests for path, digest in (told.get("inputs") or {}).items()}
    cost = [sum(float(told.get(key) or 0) for told in manifests) for key in ("cpu_s", "wall_s")]
    facts = {
        "Swept": "; ".join(swept),
        "Runs": f"{len(experiment.runs)}, {number(cost[0])} CPU s in all",
        "Replications": str(len({run.replication for run in experiment.runs})),
        "Seed": ", ".join(seeds),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Platform": str(first.get("platform") or ""),
        "First run at": min((str(told["created"]) for told in manifests if "created" in told), default=""),
        "KV memory": _capacity(manifests),
        "Input files": "; ".join(f"{path} ({digest})" for path, digest in inputs.items()),
    }
    told = [_facts(facts)]
    if any(own.values()):
        told.append("<h3>What each policy sets</h3>")
        told.append(_facts({policy: ", ".join(own[policy]) for policy in experiment.policies}))
    if config:
        told += [
            "<h3>Configuration that all runs share</h3>",
            f"<pre>{escape(_yaml(_only(config, common)))}</pre>",
        ]
    return told


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
        for name, text in facts.items()
        if text
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _capacity(manifests: list[dict[str, Any]]) -> str:
    found = {float((told.get("capacity") or {}).get("num_slots") or 0) for told in manifests} - {0.0}
    return f"{', '.join(map(number, sorted(found)))} slots" if found else ""


def _only(config: dict[str, Any], kept: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The part of a nested mapping whose leaves are among the dotted paths kept."""
    chosen: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            inner = _only(value, kept, f"{prefix}{key}.")
            chosen |= {key: inner} if inner else {}
        elif f"{prefix}{key}" in kept:
            chosen[key] = value
    return chosen


def _yaml(config: dict[str, Any], indent: str = "") -> str:
    """A nested mapping as YAML for reading."""
    lines = []
    for key, value in config.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
