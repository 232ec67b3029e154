"""Decoding over the paged cache: token for token what a contiguous cache gives, and nothing left behind."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from attention.cache import OutOfBlocks, PagedKVCache
from attention.generation.agreement import compare
from attention.generation.beam_search import BeamSearch
from attention.generation.decoding import Decoding, decode
from attention.generation.sampling import Greedy, Sampling
from attention.generation.search import DecodingRequest
from attention.swap.swap_space import SwapSpace
from tests.attention.generation import (
    EOS,
    METHODS,
    VOCAB,
    batch,
    prompt,
    transformer,
)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "impl"), [(torch.float64, "torch"), (torch.float64, "reference"), (torch.float32, "reference")]
)
def test_tokens_are_those_of_the_contiguous_cache(method, block_size, dtype, impl):
    model = transformer(dtype)
    requests = batch(METHODS[method])
    kv = model.paged_kv(800 // block_size + 40, block_size, impl)
    paged = decode(model, kv, requests)
    plain = decode(model, model.contiguous_kv(), requests)
    assert [[output.tokens for output in of] for of in paged.outputs] == [
        [output.tokens for output in of] for of in plain.outputs
    ]
    for ours, wanted in zip(itertools.chain(*paged.outputs), itertools.chain(*plain.outputs), strict=True):
        assert ours.score == pytest.approx(wanted.score, abs=1e-10)
    assert paged.sharing.forks == plain.sharing.forks
    assert kv.cache.allocator.num_free == kv.cache.allocator.total_blocks
    assert not kv.cache.sequences


def test_in_float32_only_near_ties_may_differ():
    model = transformer(torch.float32)
    requests = [replace(request, method=method) for method in METHODS.values() for request in batch(method)]
    paged = decode(model, model.paged_kv(2000, 4, "torch"), requests, keep_decisions=True)
    plain = decode(model, model.contiguous_kv(), requests, keep_decisions=True)
    found = compare(paged, plain)
    print(f"{len(found.differences)} differences in float32:", *found.differences, sep="\n")
    assert found.unexplained() == []
    assert found.tokens > 500
    assert found.max_score_error < 1e-4


def test_mixed_methods_and_batches_do_not_change_what_a_request_gets():
    model = transformer()
    requests = [
        DecodingRequest(prompt(17 + number), 12, method, EOS, request_id=number)
        for number, method in enumerate(METHODS.values())
    ]
    together = decode(model, model.paged_kv(300, 4), requests).outputs
    for number, request in enumerate(requests):
        alone = decode(model, model.paged_kv(300, 4), [request]).outputs[0]
        assert [output.tokens for output in alone] == [output.tokens for output in together[number]]


def test_samples_share_their_prompt_and_copy_its_last_block_only():
    model = transformer()
    kv = model.paged_kv(30, 4)
    sharing = decode(model, kv, [DecodingRequest(prompt(10), 4, Sampling(3))]).sharing
    # 10 tokens in 3 blocks; then 11, 12 and 13 tokens of 3 samples, of which the last is not computed
    assert sharing.logical_blocks == [3, 9, 9, 12]
    assert sharing.physical_blocks == [3, 5, 5, 8]
    assert (sharing.forks, sharing.kills, sharing.copied_tokens) == (2, 0, 2 * 4)
    assert sharing.saved_share == pytest.approx(12 / 33)
    assert sharing.peak_saved_share == pytest.approx(4 / 9)
    assert sharing.peak_saved_blocks == 4


def test_a_prompt_that_fills_its_blocks_is_never_copied():
    model = transformer()
    sharing = decode(model, model.paged_kv(30, 4), [DecodingRequest(prompt(8), 6, Sampling(3))]).sharing
    assert sharing.copied_tokens == 0
    assert sharing.forks == 2


def test_beams_that_die_are_freed_at_once():
    model = transformer()
    kv = model.paged_kv(60, 4)
    decoding = Decoding(model, kv, batch(BeamSearch(4), lengths=(5, 8)))
    while decoding.live:
        decoding.step()
        tables = [kv.cache.block_table(branch.seq_id) for branch in decoding.branches()]
        assert len(kv.cache.sequences) == len(tables)
        kv.cache.allocator.pool.check_integrity(tables)
        assert all(kv.length(branch.seq_id) == len(branch.tokens) - 1 for branch in decoding.branches())
    assert decoding.sharing.kills > 0
    assert decoding.sharing.forks > decoding.sharing.kills
    assert kv.cache.allocator.num_free == 60


@pytest.mark.parametrize("num_blocks", [3, 13, 20])
def test_a_pool_that_is_too_small_raises_and_is_left_as_it_was(num_blocks):
    model = transformer()
    kv = model.paged_kv(num_blocks, 4)
    other = kv.new()
    kv.extend([other], [3])
    before = (kv.cache.block_table(other), kv.length(other), kv.cache.allocator.num_free)
    with pytest.raises(OutOfBlocks):
        decode(model, kv, batch(Sampling(4), lengths=(11, 16), eos=None))
    assert (kv.cache.block_table(other), kv.length(other), kv.cache.allocator.num_free) == before
    assert list(kv.cache.sequences) == [other]


def test_the_step_that_lacks_blocks_changes_nothing():
    model = transformer()
    kv = model.paged_kv(10, 4)
    decoding = Decoding(model, kv, batch(Sampling(4), lengths=(11,), eos=None))
    for _ in range(6):  # to 16 tokens in each branch's 4 blocks, two of which all share
        decoding.step()
    assert kv.cache.allocator.num_free == 0
    held = [(branch.seq_id, list(branch.tokens)) for branch in decoding.branches()]
    tables = {seq_id: kv.cache.block_table(seq_id) for seq_id, _ in held}
    k = kv.cache.k.clone()
    with pytest.raises(OutOfBlocks):
        decoding.step()
    assert decoding.steps == 6
    assert {seq_id: kv.cache.block_table(seq_id) for seq_id, _ in held} == tables
    assert [(branch.seq_id, branch.tokens) for branch in decoding.branches()] == held
    assert torch.equal(kv.cache.k, k)


@pytest.mark.parametrize("method", METHODS)
def test_sequences_that_are_dropped_between_steps_are_computed_again(method):
    model = transformer()
    requests = batch(METHODS[method], lengths=(9, 16))
    expected = decode(model, model.contiguous_kv(), requests).outputs
    dropped = []

    def drop_one(step: int, cache: PagedKVCache) -> dict[int, int]:
        if step % 3:
            return {}
        old = sorted(cache.sequences)[step % len(cache.sequences)]
        cache.free(old)
        dropped.append(old)
        return {old: cache.new()}

    kv = model.paged_kv(200, 4)
    decoded = decode(model, kv, requests, between_steps=drop_one)
    assert [[output.tokens for output in of] for of in decoded.outputs] == [
        [output.tokens for output in of] for of in expected
    ]
    assert len(dropped) > 2
    assert kv.cache.allocator.num_free == 200


@pytest.mark.parametrize("method", METHODS)
def test_sequences_that_are_swapped_between_steps_go_on_as_if_nothing_had_happened(method):
    model = transformer()
    requests = batch(METHODS[method], lengths=(9, 16))
    expected = decode(model, model.paged_kv(200, 4), requests)
    kv = model.paged_kv(200, 4)
    space = SwapSpace(kv.cache, 100)
    moved = []

    def swap_some(step: int, cache: PagedKVCache) -> None:
        chosen = sorted(cache.sequences)[step % 2 :: 2]
        before = [cache.block_table(seq_id) for seq_id in chosen]
        space.swap_out(chosen)
        kept = [cache.new(), cache.new()]  # somebody else takes their blocks
        cache.extend(kept, 5)
        space.swap_in(chosen)
        moved.append([cache.block_table(seq_id) for seq_id in chosen] != before)
        for seq_id in kept:
            cache.free(seq_id)

    decoded = decode(model, kv, requests, between_steps=swap_some)
    assert decoded.outputs == expected.outputs  # bit-equal scores too
    assert any(moved)
    assert kv.cache.allocator.num_free == 200


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: DecodingRequest([], 3, Greedy()), "prompt of request 0: got no token"),
        (lambda: DecodingRequest([1], 0, Greedy()), "max_tokens of request 0: got 0"),
        (lambda: Sampling(0), "n: got 0"),
        (lambda: Sampling(1, temperature=0.0), r"temperature: got 0\.0"),
        (lambda: BeamSearch(0), "width: got 0"),
    ],
)
def test_requests_that_ask_for_nothing_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_tokens_and_names_that_are_none_are_refused():
    model = transformer()
    with pytest.raises(ValueError, match=f"request 4: got token {VOCAB}, expected 0 to {VOCAB - 1}"):
        decode(model, model.contiguous_kv(), [DecodingRequest([VOCAB], 2, Greedy(), request_id=4)])
    with pytest.raises(ValueError, match=r"between_steps: got \[99\] replaced"):
        decode(
            model, model.contiguous_kv(), batch(Greedy(), 3, (4,)), between_steps=lambda step, cache: {99: 1}
        )
