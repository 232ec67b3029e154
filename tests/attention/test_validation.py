"""Validation: sound implementations are within every bound, each broken one is over the bound that it breaks."""

from __future__ import annotations

import math

import pytest
import torch

from attention.functional import paged_attention
from attention.swap.host_records import HostRecords
from attention.validation.matrix import matrix
from attention.validation.twin import Form, Problem, Twin
from attention.validation.validate import Row, implementations, validate

CPU = torch.device("cpu")
PROPERTIES = (
    "block sizes", "GQA ratios", "ragged lengths from 1", "splits of a history", "prefill and chunks",
    "sliding window", "soft-cap", "queries x3", "queries x10", "log-sum-exp", "shared blocks", "after copy-on-write",
    "after swap", "after recomputing", "after swap, the same to the bit", "swapped K and V, the same to the bit",
)  # fmt: skip


def torchs(**arguments):
    return paged_attention(**arguments, impl="torch")


@pytest.fixture(scope="module")
def sound() -> list[Row]:
    return validate(
        CPU, {name: attend for name, attend in implementations(CPU).items() if name != "triton"}, small=True
    )


def test_our_implementations_are_within_every_bound(sound):
    assert [row for row in sound if not row.ok] == []
    for name in PROPERTIES:
        found = {(row.implementation, row.dtype) for row in sound if row.name == name}
        impls = ("-",) if name.startswith("swapped") else ("reference", "torch")
        assert found == {(impl, dtype) for impl in impls for dtype in ("float32", "float16", "bfloat16")}, (
            name
        )
    for name in ("int8", "int4", "fp8"):
        if name != "fp8" or hasattr(torch, "float8_e4m3fn"):
            assert all(row.share > 0.5 for row in sound if row.name == f"swapped K and V in {name}")
    assert {row.implementation for row in sound if row.name.startswith("decoding")} == {"reference", "torch"}


def test_bounds_are_those_that_are_documented(sound):
    for row in sound:
        if row.dtype == "float32" and row.name in PROPERTIES[:8]:
            assert 1e-6 < row.bound < 1e-4  # 1e-5 times the largest output or 1
            assert row.error < 1e-5
        if row.name.endswith("the same to the bit"):
            assert (row.error, row.bound) == (0.0, 0.0)


def off_by_a_little(**arguments):
    """An error of 3e-5 in one element."""
    got = torchs(**arguments)
    (got[0] if isinstance(got, tuple) else got)[-1, -1, -1] += 3e-5
    return got


def wrong_lse(**arguments):
    """The log-sum-exp to base 2."""
    got = torchs(**arguments)
    return (got[0], got[1] / math.log(2)) if isinstance(got, tuple) else got


def no_window(**arguments):
    return torchs(**{**arguments, "sliding_window": None})


def window_off_by_one(**arguments):
    window = arguments["sliding_window"]
    return torchs(**{**arguments, "sliding_window": window and window + 1})


def no_cap(**arguments):
    return torchs(**{**arguments, "soft_cap": None})


def heads_interleaved(**arguments):
    """Query head h reads KV head h modulo their number."""
    q, kv_heads = arguments["q"], arguments["k_cache"].shape[2]
    group = q.shape[1] // kv_heads
    order = torch.arange(q.shape[1]).view(group, kv_heads).T.flatten()
    got = torchs(**{**arguments, "q": q[:, order]})
    back = order.argsort()
    return (got[0][:, back], got[1][:, back]) if isinstance(got, tuple) else got[:, back]


def one_slot_too_many(**arguments):
    """Reads the slot behind the history where the block has one."""
    lens, size = arguments["seq_lens"], arguments["k_cache"].shape[1]
    more = torch.where(lens % size == 0, lens, lens + 1)
    return torchs(**{**arguments, "seq_lens": more, "max_seq_len": arguments["max_seq_len"] + 1})


def one_token_too_few(**arguments):
    """Forgets the first token where there is another."""
    hidden = arguments["k_cache"].clone()
    hidden[arguments["block_tables"][:, 0], 0] = -1e4
    return torchs(**{**arguments, "k_cache": hidden})


def not_causal(**arguments):
    """Every token of a prompt sees all of it."""
    starts = arguments["query_start_loc"]
    if starts is None:
        return torchs(**arguments)
    counts = starts.diff()
    alone = {**arguments, "query_start_loc": None, "max_query_len": None}
    for name in ("block_tables", "seq_lens"):
        alone[name] = arguments[name].repeat_interleave(counts, 0)
    return torchs(**alone)


def in_half_precision(**arguments):
    """Scores and weights in bfloat16, whatever the type."""
    rounded = {name: arguments[name].bfloat16().to(arguments["q"].dtype) for name in ("q", "k_cache")}
    return torchs(**{**arguments, **rounded})


def tables_in_order(**arguments):
    """Two blocks of each sequence in each other's place: seen only where a query stands among them."""
    tables = arguments["block_tables"].clone()
    inside = arguments["seq_lens"] > 2 * arguments["k_cache"].shape[1]
    tables[inside, :2] = tables[inside, :2].flip(1)
    return torchs(**{**arguments, "block_tables": tables})


