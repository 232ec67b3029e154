"""The tour: it fits a terminal, tells what it computed, and fails if something does not hold."""

from __future__ import annotations

import pytest

from attention.cache import PagedKVCache
from attention.generation import tour
from experiments import demo
from sim.audit.audit import Audit
from sim.errors import ProbeError


def test_the_tour_holds_and_fits_a_narrow_terminal(capsys):
    assert demo.run_demo() == 0
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert "\x1b" not in told
    assert lines[-1].endswith("Everything compared holds.")
    for heading in ("1. Memory", "2. Block tables", "3. Decoding", "4. Correctness"):
        assert any(line.startswith(heading) for line in lines)
    bars = [line for line in lines if line.endswith("|")]
    assert len(bars) == len(demo.NAMES)
    assert {len(bar) for bar in bars} == {len(bars[0])}


def test_the_story_of_a_fork_counts_references_and_copies():
    prompt, forked, parted, _grown, ended = tour.fork_story(block_size=4, num_blocks=16)
    assert [held.tokens for held in prompt.tables["A"]] == [4, 4, 2]
    assert forked.num_free == prompt.num_free == 13
    assert forked.tables["A"] == forked.tables["B"] == forked.tables["C"]
    assert {held.holders for held in forked.tables["A"]} == {3}
    assert parted.copies == 2
    assert len({parted.tables[name][-1].block for name in "ABC"}) == 3
    assert list(ended.tables) == ["A", "C"]
    assert [held.holders for held in ended.tables["A"]] == [2, 2, 1, 1]


def test_an_error_of_attention_fails_the_tour(monkeypatch):
    right = tour.paged_attention
    monkeypatch.setattr(tour, "paged_attention", lambda *given, **named: right(*given, **named) + 1e-3)
    lines, holds = demo._correctness()
    assert not holds
    assert "FAILED" in lines[-1]


def test_a_missing_copy_on_write_fails_the_tour(monkeypatch):
    monkeypatch.setattr(PagedKVCache, "_to_copy", lambda self, sequences: [False for _ in sequences])
    _, holds = demo._decoding()
    assert not holds


def test_a_part_that_fails_makes_the_exit_code(monkeypatch, capsys):
    for name in ("_memory", "_tables", "_decoding"):
        monkeypatch.setattr(demo, name, lambda: (["fine"], True))
    monkeypatch.setattr(demo, "_correctness", lambda: (["not fine"], False))
    assert demo.run_demo() == 1
    assert "Failed: Correctness" in capsys.readouterr().out


def test_a_run_that_fails_is_told(monkeypatch):
    def wrong(*given):
        raise ProbeError("step 1: something is wrong")

    monkeypatch.setattr(Audit, "sample", wrong)
    lines, holds = demo._memory()
    assert not holds
    assert "something is wrong" in lines[0]


@pytest.mark.parametrize("shares", [(0.183, 0.129, 0.6, 0.088, 0.0), (0.902, 0.016, 0.0, 0.0, 0.082)])
def test_a_bar_is_as_long_as_the_cache(shares):
    row = {f"{share}_share": value for share, value in zip(demo.SHARES, shares, strict=True)}
    bar = demo._bar(row)
    assert len(bar) == demo.BAR
    assert bar.count("#") == round(demo.BAR * shares[0])
