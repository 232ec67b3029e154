"""Result folders as `kvsim run` leaves them, made up by a short queue: what figures are tested on."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

SLOTS = 15_728
STATES = ("token_states", "reserved", "internal", "external", "free")

CONTIGUOUS = {"kind": "contiguous", "reserve": "max", "placement": "buddy"}
PAGED = {"kind": "paged", "block_size": 16, "watermark": 0.01}
ORCA = {"kind": "orca", "max_num_seqs": 256}
VLLM = {"kind": "vllm_v0", "preemption": "recompute", "victim": "latest", "max_num_seqs": 256}
QUICKSTART = {
    "allocator": [CONTIGUOUS, CONTIGUOUS | {"reserve": "pow2"}, CONTIGUOUS | {"reserve": "oracle"}, PAGED],
    "scheduler": [ORCA, ORCA, ORCA, VLLM],
}


@dataclass
class Sweep:
    """What to make up: zipped and crossed axes as in the YAML, and how much load."""

    zipped: dict[str, list[Any]] = field(default_factory=dict)
    crossed: dict[str, list[Any]] = field(default_factory=dict)
    replications: int = 1
    requests: int = 40
    rate: float = 2.0
    record: tuple[str, ...] = ("requests", "steps", "memory")


def write_results(directory: Path, sweep: Sweep) -> Path:
    """Fill `directory` with runs.parquet and one folder per run."""
    rows = []
    zipped = [
        dict(zip(sweep.zipped, values, strict=True)) for values in zip(*sweep.zipped.values(), strict=True)
    ]
    crossed = [
        dict(zip(sweep.crossed, values, strict=True)) for values in itertools.product(*sweep.crossed.values())
    ]
    numbers = itertools.count()
    for one, other, replication in itertools.product(zipped or [{}], crossed, range(sweep.replications)):
        point = one | other
        run_id = f"{next(numbers):016x}"
        config = _config(sweep, point)
        summary = write_run(directory / run_id, config, replication, sweep)
        told = {
            path: json.dumps(value) if isinstance(value, dict) else value for path, value in point.items()
        }
        rows.append({"run_id": run_id, "replication": replication, **told, **summary})
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, directory / "runs.parquet")
    pyarrow.csv.write_csv(table, directory / "runs.csv")
    return directory


def _config(sweep: Sweep, point: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": "made-up",
        "seed": 0,
        "replications": sweep.replications,
        "model": {"name": "opt-13b"},
        "device": {"name": "a100-40gb"},
        "workload": {
            "kind": "synthetic",
            "num_requests": sweep.requests,
            "arrivals": {"kind": "poisson", "rate": sweep.rate},
            "lengths": {"kind": "sharegpt"},
        },
        "allocator": dict(PAGED),
        "scheduler": dict(VLLM),
        "timing": {"kind": "roofline", "step_overhead_ms": 20.0},
    }
    for path, value in point.items():
        *sections, last = path.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = dict(value) if isinstance(value, dict) else value
    return config


def write_run(folder: Path, config: dict[str, Any], replication: int, sweep: Sweep) -> dict[str, Any]:
    """One run: manifest, tables, summary, which is returned."""
    folder.mkdir(parents=True)
    tables, summary = _queue(config, replication)
    if config["scheduler"].get("preemption") in ("swap", "recompute"):
        swaps = config["scheduler"]["preemption"] == "swap"
        cost = 64.0 / config["allocator"].get("block_size", 16) if swaps else 2.0
        summary |= {"recovery_s": cost, "swap_transfer_s": cost * swaps, "swap_stall_s": cost * swaps}
    manifest = {
        "name": config["name"],
        "run_id": folder.name,
        "seed": config["seed"],
        "replication": replication,
        "config": config,
        "code": "0.1.0+made-up",
        "inputs": {},
        "created": "2026-01-01T00:00:00+00:00",
        "capacity": {"num_slots": SLOTS, "max_model_len": 2048, "kv_bytes_per_token": 819_200},
        "versions": {"python": "3.11.9", "numpy": np.__version__, "simpy": "4.1.1"},
        "platform": "linux",
        "wall_s": summary["wall_s"],
        "cpu_s": summary["cpu_s"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    for name in sweep.record:
        pq.write_table(pa.table(tables[name]), folder / f"{name}.parquet", row_group_size=20_000)
    return summary


def _queue(config: dict[str, Any], replication: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """First come, first served over reservations that fit; a step costs 25 ms plus 0.6 ms a request."""
    rng = np.random.default_rng((0, replication))
    n, rate = config["workload"]["num_requests"], config["workload"]["arrivals"]["rate"]
    arrival = np.cumsum(rng.exponential(1.0, n)) / rate
    prompt = rng.integers(16, 320, n)
    output = np.minimum(rng.gamma(1.3, 264, n).astype(int) + 1, 1700)
    asked, reserve = _reservations(config["allocator"], prompt, output)
    paged, block = config["allocator"]["kind"] == "paged", config["allocator"].get("block_size", 16)
    limit = config["scheduler"].get("max_num_seqs", 256)
    overhead = config["timing"]["step_overhead_ms"] / 1e3 + 0.02 * (8 / block if block < 8 else 0)

    now, head, used = 0.0, 0, 0
    live: list[int] = []
    done = np.zeros(n, dtype=int)
    first = np.zeros((3, n))  # scheduled, first token, finish
    steps: dict[str, list[float]] = {
        k: [] for k in ("time", "duration", "prefill_tokens", "decode_seqs", "running", "waiting")
    }
    memory: dict[str, list[float]] = {k: [] for k in ("time", *STATES)}
    while head < n or live:
        if not live and arrival[head] > now:
            now = float(arrival[head])
        joined = head
        while head < n and arrival[head] <= now and len(live) < limit:
            need = int(reserve[head])
            if used + need > SLOTS:
                break
            used += need
            live.append(head)
            first[0, head] = now
            head += 1
        waiting = int(np.searchsorted(arrival, now, side="right")) - head
        running = np.array(live)
        fresh = running >= joined
        span = overhead + 0.005 + 0.0006 * len(live) + 0.0002 * float(prompt[running[fresh]].sum()) / 10
        size, kept = prompt[running] + done[running], reserve[running]
        if paged:
            tail = (-size) % block
            will = np.minimum(tail, output[running] - done[running])
            live_slots = min(int(size.sum()), SLOTS)
            ahead = min(int(will.sum()), SLOTS - live_slots)
            held = (live_slots, ahead, min(int((tail - will).sum()), SLOTS - live_slots - ahead), 0)
        else:
            left = output[running] - done[running]
            outside = int((kept - asked[running]).sum()) + (SLOTS - used if waiting else 0)
            held = (int(size.sum()), int(left.sum()), int((asked[running] - size - left).sum()), outside)
        for name, value in zip(STATES, (*held, max(SLOTS - sum(held), 0)), strict=True):
            memory[name].append(value)
        memory["time"].append(now)
        for name, value in zip(
            steps,
            (now, span, int(prompt[running[fresh]].sum()), int((~fresh).sum()), len(live), waiting),
            strict=True,
        ):
            steps[name].append(value)
        now += span
        done[running] += 1
        first[1, running[fresh]] = now
        ended = running[done[running] >= output[running]]
        first[2, ended] = now
        used -= int(reserve[ended].sum())
        live = [request for request in live if done[request] < output[request]]
    memory["time"].append(now)
    for name, value in zip(STATES, (0, 0, 0, 0, SLOTS), strict=True):
        memory[name].append(value)
    requests = {
        "request_id": np.arange(n), "arrival_time": arrival, "prompt_tokens": prompt, "output_tokens": output,
        "status": ["finished"] * n, "reason": [""] * n, "first_scheduled_time": first[0], "first_token_time": first[1],
        "finish_time": first[2], "preemptions": np.zeros(n, dtype=int), "cached_tokens": np.zeros(n, dtype=int),
    }  # fmt: skip
    return {"requests": requests, "steps": steps, "memory": memory}, _summary(requests, steps, memory, now)


def _reservations(
    allocator: dict[str, Any], prompt: np.ndarray, output: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Slots that each request asks for, and those it takes; paging takes what it needs on average."""
    if allocator["kind"] == "paged":
        return prompt + output, prompt + (0.62 * output).astype(int)
    up = lambda sizes: 2 ** np.ceil(np.log2(sizes)).astype(int)  # noqa: E731
    asked = {"max": np.full_like(prompt, 2048), "pow2": prompt + up(output)}.get(
        allocator.get("reserve", ""), prompt + output
    )
    return asked, up(asked)


