"""Comparisons of generations: they find what differs, once, with how close it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention.cache import PagedKVCache
from attention.generation.agreement import compare
from attention.generation.beam_search import BeamSearch
from attention.generation.decoding import decode
from attention.generation.sampling import Greedy
from attention.generation.search import Pick
from tests.attention.generation import (
    LENGTHS,
    METHODS,
    batch,
    transformer,
)


@pytest.mark.parametrize("method", ["samples", "beams"])
def test_a_missing_copy_on_write_is_found_and_not_explained(monkeypatch, method):
    model = transformer(torch.float32)
    requests = batch(METHODS[method], lengths=(7, 18))
    plain = decode(model, model.contiguous_kv(), requests, keep_decisions=True)
    right = compare(decode(model, model.paged_kv(200, 16), requests, keep_decisions=True), plain)
    assert right.unexplained() == []
    monkeypatch.setattr(PagedKVCache, "_to_copy", lambda self, sequences: [False for _ in sequences])
    wrong = decode(model, model.paged_kv(200, 16), requests, keep_decisions=True)
    assert compare(wrong, plain).unexplained()


@pytest.mark.parametrize("method", METHODS)
def test_a_difference_is_told_once_with_its_gap(method):
    model, nudged = transformer(), transformer()
    requests = batch(METHODS[method])
    plain = decode(model, model.contiguous_kv(), requests, keep_decisions=True)
    equal = compare(plain, plain)
    assert equal.differences == []
    assert equal.tokens == sum(len(output.tokens) for of in plain.outputs for output in of)
    nudged.head.add_(0.05 * torch.randn(nudged.head.shape, generator=torch.Generator().manual_seed(1)))
    found = compare(decode(nudged, nudged.contiguous_kv(), requests, keep_decisions=True), plain)
    assert found.differences
    places = [(difference.request, difference.branch) for difference in found.differences]
    assert len(set(places)) == len(places)
    assert all(0 < difference.gap < 5 for difference in found.differences)
    assert found.unexplained(5) == []


def test_a_beam_from_another_parent_is_a_difference():
    model = transformer()
    decoded = [
        decode(model, model.contiguous_kv(), batch(BeamSearch(3)), keep_decisions=True) for _ in range(2)
    ]
    decisions = decoded[0].searches[1].decisions
    row, token = decisions[4].picks[2]
    other = Pick((row + 1) % 3, token)
    decisions[4] = replace(decisions[4], picks=(*decisions[4].picks[:2], other, *decisions[4].picks[3:]))
    (found,) = compare(*decoded).differences
    assert (found.request, found.branch, found.position) == (1, 2, LENGTHS[1] + 4)
    scores = decisions[4].scores
    assert found.gap == abs(float(scores[row, token] - scores[other.row, token]))


def test_what_cannot_be_compared_is_refused():
    model = transformer()
    one = decode(model, model.contiguous_kv(), batch(Greedy(), 2), keep_decisions=True)
    with pytest.raises(ValueError, match="got 4 requests, expected 1"):
        compare(one, decode(model, model.contiguous_kv(), batch(Greedy(), 2, (5,)), keep_decisions=True))
    with pytest.raises(ValueError, match="keep_decisions=True"):
        compare(one, decode(model, model.contiguous_kv(), batch(Greedy(), 2)))
