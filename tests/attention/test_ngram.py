"""The n-gram model: probabilities, and what it is trained on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attention.generation.ngram import NGram

TEXT = [0, 1, 2, 0, 1, 3, 0, 1, 2]


def test_probabilities_by_hand():
    """Behind (0, 1): seen 3 times with 2 successors; behind (1,) the same; below the nine tokens, four different."""
    unigram = np.array([3, 3, 2, 1]) / 13 + 4 / 13 / 4
    bigram = np.array([0, 0, 2, 1]) / 5 + 2 / 5 * unigram
    trigram = np.array([0, 0, 2, 1]) / 5 + 2 / 5 * bigram
    model = NGram([TEXT], 3, 4)
    np.testing.assert_allclose(model.probabilities([]), unigram)
    np.testing.assert_allclose(model.probabilities([1]), bigram)
    np.testing.assert_allclose(model.probabilities([3, 0, 1]), trigram)
    np.testing.assert_allclose(model.probabilities([3, 1]), bigram)  # (3, 1) was never seen
    np.testing.assert_allclose(model.logits([[1], [3, 0, 1]]).exp(), [bigram, trigram])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_add_up_to_one(order):
    model = NGram([TEXT, [3, 3]], order, 6)
    for history in ([], [0], [5], [0, 1], [3, 3], [1, 2, 0, 1]):
        assert model.probabilities(history).sum() == pytest.approx(1)
        assert model.probabilities(history).min() > 0


def test_perplexity_is_that_of_the_mean_surprise():
    model = NGram([TEXT], 2, 4)
    expected = math.exp(-(math.log(model.probabilities([0])[1]) + math.log(model.probabilities([1])[3])) / 2)
    assert model.perplexity([[0, 1, 3], [2]]) == pytest.approx(expected)
    assert model.perplexity([TEXT]) < NGram([TEXT], 1, 4).perplexity([TEXT])


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="order: got 0, expected at least 1"):
        NGram([TEXT], 0, 4)
