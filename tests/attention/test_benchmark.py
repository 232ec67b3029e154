"""The benchmark's contestants: rivals get what they are made for, cases are counted right."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from attention.calibration import benchmark, measuring
from attention.calibration.benchmark import AttentionBenchmark, Case, Result, decode_cases, prefill_cases
from attention.calibration.rivals import RIVALS, Contiguous, FlashInfer, Varlen, pieces
from attention.calibration.trials import Bench, Heads
from attention.plain import plain_attention

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 8)
SCALE = 8**-0.5


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(measuring, "CPU_CACHE_BYTES", 1 << 16)
    return Bench(CPU, torch.float32, 1 << 20)


def kept(bench, monkeypatch) -> list[torch.Tensor]:
    """The queries that a bench makes up."""
    made, values = [], Bench.values
    monkeypatch.setattr(Bench, "values", lambda *given: made.append(values(*given)) or made[-1])
    return made


def test_plain_sdpa_attends_over_contiguous_histories(bench, monkeypatch):
    queries = kept(bench, monkeypatch)
    call, *_ = Contiguous().calls(bench, 3, 20, 16, HEADS)
    out = call().reshape(3, 4, 8)
    k, v = pieces(bench, 3, 20, HEADS)[0]
    for row in range(3):
        q = queries[0][row].reshape(1, 4, 8)
        expected, _ = plain_attention(q, k[row].transpose(0, 1), v[row].transpose(0, 1), SCALE)
        torch.testing.assert_close(out[row][None], expected)


def test_the_pieces_of_a_rotation_share_no_memory(bench):
    starts = [k.data_ptr() for k, _ in pieces(bench, 3, 20, HEADS)]
    size = pieces(bench, 3, 20, HEADS)[0][0].nbytes
    assert len(starts) > 2
    assert all(later - earlier >= size for earlier, later in pairwise(starts))


def test_varlen_attn_gets_the_block_tables(bench, monkeypatch):
    """In its place stands a function of the same signature that notes what it is given."""
    from torch.nn.attention import varlen

    given = {}

    def noting(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa, seqused_k, block_table):
        given.update(
            q=query, k=key, starts=cu_seq_q, longest=max_k, gqa=enable_gqa, lens=seqused_k, table=block_table
        )

    monkeypatch.setattr(varlen, "varlen_attn", noting)
    Varlen().calls(bench, 3, 20, 16, HEADS)[0]()
    assert given["q"].shape == (3, 4, 8)
    assert given["k"].shape[1:] == (16, 2, 8)
    assert given["starts"].tolist() == [0, 1, 2, 3]
    assert (given["longest"], given["gqa"], given["lens"].tolist()) == (20, True, [20, 20, 20])
    assert len({*given["table"].flatten().tolist()}) == 6


def test_flashinfer_gets_pages_and_the_length_of_the_last(bench, monkeypatch):
    planned, ran = [], []

    class Wrapper:
        def __init__(self, workspace, layout, use_tensor_cores):
            assert (workspace.dtype, layout, use_tensor_cores) == (torch.uint8, "NHD", False)

        def plan(self, indptr, indices, last, *shape, q_data_type, kv_data_type):
            planned.append((indptr.tolist(), len(indices), last.tolist(), shape))

        def run(self, q, caches):
            ran.append((q.shape, caches[0].shape[1:]))

    monkeypatch.setitem(
        sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    )
    FlashInfer().calls(bench, 3, 20, 16, HEADS)[0]()
    assert planned[0] == ([0, 2, 4, 6], 6, [4, 4, 4], (4, 2, 8, 16))
    assert ran == [((3, 4, 8), (16, 2, 8))]


def test_who_cannot_take_part_says_why(bench):
    told = {rival.name: rival.refusal(bench, 16) for rival in RIVALS}
    assert told["SDPA"] is None
    assert "GPU" in told["varlen_attn"]
    assert "GPU" in told["FlashInfer"]


def test_a_rival_that_fails_is_told_and_the_others_go_on(bench, monkeypatch):
    class Broken(Contiguous):
        name = "broken"

        def calls(self, *given):
            raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(benchmark, "bandwidths", lambda device: (2e10, 1e10))
    monkeypatch.setattr(benchmark, "POOL_BYTES", {"cpu": 1 << 20})
    made = AttentionBenchmark("cpu")
    result = made.run(Case(HEADS, 2, 16, 4), [Broken(), Contiguous()])
    assert made.absent["broken"] == "RuntimeError: no kernel image (block 4)"
    assert {"reference", "torch", "SDPA"} <= {*result.laps}
    assert result.ratio("torch", "broken") is None


def test_bytes_flops_and_ratios_by_hand():
    """2 sequences of 20 tokens in blocks of 16; 2 x 2 x 8 values a token."""
    case = Case(HEADS, 2, 20, 16)
    assert case.kv_bytes(2) == 2 * 20 * 32 * 2
    assert case.floor_bytes(2) == 2560 + 2 * 2 * 4 * 2 + 2 * 2 * 32 * 2
    assert case.flops == 2 * 20 * 4 * 32
    chunk = Case(HEADS, 1, 20, 16, 5)
    assert chunk.flops == (16 + 17 + 18 + 19 + 20) * 4 * 32
    result = Result(case, {"torch": [2.0, 1.0, 4.0], "SDPA": [1.0, 1.0, 1.0]})
    assert result.seconds("torch") == 2
    assert result.ratio("torch", "SDPA") == 0.5


def test_the_cases_of_the_goals_are_among_those_of_a_gpu():
    shapes = {
        (str(case.heads), case.batch, case.context) for case in decode_cases("cuda") if case.block_size == 16
    }
    for heads in ("32/8x128", "32/32x128"):
        assert {(heads, 1, 1024), (heads, 1, 32768), (heads, 256, 1024)} <= shapes
    assert {case.block_size for case in decode_cases("cuda")} >= {1, 16, 256}
    for kind, room in benchmark.POOL_BYTES.items():
        itemsize = 4 if kind == "cpu" else 2
        assert all(case.kv_bytes(itemsize) <= room for case in [*decode_cases(kind), *prefill_cases(kind)])
