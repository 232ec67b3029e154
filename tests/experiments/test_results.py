"""Results: a run is stored as a whole or not at all, in columns of plain types."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.recording import Recording, column
from experiments.results import Results, run_folder, write_json
from tests.experiments.conftest import Kvsim, Write

SUMMARY = [
    "duration_s",
    "steps",
    "requests_finished",
    "requests_rejected",
    "request_throughput",
    "output_token_throughput",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p90_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "tpot_p50_s",
    "tpot_p90_s",
    "tpot_p99_s",
    "e2e_mean_s",
    "e2e_p50_s",
    "e2e_p90_s",
    "e2e_p99_s",
    "normalized_latency_mean_s",
    "mean_running",
    "max_running",
    "max_waiting",
    "preemptions",
    "recomputed_tokens",
    "swapped_out_blocks",
    "swapped_in_blocks",
    "copied_blocks",
    "recompute_s",
    "swapped_gb",
    "swap_transfer_s",
    "swap_stall_s",
    "recovery_s",
    "prefix_hit_tokens",
    "prefix_hit_rate",
    "blocks_saved_share",
    "token_states_share",
    "reserved_share",
    "internal_share",
    "external_share",
    "free_share",
    "probe_steps",
    "probe_max_error",
    "wall_s",
    "cpu_s",
]
COLUMNS = {
    "requests": "request_id arrival_time prompt_tokens output_tokens status reason first_scheduled_time "
    "first_token_time finish_time preemptions cached_tokens reused_tokens prefills tenant priority",
    "steps": "time duration prefill_tokens decode_seqs running waiting",
    "memory": "time token_states reserved internal external free",
}


@pytest.fixture
def run(write: Write, kvsim: Kvsim) -> Path:
    """The folder of a finished run."""
    assert kvsim("run", "small.yaml", "--no-plots").code == 0
    (summary,) = Path("results/small").glob("*/summary.json")
    return summary.parent


def test_a_run_holds_what_the_layout_names(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "manifest.json", "memory.parquet", "requests.parquet", "steps.parquet", "summary.json"
    ]  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert [key for key in summary if key in SUMMARY] == SUMMARY
    assert list(summary)[-2:] == ["wall_s", "cpu_s"]
    for table, names in COLUMNS.items():
        assert pq.read_schema(run / f"{table}.parquet").names == names.split()
    requests = pq.read_table(run / "requests.parquet")
    assert requests.column("status").to_pylist() == ["finished"] * 60
    assert str(requests.schema.field("reason").type) == "string"


def test_the_manifest_says_how_to_get_there_again(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["run_id"] == run.name
    assert manifest["config"]["allocator"]["block_size"] == 16
    assert manifest["config"]["model"]["num_layers"] == 40
    assert manifest["capacity"] == {"num_slots": 2621, "max_model_len": 2048, "kv_bytes_per_token": 819_200}
    assert set(manifest["versions"]) == {"python", "numpy", "simpy", "pyarrow"}
    assert manifest["code"].startswith("0.")
    assert {"seed", "replication", "inputs", "swept", "wall_s", "cpu_s"} <= set(manifest)


def test_nothing_is_recorded_that_is_switched_off(run: Path, kvsim: Kvsim) -> None:
    kvsim("run", "small.yaml", "--no-plots", "--set", "record={steps: false, memory: false}", "--out", "less")
    (summary,) = Path("less/small").glob("*/summary.json")
    assert {path.stem for path in summary.parent.glob("*.parquet")} == {"requests"}
    less, full = (json.loads(path.read_text()) for path in (summary, run / "summary.json"))
    assert [less[key] for key in SUMMARY[:-2]] == [full[key] for key in SUMMARY[:-2]]


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with run_folder(tmp_path, "a") as folder:
            (folder / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_damaged_run_is_replaced_by_a_whole_one(run: Path, kvsim: Kvsim) -> None:
    (run / "summary.json").write_text('{"duration_s": ')
    assert "stored before" not in kvsim("run", "small.yaml", "--no-plots").out
    assert json.loads((run / "summary.json").read_text())["requests_finished"] == 60
    assert not list(run.parent.glob(".*"))
    assert not (run / "replaced").exists()


def test_what_killed_runs_left_is_swept_up(tmp_path: Path) -> None:
    left = tmp_path / ".unfinished-abc-123"
    left.mkdir()
    (left / "requests.parquet").write_text("half")
    results = Results(tmp_path)
    results.open()
    results.close()
    assert not left.exists()


def test_chunks_become_one_table(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    for start in (0, 3):
        times = np.arange(start, start + 3) / 2
        recording.write(
            "t", {"time": times, "name": np.array(["a", "", "é"], object), "n": times.astype(np.int64)}
        )
    recording.close()
    assert pq.read_table(tmp_path / "t.parquet").to_pydict() == {
        "time": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5], "name": ["a", "", "é"] * 2, "n": [0, 0, 1, 1, 2, 2]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        ([1, None, 3], "int64"),
        ([2**62, -1], "int64"),
        ([1.5, None], "double"),
        ([None, None], "double"),
        ([True, None, False], "bool"),
        (["a", None, ""], "string"),
    ],
)
def test_columns_of_every_type_with_gaps(values: list[object], type_: str) -> None:
    made = column(values)
    assert made.to_pylist() == values
    assert str(made.type) == type_
    made.validate(full=True)


def test_rows_of_different_types_agree_on_one(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.write_runs(
        [{"a": 1, "b": 1, "c": "x", "d": True}, {"a": 2.5, "b": {"kind": "y", "n": [1, None]}, "e": 0}]
    )
    assert pq.read_table(tmp_path / "runs.parquet").to_pylist() == [
        {"a": 1.0, "b": "1", "c": "x", "d": True, "e": None},
        {"a": 2.5, "b": "{kind: y, n: [1, null]}", "c": None, "d": None, "e": 0},
    ]
    assert (tmp_path / "runs.csv").read_text().splitlines() == [
        "a,b,c,d,e", "1.0,1,x,true,", '2.5,"{kind: y, n: [1, null]}",,,0'
    ]  # fmt: skip


def test_json_knows_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": math.nan, "b": {"c": math.inf}, "d": 1.0})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": {"c": None}, "d": 1.0}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("requests.parquet", lambda whole: b""),
        ("memory.parquet", lambda whole: whole[: len(whole) // 2]),
        ("steps.parquet", lambda whole: whole[-40:]),
        ("manifest.json", lambda whole: whole[:40]),
    ],
)
def test_a_table_that_is_cut_short_is_named_and_its_run_is_replaced(name, damage, run: Path, kvsim) -> None:
    file = run / name
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    for command in ("plot", "report"):
        said = kvsim(command, run.parent)
        assert said.code == 2
        assert len(said.lines) == 1
        assert said.err.startswith(f"{file}: ")
        assert "kvsim run" in said.err
    assert "stored before" not in kvsim("run", "small.yaml", "--no-plots").out
    assert kvsim("plot", run.parent).code == 0
    assert "1 of them stored before" in kvsim("run", "small.yaml", "--no-plots").out


def test_runs_whose_folders_are_gone_are_told(run: Path, kvsim: Kvsim) -> None:
    shutil.rmtree(run)
    said = kvsim("plot", run.parent)
    assert said.code == 0
    assert said.lines == [
        f"{run.parent}: the folders of 1 of 1 runs are missing: {run.name}; figures of what they hold leave them out"
    ]
