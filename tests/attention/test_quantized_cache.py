"""Quantised caches under the probe: every allocator, the error of the real core in the results, nothing mixed up."""

from __future__ import annotations

import pytest

from attention.comparison import Comparison
from attention.probe import AttentionProbe
from attention.swap.quantization import Quantization
from sim import Capacity, Model, ProbeError, Recorder, allocator, scheduler, simulate
from sim.audit.grouped_ledger import GroupedLedger
from sim.audit.ledger import Ledger
from sim.layer_groups import LayerKind
from tests.sim.probing import requests, run
from tests.sim.test_oracle import TIMINGS
from tests.sim.test_oracle_sessions import asked
from tests.sim.tiers import tiered, transfers

PRECISIONS = ["int8", "fp8", "int4"]
CAPACITY = {"num_slots": 400, "max_model_len": 128}
LAYERS = (LayerKind(2, 64), LayerKind(2, 64, window=12))
ALONE = {"token": {}, "contiguous": {}, "vattention": {"page_size": "64 KiB"}}
BLOCKS = {kind: ALONE.get(kind, {"block_size": 4}) for kind in allocator.kinds}
BLOCKS |= {kind: {"block_size": 4, "largest_block": 8} for kind in ("multi_size", "adaptive")}


def probed(kind: str, precision: str, seed: int = 0, **shape) -> tuple[dict, AttentionProbe]:
    """A run over an allocator of a quantised cache, seen by the probe at every step."""
    if kind == "vattention":
        shape |= {"token_bytes": 4096.0, "num_layers": 2}
    memory = allocator[kind](Capacity(**CAPACITY, kv_cache_dtype=precision, **shape), **BLOCKS[kind])
    probe = AttentionProbe(every=1)
    policy = {"contiguous": "orca", "nano_vllm": "nano_vllm"}.get(kind, "vllm_v0")
    return run(memory, requests(seed), probe, policy), probe


@pytest.mark.parametrize("kind", allocator.kinds)
def test_attention_equals_attention_over_quantised_rows_in_every_allocator(kind):
    _, probe = probed(kind, "int8")
    assert probe.num_samples > 10
    assert probe.max_error < 2e-6
    assert 1e-4 < probe.figures["quantization_max_error"] < 0.05


@pytest.mark.parametrize("kind", ["prefix", "jenga"])
def test_windows_of_layer_groups_are_compared_with_what_is_in_them(kind):
    _, probe = probed(kind, "int8", layers=LAYERS, kv_bytes=400 * 256)
    assert isinstance(probe.audit.ledger, GroupedLedger)
    assert probe.max_error < 2e-6
    assert (
        1e-4 < probe.figures["quantization_max_error"] < 0.05
    )  # attention beyond the window would be farther off


def test_coarser_codes_are_farther_off_and_each_element_is_within_its_bound():
    figures = [probed("paged", precision)[1].figures for precision in PRECISIONS]
    int8, fp8, int4 = (each["quantization_max_error"] for each in figures)
    assert 0 < int8 < fp8 < int4
    for each in figures:
        assert 0.9 < each["quantization_bound_share"] <= 1
    assert figures[0]["quantization_value_error"] < 5 / 254 * 1.001  # nothing of the table is beyond 5


@pytest.mark.parametrize("every", [1, 9])
def test_swaps_and_forks_keep_the_precision(every):
    """Samples far apart leave it to forks and swaps to enter what was written, token by token if it is little."""
    for seed in (1, 2):
        shape = Capacity(num_slots=100, max_model_len=64, kv_cache_dtype="int8")
        probe = AttentionProbe(every=every)
        wanted = requests(seed, groups=True, longest=40)
        summary = run(allocator["paged"](shape, block_size=4), wanted, probe, preemption="swap")
        assert summary["swapped_in_blocks"] > 0
        assert summary["copied_blocks"] > 0
        assert probe.max_error < 2e-6


