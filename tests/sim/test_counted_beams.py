"""Beam groups whose blocks are counted: the same runs, books and tables as with a block table for each beam."""

from __future__ import annotations

import numpy as np
import pytest

from sim import Capacity, ProbeError, Recorder, Transfers, allocator, scheduler, simulate, timing
from sim.allocators.counted_group import CountedGroup
from sim.audit import ledger
from sim.audit.audit import Audit
from sim.errors import IntegrityError
from sim.genealogy import COPIES, LEFT, LOST, SPARED, TAKEN, WASTED, WRITTEN, Turnover, changes, draw_parents
from sim.request import Request
from tests.sim.story import MS, Asked


@pytest.mark.parametrize("width", [2, 3, 4, 8, 70])
@pytest.mark.parametrize("by_age", [False, True])
@pytest.mark.parametrize("turnover", [0.0, 0.1, 0.5, 1.0])
def test_survivors_come_first_and_copies_behind_them(width, turnover, by_age):
    """A chance that does not fall with the age is the same for all."""
    chance = Turnover(turnover, 0.0) if by_age else turnover
    parents = draw_parents(chance, width, 400, 3, 5)
    dead = 0
    for row in parents.tolist():
        lives = 1
        while lives < width and row[lives] > row[lives - 1]:
            lives += 1
        assert set(row[lives:]) <= set(row[:lives])
        dead += width - lives
    expected = turnover - turnover**width / width  # of all one survives
    assert dead / 400 / width == pytest.approx(expected, abs=0.05)
    for steps in (0, 1, 100):
        few = draw_parents(chance, width, steps, 3, 5)
        assert np.array_equal(parents[:steps], few), "however many steps are asked for"


