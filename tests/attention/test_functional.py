"""Paged attention against the formula, written out a second time in numpy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.functional import IMPLEMENTATIONS, paged_attention, write

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def by_hand(q, k, v, scale) -> np.ndarray:
    """One query head after the other; q [num_heads, head_dim], k and v [seq_len, num_kv_heads, head_dim]."""
    out = np.zeros(q.shape)
    for head in range(len(q)):
        kv_head = head * k.shape[1] // len(q)
        weights = np.exp(k[:, kv_head] @ q[head] * scale)
        out[head] = weights @ v[:, kv_head] / weights.sum()
    return out


class Case:
    """Sequences written into a shuffled cache whose other slots hold no numbers."""

    def __init__(self, lengths, *, block_size=4, num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float64,
                 device="cpu", index=torch.int64, seed=0):  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.blocks = [-(-length // block_size) for length in lengths]
        num_blocks = sum(self.blocks) + 3
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.v_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.q = torch.randn(len(lengths), num_heads, head_dim, generator=random, dtype=torch.float64).to(
            dtype
        )
        order = torch.randperm(num_blocks, generator=random)
        self.block_tables = torch.full((len(lengths), max([1, *self.blocks])), -1, dtype=index)
        self.histories = []
        first = 0
        for row, length in enumerate(lengths):
            mine = order[first : first + self.blocks[row]]
            first += self.blocks[row]
            self.block_tables[row, : len(mine)] = mine
            k, v = (
                torch.randn(length, num_kv_heads, head_dim, generator=random, dtype=torch.float64).to(dtype)
                for _ in range(2)
            )
            self.histories.append((k, v))
            slots = (mine[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
            write(k.to(device), v.to(device), self.k_cache, self.v_cache, slots.to(device))
        self.q, self.block_tables = self.q.to(device), self.block_tables.to(device)
        self.seq_lens = torch.tensor(lengths, dtype=index, device=device)

    def run(self, impl="auto", **options) -> torch.Tensor:
        return paged_attention(
            self.q, self.k_cache, self.v_cache, self.block_tables, self.seq_lens, impl=impl, **options
        )

    def expected(self, scale) -> list[np.ndarray]:
        q = self.q.double().cpu().numpy()
        return [by_hand(q[row], k.double().numpy(), v.double().numpy(), scale)
                for row, (k, v) in enumerate(self.histories)]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_every_implementation_computes_the_formula(impl, dtype, heads, block_size, device):
    num_heads, num_kv_heads = heads
    case = Case(
        [1, 16, 7, 40, 5], block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype,
        device=device,
    )  # fmt: skip
    out = case.run(impl)
    assert out.shape == case.q.shape
    assert out.dtype == dtype
    for row, expected in enumerate(case.expected(1 / np.sqrt(8))):
        np.testing.assert_allclose(out[row].double().cpu(), expected, rtol=0, atol=TOLERANCE[dtype])


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    block_size=st.integers(1, 9),
    group=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8]),
    index=st.sampled_from([torch.int32, torch.int64]),
    scale=st.sampled_from([None, 0.3]),
)
def test_the_implementations_agree(lengths, block_size, group, num_kv_heads, head_dim, index, scale):
    case = Case(
        lengths, block_size=block_size, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        index=index,
    )  # fmt: skip
    expected = case.run("reference", scale=scale)
    for length, row in zip(lengths, expected, strict=True):
        assert length or not row.any(), "nothing to attend over gives zeros"
    for impl in IMPLEMENTATIONS:
        torch.testing.assert_close(case.run(impl, scale=scale), expected, rtol=0, atol=1e-12)


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


def attend(**wrong):
    case = Case([10, 6])
    arguments = {
        "q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache, "block_tables": case.block_tables,
        "seq_lens": case.seq_lens,
    }  # fmt: skip
    options = {"impl": wrong.pop("impl", "auto")}
    arguments |= {name: change(arguments[name]) for name, change in wrong.items()}
    return paged_attention(*arguments.values(), **options)


MISTAKES = {
    "impl: got 'triton', expected one of auto, reference, torch": {"impl": "triton"},
    "k_cache: got shape [8, 4, 2], expected [num_blocks, block_size, num_kv_heads, head_dim]": {
        "k_cache": lambda t: t[..., 0]
    },
    "v_cache: got shape [7, 4, 2, 8], expected [8, 4, 2, 8]": {"v_cache": lambda t: t[1:]},
    "v_cache: got torch.float32, expected torch.float64 as k_cache": {"v_cache": lambda t: t.float()},
    "q: got shape [2, 4, 5], expected [num_tokens, num_heads, 8]": {"q": lambda t: t[..., :5]},
    "q: got 3 heads, expected a multiple of the 2 KV heads": {"q": lambda t: t[:, :3]},
    "q: got torch.float16, expected torch.float64 as k_cache": {"q": lambda t: t.half()},
    "q: got it on meta, expected it on cpu as k_cache": {"q": lambda t: t.to("meta")},
    "block_tables: got shape [1, 3], expected [2, max_blocks]": {"block_tables": lambda t: t[:1]},
    "block_tables: got torch.int16, expected torch.int32 or torch.int64": {
        "block_tables": lambda t: t.short()
    },
    "block_tables[1, 1]: got 8, expected 0 to 7": {
        "block_tables": lambda t: t.masked_fill(torch.tensor([[False] * 3, [False, True, False]]), 8)
    },
    "block_tables[0, 0]: got -1, expected 0 to 7": {"block_tables": lambda t: t * 0 - 1},
    "seq_lens: got shape [2, 1], expected [2]": {"seq_lens": lambda t: t[:, None]},
    "seq_lens[1]: got 13, expected 0 to 12, 3 blocks of 4 slots": {
        "seq_lens": lambda t: torch.tensor([1, 13])
    },
    "seq_lens[0]: got -1, expected 0 to 12, 3 blocks of 4 slots": {"seq_lens": lambda t: -t // 10},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(**MISTAKES[message])


@pytest.mark.parametrize(
    ("shape", "slots", "message"),
    [
        ((2, 1, 4), [0, 6], "slot_mapping: got slot 6, expected -1 to 5"),
        ((2, 1, 4), [-2, 0], "slot_mapping: got slot -2, expected -1 to 5"),
        ((2, 1, 4), [0], "slot_mapping: got shape [1], expected [2]"),
        ((2, 2, 4), [0, 1], "k: got shape [2, 2, 4], expected [num_tokens, 1, 4]"),
    ],
)
def test_mistakes_in_writing_are_told(shape, slots, message):
    k_cache, v_cache = torch.zeros(2, 3, 2, 1, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        write(torch.zeros(shape), torch.zeros(shape), k_cache, v_cache, torch.tensor(slots))
