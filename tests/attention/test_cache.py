"""The paged cache: sequences that grow, fork and end hold what sequences with a tensor of their own hold."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from attention.cache import BlockAllocator, OutOfBlocks, PagedKVCache
from attention.functional import paged_attention, write
from attention.plain import plain_attention

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 4, 2


def a_cache(total_blocks=8, block_size=4, **options):
    allocator = BlockAllocator(total_blocks, block_size, hidden_dim=HEADS * DIM)
    options = {
        "num_layers": LAYERS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "dtype": torch.float64,
    } | options
    return PagedKVCache(block_size, HEADS * DIM, allocator, **options)


class PagedAgainstContiguous(RuleBasedStateMachine):
    """Every sequence has its tokens a second time, in one piece."""

    block_size = 4

    def __init__(self):
        super().__init__()
        self.cache = a_cache(12, self.block_size)
        self.cache.k.fill_(torch.nan)
        self.cache.v.fill_(torch.nan)
        self.random = torch.Generator().manual_seed(0)
        self.histories: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def draw(self, tokens, heads):
        return torch.randn(LAYERS, tokens, heads, DIM, generator=self.random, dtype=torch.float64)

    def pick(self, data, count=1):
        return data.draw(
            st.lists(st.sampled_from(sorted(self.histories)), min_size=1, max_size=count, unique=True)
        )

    @precondition(lambda self: len(self.histories) < 6)
    @rule()
    def new(self):
        empty = torch.empty(LAYERS, 0, KV_HEADS, DIM, dtype=torch.float64)
        self.histories[self.cache.new()] = (empty, empty)

    @precondition(lambda self: 0 < len(self.histories) < 6)
    @rule(data=st.data())
    def fork(self, data):
        (parent,) = self.pick(data)
        self.histories[self.cache.fork(parent)] = self.histories[parent]

    @precondition(lambda self: self.histories)
    @rule(data=st.data())
    def free(self, data):
        (seq_id,) = self.pick(data)
        self.cache.free(seq_id)
        del self.histories[seq_id]

    @precondition(lambda self: self.histories)
    @rule(data=st.data())
    def extend(self, data):
        ids = self.pick(data, 4)
        counts = [data.draw(st.integers(1, 7)) for _ in ids]
        before = [(seq_id, self.cache.length(seq_id), self.cache.block_table(seq_id)) for seq_id in ids]
        free = self.cache.allocator.num_free
        try:
            metadata = self.cache.extend(ids, counts)
        except OutOfBlocks:
            assert free == self.cache.allocator.num_free
            assert before == [(i, self.cache.length(i), self.cache.block_table(i)) for i in ids]
            return
        k, v = self.draw(sum(counts), KV_HEADS), self.draw(sum(counts), KV_HEADS)
        q = self.draw(sum(counts), HEADS)
        for seq_id, more_k, more_v in zip(ids, k.split(counts, 1), v.split(counts, 1), strict=True):
            old_k, old_v = self.histories[seq_id]
            self.histories[seq_id] = torch.cat([old_k, more_k], 1), torch.cat([old_v, more_v], 1)
        positions = [torch.arange(len(self.histories[i][0][0]) - n, len(self.histories[i][0][0]))
                     for i, n in zip(ids, counts, strict=True)]  # fmt: skip
        assert metadata.positions.tolist() == torch.cat(positions).tolist()
        for layer in range(LAYERS):
            write(k[layer], v[layer], self.cache.k[layer], self.cache.v[layer], metadata.slot_mapping)
            out = paged_attention(q[layer], self.cache.k[layer], self.cache.v[layer], **metadata.arguments())
            for seq_id, mine, rows in zip(ids, q[layer].split(counts), out.split(counts), strict=True):
                k_history, v_history = (history[layer] for history in self.histories[seq_id])
                expected, _ = plain_attention(mine, k_history, v_history, DIM**-0.5)
                torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)

    @invariant()
    def every_history_is_there(self):
        cache = self.cache
        for seq_id, histories in self.histories.items():
            for tensor, history in zip((cache.k, cache.v), histories, strict=True):
                there = tensor[:, cache.block_table(seq_id)].flatten(1, 2)[:, : cache.length(seq_id)]
                assert torch.equal(there, history)

    @invariant()
    def blocks_add_up(self):
        tables = [self.cache.block_table(seq_id) for seq_id in self.histories]
        self.cache.allocator.pool.check_integrity(tables)
        distinct = {block for table in tables for block in table}
        assert self.cache.blocks_saved == sum(map(len, tables)) - len(distinct)


class BlocksOfOne(PagedAgainstContiguous):
    block_size = 1


TestPagedAgainstContiguous = PagedAgainstContiguous.TestCase
TestPagedAgainstContiguous.settings = settings(max_examples=60, stateful_step_count=25)
TestBlocksOfOne = BlocksOfOne.TestCase
TestBlocksOfOne.settings = settings(max_examples=30, stateful_step_count=25)


def test_a_fork_shares_until_one_writes():
    cache = a_cache()
    parent = cache.new()
    cache.extend([parent], 6)
    child = cache.fork(parent)
    assert cache.block_table(child) == cache.block_table(parent) == [7, 6]
    assert cache.blocks_saved == 2
    cache.extend([parent, child], 1)  # the first copies; the last holder of a block writes in place
    assert cache.block_table(parent) == [7, 5]
    assert cache.block_table(child) == [7, 6]
    assert cache.blocks_saved == 1


def test_a_fork_at_a_block_boundary_copies_nothing():
    cache = a_cache()
    parent = cache.new()
    cache.extend([parent], 8)
    child = cache.fork(parent)
    cache.extend([parent, child], 1)
    assert cache.block_table(parent) == [7, 6, 5]
    assert cache.block_table(child) == [7, 6, 4]


def test_a_copy_needs_a_block_of_its_own():
    cache = a_cache(total_blocks=2)
    parent = cache.new()
    cache.extend([parent], 6)
    child = cache.fork(parent)
    with pytest.raises(OutOfBlocks, match="asked for 1 blocks, 0 of 2 are free"):
        cache.extend([child], 1)
    assert cache.length(child) == 6
    cache.free(parent)
    cache.extend([child], 1)
    assert cache.block_table(child) == [1, 0]


def test_reset_frees_everything():
    cache = a_cache()
    for _ in range(3):
        cache.extend([cache.new()], 5)
    cache.fork(1)
    cache.reset()
    assert cache.allocator.num_free == 8
    assert cache.extend([], []).max_seq_len == 0


def test_two_caches_may_share_an_allocator():
    allocator = BlockAllocator(4, 4, HEADS * DIM)
    one, two = (PagedKVCache(4, HEADS * DIM, allocator) for _ in range(2))
    one.extend([one.new()], 8)
    two.extend([two.new()], 8)
    assert {*one.block_table(0), *two.block_table(0)} == {0, 1, 2, 3}
    with pytest.raises(OutOfBlocks):
        one.extend([0], 1)


MISTAKES = {
    "total_blocks: got 0, expected an integer >= 1": lambda: BlockAllocator(0, 4, 16),
    "block_size: got 8, expected 4 as the allocator": lambda: PagedKVCache(8, 16, BlockAllocator(4, 4, 16)),
    "hidden_dim: got 8, expected 16 as the allocator": lambda: PagedKVCache(4, 8, BlockAllocator(4, 4, 16)),
    "num_layers: got 0, expected an integer >= 1": lambda: a_cache(num_layers=0),
    "num_kv_heads, head_dim: got 2, None, expected both or neither": lambda: a_cache(head_dim=None),
    "num_kv_heads, head_dim: got 2, 3, expected heads of a width that divides hidden_dim 16": lambda: a_cache(
        head_dim=3
    ),
    "cache: got K and V of [2, 4] heads in torch.float64 on cpu, expected [4, 4] in torch.float64 on cpu": (
        lambda: a_cache().bind(4, 4, torch.float64, "cpu")
    ),
    "cache: its heads are not known before the first use": lambda: (
        PagedKVCache(4, 16, BlockAllocator(4, 4, 16)).k
    ),
    "seq_ids: got 7, expected one of none, there are no sequences": lambda: a_cache().free(7),
    "seq_ids: got [0, 0], expected different sequences": lambda: a_cache().extend([0, 0], 1),
    "num_tokens: got 2 numbers, expected 1 as seq_ids": lambda: a_cache().extend([0], [1, 2]),
    "num_tokens: got 0, expected integers >= 1": lambda: a_cache().extend([0], 0),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MISTAKES[message]()