BROKEN = {
    off_by_a_little: ("float32", {"block sizes", "shared blocks", "after swap", "ragged lengths from 1"}),
    wrong_lse: ("float32", {"log-sum-exp"}),
    no_window: ("float32", {"sliding window"}),
    window_off_by_one: ("bfloat16", {"sliding window"}),
    no_cap: ("float32", {"soft-cap"}),
    heads_interleaved: ("bfloat16", {"block sizes", "prefill and chunks", "after recomputing"}),
    one_slot_too_many: ("float16", {"block sizes", "ragged lengths from 1", "after copy-on-write"}),
    one_token_too_few: ("bfloat16", {"block sizes", "GQA ratios", "shared blocks"}),
    not_causal: ("bfloat16", {"prefill and chunks", "sliding window"}),
    in_half_precision: ("float32", {"block sizes", "queries x3", "queries x10", "log-sum-exp"}),
    tables_in_order: ("bfloat16", {"prefill and chunks", "sliding window"}),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_implementation_is_over_its_bound(broken, monkeypatch):
    dtype, properties = BROKEN[broken]
    monkeypatch.setattr("attention.validation.validate.DTYPES", (getattr(torch, dtype),))
    over = {row.name for row in validate(CPU, {"broken": broken}, small=True) if not row.ok}
    assert properties <= over
    if broken in (wrong_lse, no_cap):
        assert over <= {*properties, "log-sum-exp"}


@pytest.mark.parametrize("stale", ["K", "V", "last layer"])
def test_a_swap_that_brings_back_something_else_is_seen(stale, monkeypatch):
    scatter = HostRecords.scatter

    def broken(self, sources, targets, *fences):
        copied = scatter(self, sources, targets, *fences)
        self.synchronize()
        cache = self._cache.v if stale == "V" else self._cache.k
        cache[-1 if stale == "last layer" else 0, targets[0]] = cache[0, targets[-1]]
        return copied

    monkeypatch.setattr(HostRecords, "scatter", broken)
    over = {row.name for row in validate(CPU, {"torch": torchs}, small=True) if not row.ok}
    assert {"swapped K and V, the same to the bit", "swapped K and V in int8"} <= over
    assert "decoding through swap, the same to the bit" in over


def test_what_is_expected_does_not_come_from_the_cache():
    for _, problem in matrix(torch.float32, CPU, small=True):
        problem.arguments["k_cache"].fill_(torch.nan)
        problem.arguments["v_cache"].fill_(torch.nan)
        assert bool(problem.expected[0].isfinite().all())
        assert problem.error_of_torch < 1e-4
        break


def test_tables_are_shuffled_and_unwritten_slots_are_not_numbers():
    for name, problem in matrix(torch.float32, CPU):
        if name not in ("block sizes", "GQA ratios"):
            break
        tables = problem.arguments["block_tables"]
        used = tables[tables >= 0]
        assert len(used) == len(used.unique())
        assert len(used) < 8 or (bool((used.diff() < 0).any()) and bool((used.diff() > 0).any()))
        unwritten = problem.arguments["k_cache"].isnan().all(-1).all(-1)
        assert int((~unwritten).sum()) == sum(len(k) for k, _ in problem.histories)
        assert len(used) == sum(-(-len(k) // problem.form.block_size) for k, _ in problem.histories)


def test_the_matrix_is_whole():
    forms: list[tuple[str, Problem]] = list(matrix(torch.float32, CPU))
    sizes = {problem.form.block_size for name, problem in forms if name == "block sizes"}
    assert {1, 16, 256} <= sizes
    ratios = {problem.form.num_heads // problem.form.num_kv_heads for _, problem in forms}
    assert {1, 2, 3, 4, 6, 16} <= ratios
    assert min(len(k) for _, problem in forms for k, _ in problem.histories) == 1
    assert {name for name, _ in forms} >= {
        "shared blocks",
        "after copy-on-write",
        "after swap",
        "after recomputing",
    }
    assert any(min(problem.query_lens) > 1 for _, problem in forms)


def test_rows_of_one_property_keep_the_worst():
    first, second = Row("a", "b", "c", 1, 1e-6, 1e-5), Row("a", "b", "c", 2, 9e-6, 1e-4)
    assert first.and_also(second) == Row("a", "b", "c", 3, 1e-6, 1e-5)
    assert not Row("a", "b", "c", 1, math.nan, 1e-5).ok
    assert not Row("a", "b", "c", 1, 1e-9, 0.0).ok
    assert not first.and_also(Row("a", "b", "c", 1, math.inf, 1e-5)).ok
    assert Row("a", "b", "c", 1, 0.0, 0.0).ok
    pooled = Row("a", "b", "c", 1, 3.0, 2.0, True).and_also(Row("a", "b", "c", 1, 1.0, 4.0, True))
    assert (pooled.error, pooled.bound, pooled.ok) == (3.0, 4.0, True)


def test_a_twin_recomputes_what_it_had():
    twin = Twin(Form(block_size=4, num_layers=2), 20, torch.float32, CPU)
    (seq_id,) = twin.new()
    twin.append([seq_id], 11)
    kept = twin.histories[seq_id]
    again = twin.recompute(seq_id, chunk=3)
    assert again != seq_id
    for (k, v), (old_k, old_v) in zip(twin.histories[again], kept, strict=True):
        assert torch.equal(k, old_k)
        assert torch.equal(v, old_v)
