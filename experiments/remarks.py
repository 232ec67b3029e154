"""Remarks on the runs of a sweep beside their figures: what was refused, and what cannot be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.plots.results import BURST
from experiments.results import Row


def remarks(rows: Sequence[Row], folder: Path) -> list[str]:
    """Lines for the terminal; none where there is nothing to say."""
    told = refused(rows, folder), different_memory(rows, folder), short_loads(rows)
    return [line for line in told if line]


def refused(rows: Sequence[Row], folder: Path) -> str:
    """How many requests were rejected, and why, in the run with most of them."""
    those = [row for row in rows if row["requests_rejected"]]
    if not those:
        return ""
    worst = max(those, key=lambda row: int(row["requests_rejected"]))
    number, all_ = worst["requests_rejected"], worst["requests_rejected"] + worst["requests_finished"]
    where = f" in {len(those)} of {len(rows)} runs, most in {worst['run_id']}" if len(rows) > 1 else ""
    reasons = _reasons(folder / str(worst["run_id"]) / "requests.parquet")
    why = ""
    if reasons:
        ((reason, _),) = reasons.most_common(1)
        others = number - 1
        why = f": {reason}" + (f" (and {others:,} like it)" if others else "")
    return f"rejected {number:,} of {all_:,} requests{where}{why}"


def _reasons(table: Path) -> Counter[str]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found: Counter[str] = Counter()
    try:
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches(8192, columns=["status", "reason"]):
                rejected = batch.filter(pc.equal(batch["status"].cast(pa.string()), "rejected"))
                found.update(rejected["reason"].to_pylist())
    except (OSError, pa.ArrowInvalid):  # not recorded
        pass
    return found


def different_memory(rows: Sequence[Row], folder: Path) -> str:
    """That as many blocks are not as much memory where allocators differ in the size of theirs."""
    slots: dict[tuple[int, str], set[int]] = {}
    for row in rows:
        try:
            manifest = json.loads((folder / str(row["run_id"]) / "manifest.json").read_text(encoding="utf-8"))
            config, capacity = manifest["config"], manifest["capacity"]["num_slots"]
            blocks, model = config["num_blocks"], json.dumps(config.get("model"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if blocks is not None and "allocator.block_size" not in row:
            slots.setdefault((blocks, model), set()).add(capacity)
    for (blocks, _), found in slots.items():
        if len(found) > 1:
            return (
                f"memory differs: {blocks:,} blocks are {min(found):,} to {max(found):,} slots, by the size of each "
                "allocator's blocks; kv_memory gives all the same"
            )
    return ""


def short_loads(rows: Sequence[Row]) -> str:
    """That means over the loaded period are of a moment, where that is all that there was of it."""
    short = sum(0 < row["loaded_s"] < BURST * row["duration_s"] for row in rows)
    if not short:
        return ""
    of = f" in {short} of {len(rows)} runs" if len(rows) > 1 else ""
    return (
        f"short of memory for less than {100 * BURST:g} % of the time{of}: their running, tokens, reserved, ... "
        "are means over that moment"
    )