@pytest.mark.parametrize("width", [2, 4, 16])
def test_beams_die_with_the_chance_of_their_age(width):
    turnover = Turnover(0.33, 0.6)
    lived, died, picked = np.zeros(61), np.zeros(61), np.zeros(width)
    for number in range(1200 // width):
        ages = [1] * width
        for row in draw_parents(turnover, width, 60, number).tolist():
            lives = len(set(row))
            np.add.at(lived, ages, 1)
            np.add.at(died, [age for beam, age in enumerate(ages) if beam not in row], 1)
            np.add.at(picked, [row[:lives].index(parent) for parent in row[lives:]], 1 / lives)
            ages = [*(ages[parent] + 1 for parent in row[:lives]), *[1] * (width - lives)]
    for first, stop in ((1, 2), (2, 4), (4, 8), (8, 16), (16, 60)):
        ages = np.arange(first, stop)
        expected = (0.33 / ages**0.6 * lived[first:stop]).sum() / lived[first:stop].sum()
        assert died[first:stop].sum() / lived[first:stop].sum() == pytest.approx(expected, rel=0.12)
    if width == 16:
        assert picked[:8].std() / picked[:8].mean() < 0.1, "survivors are copied at random"


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("prompt", [1, 15, 16, 31])
@pytest.mark.parametrize("width", [2, 5, 70])
def test_changes_are_those_of_tables_that_are_forked_and_copied(width, prompt, size):
    final = prompt + 40
    parents = draw_parents(0.3, width, 39, width, prompt)
    found = changes(parents, prompt, final, size)
    numbers = iter(range(10**6))
    tables = [[next(numbers) for _ in range(-(-prompt // size))]] * width

    def state(tokens):
        blocks = {block: index for table in tables for index, block in enumerate(table)}
        filled = sum(min(size, tokens - index * size) for index in blocks.values())
        unused = sum(max(0, (index + 1) * size - final) for index in blocks.values())
        return np.array([len(blocks), filled, unused if len(tables[0]) * size >= final else 0])

    for tick in range(1, final - prompt + 1):
        before, copies = state(prompt + tick - 1), 0
        tables = [table.copy() for table in tables]
        for beam, table in enumerate(tables):
            if (prompt + tick - 1) % size == 0:
                table.append(next(numbers))
            elif any(other[-1] == table[-1] for other in tables[beam + 1 :]):
                table[-1] = next(numbers)
                copies += 1
        after = state(prompt + tick)
        assert found[tick, COPIES] == copies
        assert found[tick, [TAKEN, WRITTEN, WASTED]].tolist() == (after - before - [0, width, 0]).tolist()
        if tick < final - prompt:
            tables = [tables[parent] for parent in parents[tick - 1]]
            left = after - state(prompt + tick)
            assert found[tick, [LEFT, LOST, SPARED]].tolist() == left.tolist()


def run(
    blocks: int,
    *,
    counts: bool,
    kind: str = "paged",
    policy: str = "vllm_v0",
    every=None,
    probe=None,
    turnover=0.35,
    gap=60 * MS,
    **fields,
):
    """Beams, samples and single sequences at a rate that fills half of 600 blocks."""
    draw = np.random.default_rng(1)
    asked = [
        Request(
            name,
            name * gap,
            prompt,
            output,
            content=(name % 4,),
            content_ends=(1 + prompt // 2,),
            **[{}, {"n": 3}, {"beam_width": 4}][name % 3],
        )
        for name, (prompt, output) in enumerate(draw.integers(1, 120, (90, 2)).tolist())
    ]
    memory = allocator[kind](Capacity(blocks * 16, 256, blocks * (16 if kind in ("token", "radix") else 1)))
    memory.counts_beams = counts
    tables = []
    listed = []
    served = scheduler[policy](memory, **fields)
    plan = served.plan

    def looked_at(now):
        every(memory)
        listed.append(bool(memory.counted and memory.counted.groups))
        return plan(now)

    if every is not None:
        served.plan = looked_at
    summary = simulate(
        Asked(asked, beams=(turnover, 2)),
        scheduler=served,
        timing=timing["fixed"](prefill_ms=7.0, decode_ms=3.0),
        transfers=Transfers(None, None, memory.block_size),
        recorder=Recorder(lambda table, columns: tables.append((table, columns))),
        max_model_len=256,
        probe=probe,
    )
    memory.check_integrity()
    assert memory.usage().free == blocks * 16
    return summary, tables, listed


POLICIES = ["vllm_v0", "vllm_v1", "orca", "static", "lightllm", "sarathi", "sglang", "trtllm"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("blocks", [40, 60, 600])
@pytest.mark.parametrize("kind", ["paged", "token", "prefix", "radix"])
def test_a_run_is_the_same_with_a_table_for_each_beam(blocks, policy, kind):
    (one, mine, _), (other, theirs, _) = (
        run(blocks, counts=counts, policy=policy, kind=kind, turnover=Turnover(0.33, 0.61))
        for counts in (True, False)
    )
    assert one == pytest.approx(other, rel=0, abs=0, nan_ok=True)
    for (name, columns), (same, others) in zip(mine, theirs, strict=True):
        assert name == same
        for column in columns:
            np.testing.assert_array_equal(columns[column], others[column], err_msg=f"{name}.{column}")


@pytest.fixture
def few_followed(monkeypatch):
    """Two groups that the ledger follows; all others are counted until memory runs short."""
    monkeypatch.setattr(ledger, "FIRST_FOLLOWED", 6)
    monkeypatch.setattr(ledger, "FOLLOWED", 10**9)


@pytest.mark.parametrize("mode", ["auto", "swap", "recompute", "partial"])
@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1", "lightllm"])
@pytest.mark.parametrize(
    ("blocks", "gap", "kind"),
    [(60, 60 * MS, "paged"), (40, 100 * MS, "token"), (40, 60 * MS, "prefix"), (40, 60 * MS, "radix")],
)
def test_a_probe_changes_nothing_and_knows_a_group_again_that_gets_tables(
    blocks, gap, kind, policy, mode, few_followed
):
    fields = {
        "counts": True,
        "kind": kind,
        "policy": policy,
        "preemption": mode,
        "turnover": 0.15,
        "gap": gap,
    }
    probe = Audit(samples=300, num_requests=90)
    plain, *_ = run(blocks, **fields)
    watched, *_ = run(blocks, probe=probe, **fields)
    assert watched == pytest.approx(plain, rel=0, abs=0, nan_ok=True)
    assert probe.num_samples >= 10


@pytest.mark.parametrize("shift", ["tables", "lineage"])
def test_a_group_whose_tables_are_not_those_of_its_descent_is_noticed(shift, few_followed, monkeypatch):
    ancestors, trace = CountedGroup.ancestors, CountedGroup.trace
    if shift == "tables":
        monkeypatch.setattr(
            CountedGroup, "ancestors", lambda *args: [(line[::-1], row) for line, row in ancestors(*args)]
        )
    else:
        monkeypatch.setattr(CountedGroup, "trace", lambda group, at, turned: trace(group, at - 1, turned))
    with pytest.raises(ProbeError, match="is written over token"):
        run(60, counts=True, probe=Audit(samples=300, num_requests=90), turnover=0.15)


def test_the_books_agree_with_the_tables_that_beams_would_have_before_every_plan():
    *_, listed = run(600, counts=True, every=lambda memory: memory.check_integrity())
    assert sum(listed) > 500, "most plans find groups that are counted"


@pytest.mark.parametrize("mode", ["swap", "recompute", "partial"])
def test_a_group_that_gave_way_is_counted_again(mode):
    again = set()

    def look(memory):
        memory.check_integrity()
        if memory.counted is not None:
            again.update(request.id for request in memory.counted.groups if request.preemptions)

    run(60, counts=True, every=look, preemption=mode, turnover=0.15)
    assert len(again) > 5


def test_a_block_too_few_is_noticed():
    def steal(memory):
        if memory.counted is not None and len(memory.counted.groups) > 1:
            memory.counted._heap.append(memory.pool.take()[0])
            with pytest.raises(IntegrityError, match="blocks of counted groups"):
                memory.check_integrity()
            memory.pool.release([memory.counted._heap.pop()])

    run(600, counts=True, every=steal)
