"""A quantised cache from the command line: memory saved stands beside the error made, everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from experiments.plots.stored import draw, stored_plots
from experiments.report import write_report
from tests.experiments.conftest import SMALL, Kvsim, Write

SWEPT = SMALL.replace("{kind: fixed, prefill_ms: 20, decode_ms: 10}", "{kind: roofline}") + (
    "probe: {every: 20}\nsweep: {kv_cache_dtype: [null, int8, int4]}\n"
)


def test_memory_saved_and_error_made_stand_side_by_side(kvsim: Kvsim, write: Write) -> None:
    write("small.yaml", SWEPT)
    said = kvsim("run", "small.yaml", "--no-plots", "--jobs", "1")
    assert said.code == 0, said.err
    head, *lines = said.out.splitlines()
    assert "KV saved %" in head
    assert "error" in head
    assert "quantised K and V put attention off by 0." in lines[4]
    assert "of their bound" in lines[4]
    full, int8, int4 = pq.read_table("results/small/runs.parquet").to_pylist()
    assert [row["kv_bytes_per_token"] for row in (full, int8, int4)] == [819_200, 422_400, 217_600]
    assert (full["kv_bytes_saved_share"], int4["kv_bytes_saved_share"]) == (0, 1 - 217_600 / 819_200)
    assert full["quantization_max_error"] is None
    assert 0 < int8["quantization_max_error"] < int4["quantization_max_error"]
    slots = {}
    for folder in Path("results/small").glob("*/manifest.json"):
        manifest = json.loads(folder.read_text())
        slots[manifest["config"]["kv_cache_dtype"]] = manifest["capacity"]["num_slots"]
    assert slots == {None: 2 * 2**30 // 819_200, "int8": 2 * 2**30 // 422_400, "int4": 2 * 2**30 // 217_600}
    assert int4["tpot_mean_s"] < int8["tpot_mean_s"] < full["tpot_mean_s"]  # less is read

    results = Path("results/small")
    draw(results)
    (drawn,) = (plot for plot in stored_plots(results) if plot.path.stem == "precision")
    assert "int8 saves 48.4 %" in drawn.caption
    assert "int4 saves 73.4 %" in drawn.caption
    page = write_report(results).read_text()
    assert "Saved by precision" in page
    assert "Error of attention" in page


def test_without_it_nothing_is_said_of_precision(kvsim: Kvsim, write: Write) -> None:
    write("small.yaml", SMALL)
    said = kvsim("run", "small.yaml", "--no-plots")
    assert "KV saved" not in said.out
    assert "quantised" not in said.out
