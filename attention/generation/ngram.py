"""An n-gram language model: small, real, and quick enough for many beam searches."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class NGram:
    """Probabilities of the next token from the `order - 1` before it, interpolated down to no context at all.

    Smoothed after Witten and Bell (IEEE Transactions on Information Theory, 1991): a context that was seen c times
    with t different successors gives them c / (c + t) of the probability in proportion to their counts, and leaves
    the rest to the context without its first token; below all is the uniform distribution. Tokens are numbers from
    0 to `vocab_size - 1`. Raises ValueError for an order below 1.
    """

    def __init__(self, texts: Sequence[Sequence[int]], order: int, vocab_size: int) -> None:
        if order < 1:
            raise ValueError(f"order: got {order}, expected at least 1")
        self.order = order
        self.vocab_size = vocab_size
        self._after: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for end, token in enumerate(text):
                for length in range(min(order, end + 1)):
                    self._after[tuple(text[end - length : end])][token] += 1
        self._without_context = self._row((), np.full(vocab_size, 1 / vocab_size))

    def _row(self, context: tuple[int, ...], shorter: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities behind a context that was seen, from those behind one token less."""
        seen = self._after[context]
        count, different = seen.total(), len(seen)
        row = shorter * (different / (count + different)) if count else shorter.copy()
        tokens = np.fromiter(seen, np.int64, different)
        row[tokens] += np.fromiter(seen.values(), np.float64, different) / max(1, count + different)
        return row

    def probabilities(self, history: Sequence[int]) -> NDArray[np.float64]:
        """Of every token to come next, shape [vocab_size]."""
        row = self._without_context
        for length in range(1, min(self.order, len(history) + 1)):
            context = tuple(history[len(history) - length :])
            if context not in self._after:
                break
            row = self._row(context, row)
        return row

    def logits(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Logarithms of the probabilities behind each history, float64 of shape [num_histories, vocab_size]."""
        return torch.from_numpy(np.log(np.stack([self.probabilities(history) for history in histories])))

    def perplexity(self, texts: Sequence[Sequence[int]]) -> float:
        """exp of the mean surprise at each token of the texts but the first of each."""
        surprises = [
            -math.log(self.probabilities(text[max(0, end - self.order + 1) : end])[text[end]])
            for text in texts
            for end in range(1, len(text))
        ]
        return math.exp(sum(surprises) / len(surprises))
