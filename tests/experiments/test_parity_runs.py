"""The two experiment files that repeat recorded runs, request by request."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

CONFIGS = Path(__file__).parents[2] / "configs" / "parity"


@pytest.fixture
def run(kvsim, tmp_path):
    """Runs a configuration with settings; its requests by the order of the workload."""

    def run(name: str, *settings: str) -> dict[str, list]:
        flags = [flag for setting in settings for flag in ("--set", setting)]
        answer = kvsim("run", CONFIGS / name, "--out", tmp_path / "out", "--no-plots", *flags)
        assert answer.code == 0, answer.err
        (path,) = (tmp_path / "out").rglob("requests.parquet")
        rows = sorted(parquet.read_table(path).to_pylist(), key=lambda row: row["request_id"])
        assert {row["status"] for row in rows} == {"finished"}
        return {name: [row[name] for row in rows] for name in rows[0]}

    return run


def recorded(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def latest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference."""
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("blocks", [1000, 30208])
def test_vidur(shared, run, blocks):
    folder = shared / "parity" / "vidur"
    ours = run(
        "vidur.yaml",
        f"workload.path={folder / 'workload_n1000_qps12.csv'}",
        f"timing.tables={folder}",
        f"num_blocks={blocks}",
    )
    theirs = recorded(folder / f"n1000_qps12_b{blocks}.csv")
    for name, column in (("first_token_time", "ttft_s"), ("finish_time", "e2e_s")):
        since = [time - arrival for time, arrival in zip(ours[name], ours["arrival_time"], strict=True)]
        assert latest(since, [float(row[column]) for row in theirs]) < 1e-5
    assert ours["preemptions"] == [int(row["preemptions"]) for row in theirs]


FIXED = "timing={kind: fixed, prefill_ms: 10, decode_ms: 10}"
POLYNOMIAL = "timing={kind: aisimulate_polynomial}"


@pytest.mark.parametrize(
    ("case", "tolerance_ms", "settings"),
    [
        ("b16384_timing_fixed-10-10", 1e-6, (FIXED, "num_blocks=16384")),
        (
            "b2200_np_timing_fixed-10-10",
            1e-6,
            (FIXED, "num_blocks=2200", "allocator.prefix_caching=false"),
        ),
        ("b2200_timing_fixed-10-10", 1e-6, (FIXED, "num_blocks=2200")),
        (
            "b2200_timing_fixed-10-10_preempt_fifo",
            1e-6,
            (FIXED, "num_blocks=2200", "scheduler.victim=fifo"),
        ),
        ("b2200_timing_polynomial", 1e-5, (POLYNOMIAL, "num_blocks=2200")),
    ],
)
def test_aisimulate(shared, run, case, tolerance_ms, settings):
    folder = shared / "parity" / "aisimulate"
    ours = run("aisimulate.yaml", f"workload.path={folder / 'logn_1000.jsonl'}", *settings)
    keys = list(zip(ours["arrival_time"], ours["prompt_tokens"], ours["output_tokens"], strict=True))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    theirs = recorded(folder / f"logn_1000_{case}.csv")
    for name, column in (
        ("first_scheduled_time", "first_admit_ms"),
        ("first_token_time", "first_token_ms"),
        ("finish_time", "last_token_ms"),
    ):
        mine = [ours[name][index] * 1e3 for index in order]
        assert latest(mine, [float(row[column]) for row in theirs]) < tolerance_ms
    for name, column in (("preemptions", "readmissions"), ("reused_tokens", "reused_input_tokens")):
        assert [ours[name][index] for index in order] == [int(row[column]) for row in theirs]
