"""Greedy decoding, sampling and beam search, against what they mean."""

from __future__ import annotations

import itertools

import pytest
import torch

from attention.generation.beam_search import BeamSearch, best
from attention.generation.decoding import decode
from attention.generation.sampling import Greedy, Sampling, inverse_cdf, uniform
from attention.generation.search import DecodingRequest, Pick
from attention.generation.transformer import Transformer
from tests.attention.generation import (
    logits_of,
    prompt,
    total,
    transformer,
)


def test_greedy_takes_the_most_probable_token_until_the_end():
    model = transformer()
    start = prompt(9)
    (output,) = decode(model, model.paged_kv(20, 4), [DecodingRequest(start, 8, Greedy())]).outputs[0]
    history = list(start)
    for token in output.tokens:
        assert token == int(logits_of(model, history).argmax())
        history.append(token)
    assert len(output.tokens) == 8
    assert output.score == pytest.approx(total(model, start, output.tokens))
    ended = decode(model, model.paged_kv(20, 4), [DecodingRequest(start, 8, Greedy(), eos=output.tokens[2])])
    first = output.tokens.index(output.tokens[2])
    assert ended.outputs[0][0].tokens == output.tokens[: first + 1]


def test_samples_follow_their_own_uniforms():
    model = transformer()
    start = prompt(6)
    request = DecodingRequest(start, 7, Sampling(4, seed=11, temperature=0.7), request_id=5)
    outputs = decode(model, model.paged_kv(60, 4), [request]).outputs[0]
    for branch, output in enumerate(outputs):
        history = list(start)
        for token in output.tokens:
            u = uniform(11, 5, branch, len(history))
            probabilities = torch.softmax(logits_of(model, history) / 0.7, 0).tolist()
            reached = itertools.accumulate(probabilities)
            assert token == next(place for place, sum_ in enumerate(reached) if sum_ > u)
            history.append(token)
        assert output.score == pytest.approx(total(model, start, output.tokens))
    assert len({output.tokens for output in outputs}) == 4


def test_the_inverse_of_the_cumulated_distribution():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.74, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert inverse_cdf(probabilities, u) == token
    third = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0], dtype=torch.float64)
    assert inverse_cdf(third, 1 - 2**-53) == 2


def test_uniforms_are_uniform_and_differ_by_each_of_their_names():
    drawn = torch.tensor([uniform(0, 1, 2, position) for position in range(4000)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, 10, 0, 1)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared of 9 degrees, one in a thousand
    assert len({uniform(*names) for names in itertools.product((0, 1, 12), repeat=4)}) == 81


@pytest.mark.parametrize("eos", [None, 1])
def test_a_beam_search_wide_enough_finds_the_best_of_all(eos):
    model = transformer(vocab_size=4, seed=3)
    start, horizon, width = prompt(5, vocab_size=4), 4, 64
    every = [
        tokens
        for length in range(1, horizon + 1)
        for tokens in itertools.product(range(4), repeat=length)
        if eos not in tokens[:-1] and (length == horizon or tokens[-1] == eos)
    ]
    scores = {tokens: total(model, start, tokens) for tokens in every}
    request = DecodingRequest(start, horizon, BeamSearch(width, length_penalty=0.0), eos)
    outputs = decode(model, model.paged_kv(400, 2), [request]).outputs[0]
    expected = sorted(every, key=lambda tokens: -scores[tokens])[:width]
    assert [output.tokens for output in outputs] == expected
    assert [output.score for output in outputs] == pytest.approx([scores[tokens] for tokens in expected])


def naive_beams(model: Transformer, request: DecodingRequest) -> list[tuple[int, ...]]:
    """The same search over whole histories, in plain Python."""
    width, penalty = request.method.width, request.method.length_penalty
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []

    def final(tokens: tuple[int, ...], score: float) -> float:
        return score / (len(request.prompt) + len(tokens) - (tokens[-1] == request.eos)) ** penalty

    for step in range(1, request.max_tokens + 1):
        every = []
        for beam, (tokens, score) in enumerate(beams):
            logs = torch.log_softmax(logits_of(model, [*request.prompt, *tokens]), 0).tolist()
            every += [(-(score + log), token, beam) for token, log in enumerate(logs)]
        ranked = [((*beams[beam][0], token), -score) for score, token, beam in sorted(every)[: 2 * width]]
        ends = [pair for pair in ranked if pair[0][-1] == request.eos or step == request.max_tokens]
        finished += [(tokens, final(tokens, score)) for tokens, score in ends]
        finished = sorted(finished, key=lambda pair: -pair[1])[:width]
        beams = [pair for pair in ranked if pair not in ends][:width]
        if not beams or (len(finished) == width and finished[-1][1] >= final(*beams[0])):
            break
    return [tokens for tokens, _ in finished]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams_are_those_of_a_search_over_whole_histories(penalty):
    model = transformer(vocab_size=8, seed=5)
    steps = set()
    for seed in range(16):
        request = DecodingRequest(prompt(1 + seed % 3, seed, 8), 7, BeamSearch(3, penalty), eos=seed % 8)
        decoded = decode(model, model.paged_kv(60, 2), [request])
        assert [output.tokens for output in decoded.outputs[0]] == naive_beams(model, request)
        steps.add(len(decoded.sharing.logical_blocks))
    assert len(steps) > 1 or penalty > 1  # some stop early


def test_ties_go_to_the_lower_token_then_to_the_lower_beam():
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0], [2.0, 2.0, 1.0, 0.0]])
    assert best(scores, 4) == [Pick(1, 0), Pick(0, 1), Pick(1, 1), Pick(0, 3)]
    assert best(scores, 6)[4:] == [Pick(0, 2), Pick(1, 2)]
    assert best(scores, 100) == best(scores, 8)
    model = transformer()
    model.head.zero_()  # every token is as probable as every other
    greedy, beams = (
        decode(model, model.paged_kv(30, 4), [DecodingRequest([5, 6], 3, method)]).outputs[0]
        for method in (Greedy(), BeamSearch(2))
    )
    assert [output.tokens for output in greedy] == [(0, 0, 0)]
    assert [output.tokens for output in beams] == [(0, 0, 0), (1, 0, 0)]
