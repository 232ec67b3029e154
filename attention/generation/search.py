"""What all ways of decoding have in common: a request, what a step chooses, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Pick(NamedTuple):
    """A chosen continuation: row of its parent in the step's logits, token."""

    row: int
    token: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of a request's live branches in a step.

    `live` are the branches of the next step, in order; `finished` are rows of parents of which an output came to
    its end. A parent without any of both is a branch that dies.
    """

    live: Sequence[Pick]
    finished: frozenset[int]


@dataclass(frozen=True, slots=True)
class Decision:
    """A step as it is kept for a comparison: what was ranked or drawn, and from which scores.

    `position` is where the chosen tokens stand in their sequences. `branches` names what each pick belongs to: a
    branch of a sampled request, a rank of a beam search. `scores` is `[num_rows, vocab_size]`, float64 on the
    CPU. `stop` is how far a beam search is from stopping early (at 0 or above it stops), None where nothing was
    asked.
    """

    position: int
    branches: tuple[int, ...]
    picks: tuple[Pick, ...]
    scores: Tensor
    stop: float | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A generated continuation and its score.

    The score is the sum of the tokens' log-probabilities; a beam search may have divided it by the length.
    """

    tokens: tuple[int, ...]
    score: float


class Search(Protocol):
    """A request's way of decoding. Rows of logits come in the order of the last choice's `live`."""

    competing: bool  # its branches take each other's places
    decisions: list[Decision] | None

    def choose(self, logits: Tensor) -> Choice:
        """Decide about a step from logits `[num_live, vocab_size]`; the first has one row, the prompt's last."""

    def outputs(self) -> Sequence[Output]:
        """What was generated, once nothing is live any more."""

    def gap(self, decision: Decision, index: int, other: Pick) -> float:
        """How far the scores of a decision are from `other` having been its pick `index`."""


class Method(Protocol):
    """How to decode: `Greedy`, `Sampling`, `BeamSearch`."""

    def start(self, request: DecodingRequest, keep: bool) -> Search:
        """The search for one request; `keep` keeps its decisions."""


@dataclass(frozen=True, slots=True)
class DecodingRequest:
    """A prompt and how to go on from it.

    Generation ends with the token `eos`, which is part of the output, or after `max_tokens`. `request_id` tells
    requests apart where random numbers are drawn, whoever else is in the batch. Raises ValueError for an empty
    prompt and for no tokens to generate.
    """

    prompt: Sequence[int]
    max_tokens: int
    method: Method
    eos: int | None = None
    request_id: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"prompt of request {self.request_id}: got no token, expected at least 1")
        if self.max_tokens < 1:
            raise ValueError(
                f"max_tokens of request {self.request_id}: got {self.max_tokens}, expected at least 1"
            )


def log_probabilities(logits: Tensor) -> Tensor:
    """`[num_rows, vocab_size]` of logarithms, float64 on the CPU, whatever the model computes in."""
    return torch.log_softmax(logits.detach().to("cpu", torch.float64), dim=-1)


def check_count(name: str, value: int) -> None:
    """Raises ValueError for less than one."""
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
