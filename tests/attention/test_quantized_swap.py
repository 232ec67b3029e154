"""Quantised swaps under the probe: the error that the real core makes stands in the results, no other passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention.comparison import Comparison, Window
from attention.generation.transformer import Transformer, TransformerConfig
from attention.probe import AttentionProbe
from attention.rows import HEAD_DIM, NUM_ROWS, SEED, model_rows, random_rows, rows_of
from attention.swap.quantization import Quantization
from sim import Device, Model, ProbeError, Transfers
from sim.audit.ledger import Ledger
from tests.sim.probing import requests, run
from tests.sim.story import memory

MODEL = Model(
    name="tiny", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, num_params=1e6,
    active_params=1e6, max_model_len=64,
)  # fmt: skip
DEVICE = Device(name="d", flops_per_s=1e12, memory_bytes_per_s=1e10, memory_bytes=1e9, host_bytes_per_s=1e9)
PRECISIONS = ["int8", "fp8", "int4"]


def serve(
    precision: str | None, seed: int = 0, values: str = "random", **fields
) -> tuple[dict, AttentionProbe]:
    """A run under pressure, half of its requests groups, seen by the probe at every step."""
    probe = AttentionProbe(every=1, values=values)
    transfers = Transfers(MODEL, DEVICE, 4, quantization=precision, **fields)
    asked = requests(seed, groups=bool(seed % 2))
    summary = run(memory(slots=100), asked, probe, "vllm_v0", transfers, preemption="swap")
    return summary, probe


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_attention_equals_attention_over_what_a_round_trip_leaves(precision, asynchronous):
    far = 0.0
    for seed in range(4):
        summary, probe = serve(precision, seed, asynchronous=asynchronous)
        assert summary["swapped_in_blocks"] > 0
        assert probe.max_error < 2e-6
        far = max(far, probe.figures["quantization_max_error"] or 0.0)
    least, most = {"int8": (1e-4, 0.05), "fp8": (1e-3, 0.2), "int4": (1e-2, 1.0)}[precision]
    assert least < far < most


def test_errors_are_those_of_a_transformers_cache_if_asked_for():
    drawn, computed = (serve("int8", 1, values)[1] for values in ("random", "model"))
    assert computed.max_error < 2e-6
    kept = torch.cat(model_rows()[1:])
    trip = Quantization.named("int8")
    largest = (trip.dequantize(trip.quantize(kept), HEAD_DIM, torch.float32) - kept).abs().max()
    assert computed.figures["quantization_value_error"] == pytest.approx(float(largest))
    assert drawn.figures["quantization_value_error"] != computed.figures["quantization_value_error"]
    assert drawn.figures["quantization_max_error"] != computed.figures["quantization_max_error"]


def test_rows_of_a_model_are_what_it_computes():
    """Against the same transformer over contiguous K and V."""
    model = Transformer(TransformerConfig(hidden_dim=64, seed=5))
    kv, (q, k, v) = model.contiguous_kv(), rows_of(model, 300)
    assert [len(rows) for rows in (q, k, v)] == [300, 300, 300]
    seq_ids = [kv.new(), kv.new()]
    kept, attend = [], kv.attend
    kv.attend = lambda *given: (kept.append(given[1:4]), attend(*given))[1]
    tokens = torch.randint(256, (300,), generator=torch.Generator().manual_seed(SEED))
    places = torch.cat([torch.arange(256), torch.arange(44)])
    model(tokens, places, kv, kv.extend(seq_ids, [256, 44]))
    for got, wanted in zip((q, k, v), kept[-1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_coarser_codes_are_farther_off_and_take_fewer_bytes():
    runs = [serve(precision, 1) for precision in (None, *PRECISIONS)]
    moved = [
        summary["swapped_gb"] / (summary["swapped_out_blocks"] + summary["swapped_in_blocks"])
        for summary, _ in runs
    ]
    rows = 4 * 2 * 2 * 2  # tokens, layers, heads, K and V
    assert moved == pytest.approx([rows * size / 1e9 for size in (32, 16 + 4, 16 + 4, 8 + 4)])
    assert "quantization_max_error" not in runs[0][1].figures
    int8, _, int4 = (probe.figures["quantization_max_error"] for _, probe in runs[1:])
    assert 0 < int8 < int4


def test_elements_are_off_by_at_most_their_bound():
    """int8 per token and head: half a step of a 127th of the largest, and rounding."""
    comparison = Comparison(1, 4, 4, "cpu", "int8")
    _, k, _ = random_rows()
    error = (comparison._k[NUM_ROWS:] - k).abs()
    largest = k.abs().amax(-1, keepdim=True)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    trip = Quantization.named("int8")
    again = trip.dequantize(trip.quantize(comparison._k[NUM_ROWS:]), HEAD_DIM, torch.float32)
    assert (again - comparison._k[NUM_ROWS:]).abs().max() < 1e-6  # a second trip costs no more


def test_attention_tells_a_slot_of_the_wrong_precision():
    """Eight tokens in two blocks; six of them were swapped, and the ledger holds but four to be less precise."""
    wanted = np.arange(100, 108)
    flags = np.zeros((2, 4), np.bool_)
    flags[0] = True
    for expected, near in ((4, True), (6, False)):
        window = Window(np.array([2, 0]), wanted.reshape(2, 4), wanted, 0, None, (flags, expected))
        (error,) = Comparison(1, 4, 4, "cpu", "int4").errors([window])
        assert (error < 1e-5) == near


class Forgetful(Ledger):
    """A host that gives blocks back as if they had never been quantised."""

    def swap(self, tier, pairs, sequences=()):
        super().swap(tier, pairs, sequences)
        if tier == "device":
            self.device.quantized[[target for _, target in pairs]] = False


def test_the_audit_tells_a_slot_of_the_wrong_precision(monkeypatch):
    monkeypatch.setattr("sim.audit.audit.Ledger", Forgetful)
    with pytest.raises(ProbeError, match=r"expected precision int8, found the model's own"):
        serve("int8", 1)
