"""What attention takes over block tables of a length: in the results, and drawn beside waste and entries."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments import build
from experiments.plots.stored import draw, stored_plots
from sim.timing.profile import Profile
from tests.experiments.conftest import SMALL, Kvsim, Write

TIMED = SMALL.replace(
    "{kind: fixed, prefill_ms: 20, decode_ms: 10}", "{kind: calibrated, profile: cpu-xeon, block_size: 16}"
).replace("2 GiB", "12 GiB")
SIZES = (
    "sweep: {allocator: [{kind: paged, block_size: 8}, {kind: paged, block_size: 64}, {kind: multi_size}]}\n"
)


def test_attention_differs_by_the_entries_of_its_tables(kvsim: Kvsim, write: Write) -> None:
    write("small.yaml", TIMED + SIZES)
    assert kvsim("run", "small.yaml", "--no-plots", "--no-probe", "--jobs", "1").code == 0
    small, large, several = pq.read_table("results/small/runs.parquet").to_pylist()
    assert small["mean_running"] == large["mean_running"]  # the timing is told one block size
    (file,) = Path(build.__file__).parent.glob("tables/profiles/cpu-xeon.yaml")
    entry = 40 * build.read_profile(file, Profile).decode.ns_per_block * 1e-6
    entries = small["mean_table_length"] - large["mean_table_length"]
    assert entries > 5
    differing = small["decode_attention_ms"] - large["decode_attention_ms"]
    assert differing == pytest.approx(entry * entries, rel=1e-6)
    assert large["mean_table_length"] < several["mean_table_length"] < small["mean_table_length"]

    draw(Path("results/small"))
    (drawn,) = (plot for plot in stored_plots(Path("results/small")) if plot.path.stem == "block_tables")
    assert "attention takes least with paged 64" in drawn.caption
    assert "most with paged 8" in drawn.caption


def test_shared_slots_are_read_more_often_than_they_are_counted(kvsim: Kvsim, write: Write) -> None:
    write("small.yaml", TIMED)
    assert (
        kvsim("run", "small.yaml", "--no-plots", "--no-probe", "--set", "workload.sampling={n: 2}").code == 0
    )
    (row,) = pq.read_table("results/small/runs.parquet").to_pylist()
    assert row["decode_attention_ms"] is None