@pytest.mark.parametrize("kind", ["prefix 4", "radix 4 lfu"])
def test_blocks_come_back_through_tiers_with_the_precision_they_left_with(kind, monkeypatch):
    journeys = []
    travel = Comparison._travel

    def watch(self, journey, end, first):
        journeys.append(journey)
        travel(self, journey, end, first)

    monkeypatch.setattr(Comparison, "_travel", watch)
    memory, over = tiered(kind, "vllm_v1", 64, "three", {"policy": "write_through", "min_hits": 1})
    memory.kv_cache_dtype = "int4"
    probe = AttentionProbe(every=1)
    simulate(
        asked(0, "talk", True, count=24), scheduler=over, timing=TIMINGS["fixed"], transfers=transfers(memory),
        recorder=Recorder(), max_model_len=64, probe=probe,
    )  # fmt: skip
    assert probe.max_error < 2e-6
    assert journeys
    assert all(journey.quantized.all() for journey in journeys)


class Fresh(Ledger):
    """A cache that keeps what is copied at full precision."""

    def copy(self, source, target):
        super().copy(source, target)
        self.device.quantized[target] = False


def test_the_audit_tells_a_slot_that_was_not_quantised(monkeypatch):
    monkeypatch.setattr("sim.audit.audit.Ledger", Fresh)
    memory = allocator["paged"](
        Capacity(num_slots=400, max_model_len=64, kv_cache_dtype="int8"), block_size=4
    )
    with pytest.raises(ProbeError, match=r"expected precision int8, found the model's own"):
        run(memory, requests(1, groups=True), AttentionProbe(every=1), preemption="swap")


class FreshPages(GroupedLedger):
    """Pages whose first slot is never quantised."""

    def _enter(self, *arguments):
        wanted = super()._enter(*arguments)
        self.device.quantized[:, 0] = False
        return wanted


def test_the_audit_tells_it_in_layer_groups_too(monkeypatch):
    monkeypatch.setattr("sim.audit.audit.GroupedLedger", FreshPages)
    with pytest.raises(ProbeError, match=r"layer group 0, device slot \d+: expected precision fp8"):
        probed("jenga", "fp8", layers=LAYERS, kv_bytes=400 * 256)


def test_bytes_of_a_token_hold_codes_and_scales():
    shape = {
        "name": "m",
        "num_layers": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
    }
    shape |= {"num_params": 1e6, "active_params": 1e6, "max_model_len": 64}
    rows = 2 * 4 * 2  # K and V, layers, heads
    told = {None: rows * 32, "int8": rows * (16 + 4), "fp8": rows * (16 + 4), "int4": rows * (8 + 4)}
    for precision, size in told.items():
        model = Model(**shape, kv_cache_dtype=precision)
        assert (model.kv_bytes_per_token, model.full_kv_bytes_per_token) == (size, rows * 32)
    mixed = Model(
        **shape, kv_cache_dtype="int8", num_sliding_layers=1, sliding_window=8, num_state_layers=2,
        state_values_per_layer=100,
    )  # fmt: skip
    kinds = {(kind.count, kind.token_bytes, kind.state_bytes) for kind in mixed.layer_kinds}
    assert kinds == {(1, 80, 0), (2, 0, 200)}  # states keep their precision
    latent = Model(
        **shape | {"num_kv_heads": 1, "head_dim": 40}, kv_values_per_token=160, kv_cache_dtype="int8"
    )
    assert latent.kv_bytes_per_token == 160 + 4 * 4


def test_every_scheduler_runs_over_a_quantised_cache():
    for kind in scheduler.kinds:
        over = "nano_vllm" if kind == "nano_vllm" else "paged"
        memory = allocator[over](
            Capacity(num_slots=1200, max_model_len=128, kv_cache_dtype="fp8"), block_size=4
        )
        probe = AttentionProbe(every=7)
        run(memory, requests(3), probe, kind)
        assert probe.max_error < 2e-6


def test_a_round_trip_beyond_its_bound_is_found(monkeypatch):
    right = Quantization.dequantize
    monkeypatch.setattr(Quantization, "dequantize", lambda *given: 1.2 * right(*given))
    with pytest.raises(ProbeError, match=r"round trip through int8: an element is off by .* times its bound"):
        probed("paged", "int8")
