"""What the terminal says beside the table: refusals with their reason, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.remarks import different_memory, short_loads
from tests.experiments.conftest import SMALL, Kvsim, Write


def test_refusals_are_told_with_a_reason(write: Write, kvsim: Kvsim) -> None:
    write("x.yaml", SMALL.replace("prompt: 100", "prompt: 3000"))
    said = kvsim("run", "x.yaml", "--no-plots", "--no-probe")
    assert "rejected 60 of 60 requests: prompt of 3000 tokens exceeds max_model_len 2048" in said.out
    assert "(and 59 like it)" in said.out
    said = kvsim("run", "x.yaml", "--no-plots", "--no-probe", "--set", "record.requests=false")
    assert "rejected 60 of 60 requests\n" in said.out


def test_as_many_blocks_are_not_as_much_memory(write: Write, kvsim: Kvsim) -> None:
    text = SMALL.replace("kv_memory: 2 GiB", "num_blocks: 500")
    text += "sweep: {allocator: [{kind: paged}, {kind: radix}]}\n"
    said = kvsim("run", write("x.yaml", text), "--no-plots", "--no-probe")
    assert "memory differs: 500 blocks are 500 to 8,000 slots" in said.out
    text = text.replace("num_blocks: 500", "kv_memory: 2 GiB")
    assert "memory differs" not in kvsim("run", write("x.yaml", text), "--no-plots", "--no-probe").out


def test_the_memory_of_different_models_is_not_compared(tmp_path: Path) -> None:
    rows = [{"run_id": name} for name in ("opt-13b", "gemma-3-27b", "gemma-3-27b again")]
    for row, slots in zip(rows, (64, 768, 1536), strict=True):
        manifest = {
            "config": {"num_blocks": 4, "model": {"name": row["run_id"].split()[0]}},
            "capacity": {"num_slots": slots},
        }
        (tmp_path / row["run_id"]).mkdir()
        (tmp_path / row["run_id"] / "manifest.json").write_text(json.dumps(manifest))
    assert different_memory(rows[:2], tmp_path) == ""
    assert "4 blocks are 768 to 1,536 slots" in different_memory(rows, tmp_path)


def test_a_moment_of_load_is_told() -> None:
    rows = [{"loaded_s": loaded, "duration_s": 500.0} for loaded in (0.1, 4.9, 5.1, 500.0)]
    assert short_loads(rows).startswith(
        "short of memory for less than 1 % of the time in 2 of 4 runs: their running"
    )
    assert short_loads(rows[2:]) == ""
