"""The table on the terminal: what an experiment is about, in no more columns than tell something."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.summary_table import summary_table

PLAIN = {
    "run_id": "a", "replication": 0, "duration_s": 100.0, "requests_finished": 60, "requests_rejected": 0,
    "request_throughput": 0.6, "normalized_latency_mean_s": 0.04, "ttft_mean_s": 0.1, "mean_running": 7.0,
    "preemptions": 0, "recovery_s": 0.0, "swap_stall_s": 0.0, "prefix_hit_rate": 0.0, "blocks_saved_share": 0.0,
    "mean_table_length": 20.0, "token_states_share": 0.9, "reserved_share": 0.0, "internal_share": 0.0001,
    "external_share": 0.0, "free_share": 0.1, "cpu_s": 0.2,
}  # fmt: skip


def heads(*rows: dict[str, Any], swept: tuple[str, ...] = ()) -> list[str]:
    head = summary_table([PLAIN | row for row in rows], swept).splitlines()[0]
    return [word for word in head.split("  ") if word.strip()]


def test_columns_of_zeros_are_left_out() -> None:
    shown = [head.strip() for head in heads({}, {})]
    assert shown == ["finished", "requests/s", "s/token", "TTFT s", "running", "tokens %", "free %", "CPU s"]


@pytest.mark.parametrize(
    ("figures", "column"),
    [
        ({"requests_rejected": 1}, "rejected"),
        ({"preemptions": 3}, "preempted"),
        ({"prefix_hit_rate": 0.4}, "hits %"),
        ({"blocks_saved_share": 0.07}, "shared %"),
        ({"external_share": 0.002}, "external %"),
        ({"recovery_s": 2.0}, "recovery s"),
        ({"recovery_s": 3.0, "swap_stall_s": 2.0}, "stalled s"),
    ],
)
def test_what_some_run_has_stands_in_the_table(figures: dict[str, Any], column: str) -> None:
    assert column in " ".join(heads({}, figures))


def test_what_preemptions_cost_is_told_once_and_where_it_counts() -> None:
    assert "recovery s" not in " ".join(heads({"recovery_s": 0.9}))  # of 100 s
    assert "stalled s" not in " ".join(heads({"recovery_s": 2.0, "swap_stall_s": 2.0}))


def test_lengths_of_block_tables_are_told_where_allocators_differ_in_them() -> None:
    row = {"allocator.block_size": 16}
    swept = ("allocator.block_size",)
    none = {"mean_table_length": float("nan")}
    assert "table" in " ".join(heads(row, row | {"mean_table_length": 40.0}, row | none, swept=swept))
    assert "table" not in " ".join(heads(row, row | {"mean_table_length": 21.0}, row | none, swept=swept))
    assert "table" not in " ".join(heads({}, {"mean_table_length": 40.0}))
    assert "table" not in " ".join(heads(row | none, swept=swept))


def test_settings_are_told_as_in_the_yaml() -> None:
    rows = [
        PLAIN | {"tiers": None, "transfers": {"prefetch": False}},
        PLAIN | {"tiers": [{"kind": "host"}], "transfers": {}},
        PLAIN | {"tiers": [{"kind": "host", "capacity_gb": 24}, {"kind": "nvme"}], "transfers": {}},
        PLAIN | {"tiers": [{"kind": "host", "capacity_gb": 24, "eviction": "lfu"}], "transfers": {}},
    ]
    table = summary_table(rows, ["tiers", "transfers"]).splitlines()
    assert table[1].split()[:2] == ["null", "prefetch=false"]
    assert table[2].split()[0] == "host"
    assert table[3].startswith("host 24 GB + nvme ")
    assert table[4].startswith("host capacity_gb=24 eviction=lfu ")
