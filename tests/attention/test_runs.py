"""Tables made of aligned runs of blocks: read at once, and refused where they are not what the hint says."""

from __future__ import annotations

import pytest
import torch

from attention.functional import paged_attention
from attention.runs import folded, longest_run

BLOCK = 4


def case(tables: list[list[int]], lengths: list[int], num_blocks: int = 16, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(num_blocks, BLOCK, 2, 16, generator=random) for _ in range(2))
    q = torch.randn(len(tables), 4, 16, generator=random)
    width = max(map(len, tables))
    table = torch.tensor([[*row, *[-1] * (width - len(row))] for row in tables])
    return q, k, v, table, torch.tensor(lengths)


RUNS = [
    ([[8, 9, 10, 11, 0, 1, 2, 3], [4, 5, 6, 7]], [31, 13], 4),
    ([[8, 9, 10, 11, 0, 1]], [22], 4),  # the last run in part
    ([[8, 9, 10, 11, 2, 3]], [22], 2),  # in an aligned run of four, but not from its beginning
    ([[8, 9, 10, 11], [3, 2]], [16, 8], 1),
    ([[1, 2, 3, 4]], [16], 1),  # in a row, but not aligned
    ([[8, 9, 10, 11, 5]], [16], 8),  # what is not in use does not matter
]


@pytest.mark.parametrize(("tables", "lengths", "run"), RUNS)
@pytest.mark.parametrize("window", [None, 7])
def test_a_run_is_found_and_read_as_the_blocks_one_by_one(tables, lengths, run, window):
    q, k, v, table, seq_lens = case(tables, lengths)
    assert longest_run(table, seq_lens, k, 16) == run
    plain = paged_attention(q, k, v, table, seq_lens, sliding_window=window)
    at_once = paged_attention(q, k, v, table, seq_lens, sliding_window=window, run_blocks=run)
    torch.testing.assert_close(at_once, plain, atol=1e-6, rtol=0)


def test_most_bounds_the_run():
    _, k, _, table, seq_lens = case([[*range(8)]], [32])
    assert [longest_run(table, seq_lens, k, most) for most in (1, 2, 4, 64)] == [1, 2, 4, 16]


def test_a_run_that_ends_behind_the_cache_is_none():
    _, k, _, table, seq_lens = case([[8, 9]], [8], num_blocks=10)
    assert longest_run(table, seq_lens, k, 16) == 2


def test_a_hint_that_is_wrong_is_refused():
    call = case([[8, 9, 10, 11], [3, 2, 0, 1]], [16, 16])
    with pytest.raises(ValueError, match=r"block_tables\[1, 0\]: got 3, expected an aligned run of 2 blocks"):
        paged_attention(*call, run_blocks=2)
    with pytest.raises(ValueError, match="run_blocks: got 0, expected at least 1"):
        paged_attention(*call, run_blocks=0)


def test_nothing_is_copied_and_caches_with_gaps_are_refused():
    _, k, v, table, _ = case([[8, 9, 10, 11]], [16])
    large, _, folded_table = folded(k, v, table, 4)
    assert large.shape == (4, 16, 2, 16)
    assert large.data_ptr() == k.data_ptr()
    assert folded_table.tolist() == [[2]]
    with pytest.raises(ValueError, match="k_cache: got a stride of 256 from block to block, expected 128"):
        folded(k[::2], v[::2], table, 4)
