"""Paged attention against the formula, written out a second time in numpy, one query head after the other."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import gathered
from attention.functional import copy_blocks, paged_attention, write

IMPLEMENTATIONS = ("auto", "reference", "torch")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def by_hand(q, k, v, scale, sliding_window=None, soft_cap=None) -> tuple[np.ndarray, np.ndarray]:
    """q [query_len, num_heads, head_dim], k and v [seq_len, num_kv_heads, head_dim]; the output and its log-sum-exp."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for row, head in np.ndindex(*q.shape[:2]):
        kv_head = head * k.shape[1] // q.shape[1]
        position = len(k) - len(q) + row
        oldest = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        scores = k[oldest : position + 1, kv_head] @ q[row, head] * scale
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores)
        out[row, head] = weights @ v[oldest : position + 1, kv_head] / weights.sum()
        lse[row, head] = np.log(weights.sum())
    return out, lse


class Case:
    """Sequences written into a shuffled cache whose other slots hold no numbers.

    `queries` are the query tokens of each sequence; None asks for one each, without query_start_loc.
    """

    def __init__(self, lengths, queries=None, *, block_size=4, num_heads=4, num_kv_heads=2, head_dim=8,
                 dtype=torch.float64, device="cpu", index=torch.int64, seed=0):  # fmt: skip
        random = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        self.queries = queries or [1] * len(lengths)
        blocks = [-(-length // block_size) for length in lengths]
        num_blocks = sum(blocks) + 3
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.v_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.q = draw(sum(self.queries), num_heads, head_dim)
        order = torch.randperm(num_blocks, generator=random)
        self.block_tables = torch.full((len(lengths), max([1, *blocks])), -1, dtype=index)
        self.histories = []
        first = 0
        for row, length in enumerate(lengths):
            mine = order[first : first + blocks[row]]
            first += blocks[row]
            self.block_tables[row, : len(mine)] = mine
            k, v = draw(length, num_kv_heads, head_dim), draw(length, num_kv_heads, head_dim)
            self.histories.append((k, v))
            slots = (mine[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
            write(k.to(device), v.to(device), self.k_cache, self.v_cache, slots.to(device))
        self.q, self.block_tables = self.q.to(device), self.block_tables.to(device)
        self.seq_lens = torch.tensor(lengths, dtype=index, device=device)
        starts = np.cumsum([0, *self.queries]).tolist()
        self.query_start_loc = None if queries is None else torch.tensor(starts, dtype=index, device=device)

    def run(self, impl="auto", **options):
        return paged_attention(
            self.q, self.k_cache, self.v_cache, self.block_tables, self.seq_lens,
            query_start_loc=self.query_start_loc, impl=impl, **options,
        )  # fmt: skip

    def expected(self, scale=None, **options) -> tuple[np.ndarray, np.ndarray]:
        q = np.split(self.q.double().cpu().numpy(), np.cumsum(self.queries)[:-1])
        scale = self.q.shape[2] ** -0.5 if scale is None else scale
        pairs = [
            by_hand(mine, k.double().numpy(), v.double().numpy(), scale, **options)
            if len(k) else (np.zeros(mine.shape), np.full(mine.shape[:2], -np.inf))
            for mine, (k, v) in zip(q, self.histories, strict=True)
        ]  # fmt: skip
        return np.concatenate([out for out, _ in pairs]), np.concatenate([lse for _, lse in pairs])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("queries", [None, [1, 16, 3, 40, 2]], ids=["decode", "mixed"])
def test_every_implementation_computes_the_formula(impl, dtype, heads, block_size, queries, device):
    num_heads, num_kv_heads = heads
    case = Case(
        [1, 16, 7, 40, 5], queries, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads,
        dtype=dtype, device=device,
    )  # fmt: skip
    out = case.run(impl)
    assert out.shape == case.q.shape
    assert out.dtype == dtype
    np.testing.assert_allclose(out.double().cpu(), case.expected()[0], rtol=0, atol=TOLERANCE[dtype])


@st.composite
def ragged(draw):
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    if draw(st.booleans()):
        return lengths, None
    return lengths, [draw(st.integers(0, length)) for length in lengths]


@pytest.mark.parametrize("operator", ["missing", "other arguments", "other log-sum-exp"])
def test_a_torch_without_the_private_operator_gathers_whole_histories(operator, monkeypatch):
    case = Case([50, 9, 33], dtype=torch.float32)
    found = gathered._flash

    def changed(*given):
        if operator != "other log-sum-exp":
            raise AttributeError("no operator") if operator == "missing" else RuntimeError("unknown keyword")
        out, lse = found(*given)
        return out, lse / 2

    monkeypatch.setattr(gathered, "_flash", changed)
    monkeypatch.setattr(gathered, "PIECE_BYTES", 1)
    gathered.tells_lse.cache_clear()
    try:
        assert not gathered.tells_lse()
        np.testing.assert_allclose(case.run("torch"), case.expected()[0], rtol=0, atol=2e-6)
    finally:
        gathered.tells_lse.cache_clear()


@settings(max_examples=120)
@given(
    ragged=ragged(),
    block_size=st.integers(1, 9),
    group=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8]),
    index=st.sampled_from([torch.int32, torch.int64]),
    scale=st.sampled_from([None, 0.3]),
    sliding_window=st.sampled_from([None, 1, 4, 7]),
    soft_cap=st.sampled_from([None, 0.5, 30.0]),
    pieces=st.sampled_from([1, 50, 300, 1 << 22]),
)
def test_the_implementations_agree(
    ragged, block_size, group, num_kv_heads, head_dim, index, scale, sliding_window, soft_cap, pieces
):
    case = Case(
        *ragged, block_size=block_size, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, index=index,
    )  # fmt: skip
    options = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap}
    expected, expected_lse = case.expected(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "MAX_SCORES", pieces)
        patch.setattr(gathered, "PIECE_BYTES", pieces)
        for impl in IMPLEMENTATIONS:
            np.testing.assert_allclose(case.run(impl, **options), expected, rtol=0, atol=1e-12)
            out, lse = case.run(impl, **options, return_lse=True)
            np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_the_padded_batch_of_gpus_is_right_on_the_cpu_too(sliding_window):
    case = Case([1, 0, 16, 7, 40])
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attention.functional.gathered", lambda call: (calls.append(call), (call.q, None))[1])
        case.run("torch", sliding_window=sliding_window)
    out = gathered._padded(calls[0])
    np.testing.assert_allclose(out, case.expected(sliding_window=sliding_window)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_prompt_in_chunks_is_the_prompt_at_once(impl):
    whole = Case([21], [21])
    out = whole.run(impl)
    for begin, end in ((0, 1), (1, 9), (9, 16), (16, 21)):
        chunk = paged_attention(
            whole.q[begin:end], whole.k_cache, whole.v_cache, whole.block_tables, torch.tensor([end]),
            query_start_loc=torch.tensor([0, end - begin]), impl=impl,
        )  # fmt: skip
        torch.testing.assert_close(chunk, out[begin:end], rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_cache_may_be_a_view_of_a_larger_tensor(impl):
    case = Case([10, 6])
    expected = case.run(impl)
    both = torch.stack([case.k_cache, case.v_cache], dim=1)  # FlashInfer's [num_blocks, 2, ...]
    case.k_cache, case.v_cache = both[:, 0], both[:, 1]
    torch.testing.assert_close(case.run(impl), expected, rtol=0, atol=0)
    turned = case.k_cache.transpose(1, 2).contiguous().transpose(1, 2)  # heads outside, as in HND
    case.k_cache = turned
    torch.testing.assert_close(case.run(impl), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sequences_may_share_blocks(impl):
    case = Case([10, 10])
    case.q[1] = case.q[0]
    case.block_tables[1] = case.block_tables[0]
    out = case.run(impl)
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_sequences(impl):
    assert Case([]).run(impl).shape == (0, 4, 8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_slot_that_was_never_written_shows(impl):
    case = Case([10, 6])
    case.seq_lens[1] = 7
    out = case.run(impl)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_scores_too_large_for_an_exponential():
    case = Case([20, 3])
    case.q *= 1e4
    for impl in IMPLEMENTATIONS:
        assert case.run(impl).isfinite().all()


def test_write_drops_tokens_without_a_slot(device):
    k_cache, v_cache = torch.zeros(2, 3, 2, 1, 4, device=device)
    k, v = torch.arange(1.0, 25.0, device=device).reshape(2, 3, 1, 4)
    write(k, v, k_cache, v_cache, torch.tensor([5, -1, 0], device=device))
    np.testing.assert_array_equal(k_cache.cpu()[:, :, 0, 0], [[9, 0], [0, 0], [0, 1]])
    np.testing.assert_array_equal(v_cache.cpu()[:, :, 0, 0], [[21, 0], [0, 0], [0, 13]])


@pytest.mark.parametrize("block_size", [1, 4])
def test_copied_blocks_are_equal_and_nothing_else_changes(block_size, device):
    caches = list(torch.randn(3, 6, block_size, 2, 4, device=device))
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, torch.tensor([[0, 5], [0, 1], [2, 3]], device=device))
    for cache, old in zip(caches, before, strict=True):
        torch.testing.assert_close(cache, old[[0, 0, 2, 2, 4, 0]], rtol=0, atol=0)
    copy_blocks(caches, torch.zeros(0, 2, dtype=torch.int64, device=device))
    copy_blocks([], torch.zeros(0, 2, dtype=torch.int64, device=device))


def attend(wrong):
    case = Case([10, 6], [3, 1])
    arguments = {
        "q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache, "block_tables": case.block_tables,
        "seq_lens": case.seq_lens, "query_start_loc": case.query_start_loc,
    }  # fmt: skip
    for name, change in wrong.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return paged_attention(**arguments)


MISTAKES = {
    "impl: got 'cuda', expected one of auto, reference, torch, triton": {"impl": "cuda"},
    "k_cache: got shape [8, 4, 2], expected [num_blocks, block_size, num_kv_heads, head_dim]": {
        "k_cache": lambda t: t[..., 0]
    },
    "k_cache: got shape [8, 4, 2, 0], expected sizes of at least 1": {"k_cache": lambda t: t[..., :0]},
    "k_cache: got torch.int64, expected one of torch.float64, torch.float32": {"k_cache": lambda t: t.long()},
    "v_cache: got shape [7, 4, 2, 8], expected [8, 4, 2, 8]": {"v_cache": lambda t: t[1:]},
    "v_cache: got torch.float32, expected torch.float64 as k_cache": {"v_cache": lambda t: t.float()},
    "q: got shape [4, 4, 5], expected [num_tokens, num_heads, 8]": {"q": lambda t: t[..., :5]},
    "q: got 3 heads, expected a multiple of the 2 KV heads": {"q": lambda t: t[:, :3]},
    "q: got torch.float16, expected torch.float64 as k_cache": {"q": lambda t: t.half()},
    "q: got it on meta, expected it on cpu as k_cache": {"q": lambda t: t.to("meta")},
    "q: got 4 tokens, expected 2, one for each row of block_tables": {"query_start_loc": None},
    "block_tables: got shape [6], expected [num_seqs, max_blocks]": {"block_tables": lambda t: t.flatten()},
    "block_tables: got torch.int16, expected torch.int32 or torch.int64": {
        "block_tables": lambda t: t.short()
    },
    "block_tables[1, 1]: got 8, expected 0 to 7": {
        "block_tables": lambda t: t.masked_fill(torch.tensor([[False] * 3, [False, True, False]]), 8)
    },
    "block_tables[0, 0]: got -1, expected 0 to 7": {"block_tables": lambda t: t * 0 - 1},
    "seq_lens: got shape [2, 1], expected [2]": {"seq_lens": lambda t: t[:, None]},
    "seq_lens: got shape [3], expected [2]": {
        "block_tables": lambda t: t,
        "seq_lens": lambda t: t[[0, 1, 1]],
    },
    "seq_lens[1]: got 13, expected 0 to 12, 3 blocks of 4 slots": {"seq_lens": torch.tensor([3, 13])},
    "seq_lens[0]: got -1, expected 0 to 12, 3 blocks of 4 slots": {"seq_lens": lambda t: -t // 10},
    "query_start_loc: got shape [2], expected [3]": {"query_start_loc": lambda t: t[1:]},
    "query_start_loc: got 0 to 5, expected 0 to 4, the tokens of q": {
        "query_start_loc": torch.tensor([0, 3, 5])
    },
    "query_start_loc[0:2]: got 3 query tokens, expected 0 to 2, as seq_lens[0]": {
        "seq_lens": torch.tensor([2, 6])
    },
    "query_start_loc[1:3]: got -1 query tokens": {"query_start_loc": torch.tensor([0, 5, 4])},
    "max_query_len: got 2, expected at least 3": {"max_query_len": 2},
    "max_seq_len: got 9, expected at least 10": {"max_seq_len": 9},
    "sliding_window: got 0, expected an integer >= 1, or None": {"sliding_window": 0},
    "soft_cap: got -1.0, expected a number above 0, or None": {"soft_cap": -1.0},
    "num_splits: got 0, expected an integer >= 1, or None": {"num_splits": 0},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(MISTAKES[message])


@pytest.mark.parametrize(
    ("shape", "slots", "message"),
    [
        ((2, 1, 4), [0, 6], "slot_mapping[1]: got slot 6, expected -1 to 5"),
        ((2, 1, 4), [-2, 0], "slot_mapping[0]: got slot -2, expected -1 to 5"),
        ((2, 1, 4), [3, 3], "slot_mapping: got slot 3 twice, expected different slots"),
        ((2, 1, 4), [0], "slot_mapping: got shape [1], expected [2]"),
        ((2, 2, 4), [0, 1], "k: got shape [2, 2, 4], expected [num_tokens, 1, 4]"),
    ],
)
def test_mistakes_in_writing_are_told(shape, slots, message):
    k_cache, v_cache = torch.zeros(2, 3, 2, 1, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        write(torch.zeros(shape), torch.zeros(shape), k_cache, v_cache, torch.tensor(slots))
    assert not k_cache.any()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([[0, 6]], "block_mapping[0, 1]: got block 6, expected 0 to 5"),
        ([[0, 1], [-1, 2]], "block_mapping[1, 0]: got block -1, expected 0 to 5"),
        ([[0, 1], [2, 1]], "expected targets that are different ones and no sources"),
        ([[0, 1], [1, 2]], "expected targets that are different ones and no sources"),
        ([0, 1], "block_mapping: got shape [2], expected [num_pairs, 2]"),
    ],
)
def test_mistakes_in_copying_are_told(mapping, message):
    caches = list(torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match=re.escape(message)):
        copy_blocks(caches, torch.tensor(mapping))
