"""Series: means over bins are integrals over time, not picked points; intervals are Student's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.plots import series as plots_series
from experiments.plots.series import Mean, mean, memory_over_time, recorded_until, steps_over_time, t_quantile


def write(folder: Path, table: str, columns: dict[str, list[float] | np.ndarray], group: int = 1000) -> None:
    pq.write_table(pa.table(columns), folder / f"{table}.parquet", row_group_size=group)


def test_a_bin_holds_the_mean_over_time(tmp_path: Path) -> None:
    write(tmp_path, "memory", {"time": [0.0, 1.0, 1.5, 4.0], "free": [8, 4, 0, 7]})
    binned = memory_over_time(tmp_path, ["free"], 2.0)
    assert binned.edges.tolist() == [0, 2, 4]
    # 8 for one second, 4 for half of one, 0 for the rest; the last row only ends the run.
    assert binned.means["free"].tolist() == [(8 + 2) / 2, 0]


def test_a_spike_between_bin_edges_is_not_lost(tmp_path: Path) -> None:
    write(tmp_path, "memory", {"time": [0.0, 4.9, 4.91, 10.0], "free": [0, 1000, 0, 0]})
    assert memory_over_time(tmp_path, ["free"], 5.0).means["free"] == pytest.approx([2.0, 0.0])


def test_time_without_a_step_counts_as_zero(tmp_path: Path) -> None:
    write(tmp_path, "steps", {"time": [1.0, 3.0], "duration": [1.0, 1.0], "running": [4, 2]})
    binned = steps_over_time(tmp_path, ["running"], 2.0)
    assert binned.edges.tolist() == [0, 2, 4]
    assert binned.means["running"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("rows", [7, 64, 1 << 18])
def test_reading_in_pieces_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    rng = np.random.default_rng(0)
    time = np.cumsum(rng.exponential(0.03, 1000))
    used = rng.integers(0, 100, 1000)
    write(tmp_path, "memory", {"time": time, "free": used}, group=130)
    write(
        tmp_path,
        "steps",
        {"time": time[:-1], "duration": np.diff(time) * 0.7, "running": used[:-1]},
        group=90,
    )
    monkeypatch.setattr(plots_series, "_ROWS", rows)
    memory, steps = memory_over_time(tmp_path, ["free"], 0.5), steps_over_time(tmp_path, ["running"], 0.5)
    for binned, begins, ends, values in (
        (memory, time[:-1], time[1:], used[:-1]),
        (steps, time[:-1], time[:-1] + np.diff(time) * 0.7, used[:-1]),
    ):
        for low, high, got in zip(
            binned.edges, binned.edges[1:], next(iter(binned.means.values())), strict=False
        ):
            overlap = np.clip(np.minimum(ends, high) - np.maximum(begins, low), 0, None)
            assert got == pytest.approx((overlap * values).sum() / (high - low))


def test_the_mean_over_all_bins_is_the_mean_over_the_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    time = np.concatenate(([0.0], np.cumsum(rng.exponential(1.0, 5000))))
    used = rng.integers(0, 10_000, len(time))
    write(tmp_path, "memory", {"time": time, "free": used})
    binned = memory_over_time(tmp_path, ["free"], 37.0)
    whole = (binned.means["free"] * np.diff(binned.edges)).sum()
    assert whole == pytest.approx((np.diff(time) * used[:-1]).sum())


def test_what_was_not_recorded_ends_at_zero(tmp_path: Path) -> None:
    assert recorded_until(tmp_path, "memory") == 0.0
    write(tmp_path, "steps", {"time": pa.array([], pa.float64()), "duration": pa.array([], pa.float64())})
    assert recorded_until(tmp_path, "steps") == 0.0


def test_intervals() -> None:
    assert mean([1.0, 2.0, 3.0]).half == pytest.approx(4.303 / math.sqrt(3))
    assert mean([5.0]) == Mean(5.0, 0.0)
    assert mean([5.0, math.nan]) == Mean(5.0, 0.0)
    assert math.isnan(mean([]).value)
    assert t_quantile(1) == 12.706
    # Beyond the table, against published quantiles for 40, 60 and 120 degrees of freedom.
    assert [t_quantile(n) for n in (40, 60, 120)] == pytest.approx([2.0211, 2.0003, 1.9799], abs=2e-3)
