"""Several layer groups: windows, states, pages of one size and of several, their books, and what a probe sees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.probe import AttentionProbe
from sim import Capacity, ProbeError, allocator, scheduler
from sim.audit import Audit
from sim.layer_groups import LayerKind
from tests.sim.probing import requests, run

KINDS = (LayerKind(1, 2), LayerKind(3, 2, 7), LayerKind(2, 2, 20), LayerKind(1, state_bytes=7))
SETTINGS = {
    "a window": ("prefix", {"block_size": 4, "windows": [10]}, ()),
    "full and windows": ("prefix", {"block_size": 4, "windows": [None, 9, 1]}, ()),
    "unified pages": ("prefix", {"block_size": 4}, KINDS[:3]),
    "unified pages and states": ("prefix", {"block_size": 4}, KINDS),
    "jenga": ("jenga", {"block_size": 4}, KINDS),
}


def build(name: str, slots: int, longest: int = 64):
    kind, fields, layers = SETTINGS[name]
    capacity = Capacity(num_slots=slots, max_model_len=longest)
    if layers:
        capacity = Capacity(num_slots=slots, max_model_len=longest, layers=layers, kv_bytes=15 * slots)
    return allocator[kind](capacity, **fields)


@pytest.mark.parametrize("policy", scheduler.kinds)
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), slots=st.sampled_from([64, 96, 150, 400]))
def test_every_token_is_where_its_group_says(name, policy, seed, slots):
    audit = Audit(every=1)
    summary = run(build(name, slots), requests(seed), audit, policy, max_num_seqs=8)
    assert audit.num_samples == summary["steps"]
    assert not audit.ledger.live


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_over_the_tables_of_all_groups(name):
    sliding = 0
    for seed in range(4):
        probe = AttentionProbe(every=1, device="cpu")
        drawn = probe._window
        seen = []
        probe._window = lambda *given, drawn=drawn, seen=seen: seen.append(drawn(*given)) or seen[-1]
        run(build(name, 200), requests(seed), probe, "vllm_v1", max_num_seqs=8)
        assert probe.max_error is not None
        assert probe.max_error < 1e-5
        sliding += sum(window.sliding is not None for window in seen)
    assert sliding > 20


def _lose_a_page(memory, sequence, group):
    """A page of a group is swapped with that of another group."""
    tables = memory.holdings[sequence].tables
    other = memory.token_groups[(group + 1) % len(memory.token_groups)]
    tables[group][-1], tables[other][-1] = tables[other][-1], tables[group][-1]


def test_a_probe_sees_tables_of_two_groups_mixed_up():
    memory = build("full and windows", 400)
    admit = memory.admit

    def mixing(sequence, *given):
        hit = admit(sequence, *given)
        for each in memory.sequences - {sequence}:
            _lose_a_page(memory, each, 0)
        return hit

    memory.admit = mixing
    memory.check_integrity = lambda: None
    with pytest.raises(ProbeError, match=r"layer group \d"):
        run(memory, requests(1), Audit(every=1), "vllm_v1")


def test_a_probe_sees_a_window_that_gives_back_too_much():
    memory = build("full and windows", 400)
    give_back = memory._give_back
    memory._give_back = lambda holding, edge, freed: give_back(holding, edge, min(freed + 1, holding.rows - 1))
    memory.check_integrity = lambda: None
    with pytest.raises(ProbeError):
        run(memory, requests(1), AttentionProbe(every=1, device="cpu"), "vllm_v1")
