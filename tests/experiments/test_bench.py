"""The benchmarks, on small cases."""

from __future__ import annotations

import pytest

from experiments import text
from experiments.bench import paper as bench_paper
from experiments.bench import peers as bench_peers
from experiments.bench import sim as bench_sim
from experiments.cli import run_command


def test_a_run_of_the_benchmark_finishes_all_its_requests(tmp_path):
    figures = bench_sim.run(tmp_path / "case", 300, 27.0)
    assert figures["requests_finished"] + figures["requests_rejected"] == 300
    assert figures["cpu_s"] > 0


def test_the_bare_loop_costs_something():
    assert bench_sim.bare_loop(2_000, 200) > 0


def test_the_table_of_cases_has_a_row_each(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_sim, "REQUESTS", 200)
    monkeypatch.setattr(bench_sim, "ROUNDS", 1)
    monkeypatch.setattr(bench_sim, "aisimulate", lambda folder: ("0.0", 1.0))
    monkeypatch.setattr(bench_sim, "PEER_REQUESTS", 200)
    monkeypatch.setattr(bench_sim, "_process", lambda arguments: (1.0, 2**20))
    told = bench_sim.bench_sim(tmp_path)
    for name, _ in bench_sim.CASES:
        assert name in told
    assert "AISimulate" in told
    assert "kvsim --help" in told


def test_the_peer_gets_the_same_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peers, "REQUESTS", 50)
    rows = bench_peers._mooncake_trace(tmp_path / "trace.jsonl").read_text().splitlines()
    assert len(rows) == 50


def test_the_sustained_rate_is_where_latency_crosses_the_limit():
    rows = [
        {bench_paper.RATE: rate, "normalized_latency_mean_s": latency}
        for rate, latency in ((3.0, 9.0), (1.0, 0.05), (2.0, 0.15))
    ]
    assert bench_paper._sustained(rows) == pytest.approx(1.5)


def test_all_published_figures_are_met(tmp_path):
    """`kvsim bench paper` as it is, with the shipped experiments."""
    lines = bench_paper.bench_paper(tmp_path).splitlines()[2:]
    assert len(lines) == 15
    assert all(line.endswith("  ok") for line in lines), lines


def test_a_whole_process_is_timed():
    cpu, peak = bench_sim._process(["--help"])
    assert 0 < cpu < 60
    assert 2**20 < peak < 2**32


def test_an_unknown_benchmark_is_refused_with_the_nearest_name(capsys):
    assert run_command(["bench", "simm"]) == 2
    assert "did you mean 'sim'" in capsys.readouterr().err


def test_tables_are_aligned():
    told = text.table("title", ["name", "x"], [["a", "1"], ["long", "22"]])
    assert told.splitlines() == ["title", "name   x", "a      1", "long  22"]