def _summary(
    requests: dict[str, Any], steps: dict[str, list[float]], memory: dict[str, list[float]], end: float
) -> dict[str, Any]:
    waits = np.array(steps["waiting"]) > 0
    time = np.array(memory["time"])
    low, high = (
        np.flatnonzero(waits)[[0, -1]]
        if waits.any()
        else (0, int(np.searchsorted(time, requests["arrival_time"][-1])) - 1)
    )
    span = np.diff(time)[low : high + 1]
    share = {
        f"{name}_share": float((np.array(memory[name][low : high + 1]) * span).sum() / span.sum() / SLOTS)
        for name in STATES
    }
    e2e = requests["finish_time"] - requests["arrival_time"]
    ttft = requests["first_token_time"] - requests["arrival_time"]
    tpot = (requests["finish_time"] - requests["first_token_time"]) / np.maximum(
        requests["output_tokens"] - 1, 1
    )
    spread = {
        f"{name}_{which}_s": float(
            np.mean(values) if which == "mean" else np.percentile(values, int(which[1:]))
        )
        for name, values in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e))
        for which in ("mean", "p50", "p90", "p99")
    }
    n = len(e2e)
    return {
        "duration_s": end, "steps": len(steps["time"]), "requests_finished": n, "requests_rejected": 0,
        "request_throughput": n / end, "output_token_throughput": float(requests["output_tokens"].sum() / end),
        **spread,
        "normalized_latency_mean_s": float(np.mean(e2e / requests["output_tokens"])),
        "mean_running": float((np.array(steps["running"])[low : high + 1] * span).sum() / span.sum()),
        "max_running": max(steps["running"]), "max_waiting": max(steps["waiting"]), "preemptions": 0,
        "recomputed_tokens": 0, "swapped_out_blocks": 0, "swapped_in_blocks": 0, "copied_blocks": 0,
        "recompute_s": 0.0, "swap_transfer_s": 0.0, "swap_stall_s": 0.0, "recovery_s": 0.0,
        "prefix_hit_tokens": 0, "prefix_hit_rate": 0.0, "blocks_saved_share": 0.0, **share,
        "probe_steps": 0, "probe_max_error": None, "wall_s": 1.5, "cpu_s": 1.4,
    }  # fmt: skip
