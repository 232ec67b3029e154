"""Beam search: the most probable continuations of a request, kept side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """The `width` best continuations, searched as vLLM V0 does (and Hugging Face before it).

    Each step ranks the 2 * width best of all continuations of all beams by their summed log-probability, the
    lower token and then the lower beam first among equals. Those that end with `eos` become hypotheses, whatever
    their rank; the best `width` others go on. After `max_tokens` all ranked ones become hypotheses. The best
    `width` hypotheses are kept by their final score, the sum / length ** length_penalty, with a length that
    counts the prompt but not `eos`; 0 compares plain sums. The search stops as soon as `width` hypotheses are
    kept and the best beam, were it to end now, would not beat the worst of them; with `early_stopping` as soon
    as they are kept. Raises ValueError for a width below 1.
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        check_count("width", self.width)

    def start(self, request: DecodingRequest, keep: bool) -> Beams:
        """A search that begins with one beam, the prompt."""
        return Beams(request, self, keep)


class Beam(NamedTuple):
    """Tokens generated so far, and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    total: float


def best(scores: Tensor, count: int) -> list[Pick]:
    """The `count` highest of scores `[num_beams, vocab_size]`; of equals the lower token, then the lower beam."""
    num_beams = len(scores)
    flat = scores.T.reshape(-1)  # in this order, which a stable sort keeps among equals
    if count < len(flat):  # sort only what can be among them
        least = flat.topk(count, sorted=False).values.min()
        index = torch.nonzero(flat >= least).reshape(-1)
    else:
        index = torch.arange(len(flat))
    order = index[flat[index].sort(descending=True, stable=True).indices[:count]].tolist()
    return [Pick(place % num_beams, place // num_beams) for place in order]


class Beams:
    """A beam search under way."""

    competing = True

    def __init__(self, request: DecodingRequest, method: BeamSearch, keep: bool) -> None:
        self.request = request
        self.method = method
        self.beams = [Beam((), 0.0)]
        self.hypotheses: list[Output] = []  # the best first
        self.decisions: list[Decision] | None = [] if keep else None

    def choose(self, logits: Tensor) -> Choice:
        """Rank the continuations, take out those that are finished, and see whether more can come of the rest."""
        request, width = self.request, self.method.width
        totals = torch.tensor([beam.total for beam in self.beams], dtype=torch.float64)
        scores = totals[:, None] + log_probabilities(logits)
        ranked = best(scores, 2 * width)
        last = len(self.beams[0].tokens) + 1 == request.max_tokens
        position = len(request.prompt) + len(self.beams[0].tokens)
        live: list[Pick] = []
        finished: set[int] = set()
        beams: list[Beam] = []
        for pick in ranked:
            beam = Beam((*self.beams[pick.row].tokens, pick.token), float(scores[pick.row, pick.token]))
            if last or pick.token == request.eos:
                self.hypotheses.append(Output(beam.tokens, self._final(beam)))
                finished.add(pick.row)
            elif len(beams) < width:
                live.append(pick)
                beams.append(beam)
        # the sort is stable: of equals the one that finished first, in the order of its rank
        self.hypotheses = sorted(self.hypotheses, key=lambda output: -output.score)[:width]
        stop = self._stop(beams)
        if stop is not None and stop >= 0:
            live, beams = [], []
        self.beams = beams
        if self.decisions is not None:
            ranks = tuple(range(len(ranked)))
            self.decisions.append(Decision(position, ranks, tuple(ranked), scores, stop))
        return Choice(live, frozenset(finished))

    def _final(self, beam: Beam) -> float:
        length = len(self.request.prompt) + len(beam.tokens) - (beam.tokens[-1] == self.request.eos)
        return float(beam.total / length**self.method.length_penalty)

    def _stop(self, beams: Sequence[Beam]) -> float | None:
        """By how much the worst hypothesis beats the best beam; None while hypotheses or beams are missing."""
        if len(self.hypotheses) < self.method.width or not beams:
            return None
        if self.method.early_stopping:
            return float("inf")
        return self.hypotheses[-1].score - self._final(beams[0])

    def outputs(self) -> Sequence[Output]:
        """At most `width` hypotheses, the best first."""
        return self.hypotheses

    def gap(self, decision: Decision, index: int, other: Pick) -> float:
        """Difference of the summed log-probabilities of what has this rank and what else could have it."""
        pick = decision.picks[index]
        return abs(float(decision.scores[pick.row, pick.token] - decision.scores[other.row, other.token]))
