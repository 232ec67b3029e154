"""Greedy decoding and parallel sampling: branches that part after the prompt and never meet again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.generation.search import (
    Choice,
    Decision,
    DecodingRequest,
    Output,
    Pick,
    check_count,
    log_probabilities,
)


def uniform(seed: int, request_id: int, branch: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments only, with 53 random bits.

    One per request, branch and position, as if all had been drawn beforehand: neither the batch nor the order in
    which branches are served can change what is sampled.
    """
    key = f"{seed}/{request_id}/{branch}/{position}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) * 2.0**-53


def inverse_cdf(probabilities: Tensor, u: float) -> int:
    """The first token at which the cumulated `probabilities` `[vocab_size]` exceed `u`, a share of their sum.

    There is always one, and it has a probability: with u at most 1 - 2**-53 even the rounded product stays below
    the sum.
    """
    cumulated = probabilities.cumsum(0)
    return int(torch.searchsorted(cumulated, u * cumulated[-1], right=True))


def distance(probabilities: Tensor, u: float, token: int) -> float:
    """By how much `u` would have to move for `inverse_cdf` to take `token`; 0 where it does."""
    cumulated = probabilities.cumsum(0) / probabilities.sum()
    begin = float(cumulated[token - 1]) if token else 0.0
    return max(0.0, begin - u, u - float(cumulated[token]))


@dataclass(frozen=True, slots=True)
class Greedy:
    """The most probable token, always; the lower one of equals."""

    def start(self, request: DecodingRequest, keep: bool) -> Branches:
        """One branch."""
        return Branches(request, 1, _Greediest(), keep)


@dataclass(frozen=True, slots=True)
class Sampling:
    """`n` branches, each sampled by the inverse of the cumulated distribution from its own uniforms.

    `temperature` divides the logits. Raises ValueError for none to sample and for a temperature that is not
    above 0.
    """

    n: int = 1
    seed: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_count("n", self.n)
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected above 0; Greedy() is its limit")

    def start(self, request: DecodingRequest, keep: bool) -> Branches:
        """`n` branches that begin with the first sampled token."""
        return Branches(request, self.n, _Inverse(self, request.request_id), keep)


class _Greediest:
    """Takes the token of the highest score."""

    def take(self, scores: Tensor, branch: int, position: int) -> int:
        return int(scores.argmax())  # the first of equals

    def gap(self, scores: Tensor, branch: int, position: int, token: int) -> float:
        return float(scores.max() - scores[token])


class _Inverse:
    """Takes the token at which the cumulated probabilities pass the branch's uniform."""

    def __init__(self, sampling: Sampling, request_id: int) -> None:
        self.sampling = sampling
        self.request_id = request_id

    def take(self, scores: Tensor, branch: int, position: int) -> int:
        return inverse_cdf(self._probabilities(scores), self._uniform(branch, position))

    def gap(self, scores: Tensor, branch: int, position: int, token: int) -> float:
        return distance(self._probabilities(scores), self._uniform(branch, position), token)

    def _probabilities(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores / self.sampling.temperature, dim=-1)

    def _uniform(self, branch: int, position: int) -> float:
        return uniform(self.sampling.seed, self.request_id, branch, position)


class Branches:
    """Branches of one request that never look at each other. Their score is that of the model itself.

    A branch's next token depends on the prompt, the branch and its own tokens only.
    """

    competing = False

    def __init__(
        self, request: DecodingRequest, number: int, rule: _Greediest | _Inverse, keep: bool
    ) -> None:
        self.request = request
        self.rule = rule
        self.tokens: list[list[int]] = [[] for _ in range(number)]
        self.scores = [0.0] * number
        self.decisions: list[Decision] | None = [] if keep else None
        self._live = list(range(number))
        self._step = 0

    def choose(self, logits: Tensor) -> Choice:
        """One token for each live branch; in the first step all of them start from the one row."""
        scores = log_probabilities(logits)
        live: list[Pick] = []
        finished: set[int] = set()
        picks: list[Pick] = []
        branches, self._live = self._live, []
        position = len(self.request.prompt) + self._step
        for index, branch in enumerate(branches):
            row = index if self._step else 0
            token = self.rule.take(scores[row], branch, position)
            picks.append(Pick(row, token))
            self.tokens[branch].append(token)
            self.scores[branch] += float(scores[row, token])
            if token == self.request.eos or len(self.tokens[branch]) == self.request.max_tokens:
                finished.add(row)
            else:
                live.append(picks[-1])
                self._live.append(branch)
        self._step += 1
        if self.decisions is not None:
            self.decisions.append(Decision(position, tuple(branches), tuple(picks), scores))
        return Choice(live, frozenset(finished))

    def outputs(self) -> Sequence[Output]:
        """One for each branch, in their order."""
        return [Output(tuple(tokens), score) for tokens, score in zip(self.tokens, self.scores, strict=True)]

    def gap(self, decision: Decision, index: int, other: Pick) -> float:
        """Greedy: difference of log-probabilities. Sampling: the way from the uniform to the other token."""
        scores = decision.scores[decision.picks[index].row]
        return self.rule.gap(scores, decision.branches[index], decision.position, other.token)
