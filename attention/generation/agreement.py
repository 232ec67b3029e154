"""Agreement of two generations: where they part, and how close the scores were there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attention.generation.decoding import Decoded
from attention.generation.search import Decision, Search

ALLOWED_GAP = 1e-4
"""Scores closer than this may change places between two orders of summation in float32."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a branch, or a beam search, chose otherwise than expected.

    `branch` is the branch of a sampled request, the rank of a beam search. `gap` is how far the expected scores
    are from the other choice: a difference of log-probabilities, for sampling the way from the uniform to the
    other token on the cumulated distribution, infinite if nothing could explain it.
    """

    request: int
    position: int
    branch: int
    expected: str
    got: str
    gap: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison found. `tokens` were compared and equal, `max_score_error` is over equal outputs."""

    differences: list[Difference]
    outputs: int
    tokens: int
    max_score_error: float

    def unexplained(self, allowed: float = ALLOWED_GAP) -> list[Difference]:
        """Differences where the scores were not that close."""
        return [difference for difference in self.differences if not difference.gap < allowed]


def compare(got: Decoded, expected: Decoded) -> Agreement:
    """Compare two generations of the same requests, decision by decision, both with `keep_decisions`.

    Behind a difference the two have different histories, so that a branch, or a beam search as a whole, is not
    compared any further. Raises ValueError for different batches and where the decisions were not kept.
    """
    if len(got.searches) != len(expected.searches):
        raise ValueError(f"got {len(got.searches)} requests, expected {len(expected.searches)}")
    differences: list[Difference] = []
    outputs = tokens = 0
    error = 0.0
    for index, (mine, theirs) in enumerate(zip(got.searches, expected.searches, strict=True)):
        found = list(_differences(index, mine, theirs))
        ours, wanted = got.outputs[index], expected.outputs[index]
        if not found:
            found = list(_final(index, got, expected))
        differences += found
        for one, other in zip(ours, wanted, strict=False):
            outputs += 1
            if one.tokens == other.tokens:
                tokens += len(one.tokens)
                error = max(error, abs(one.score - other.score))
    return Agreement(differences, outputs, tokens, error)


def _differences(index: int, got: Search, expected: Search) -> Iterator[Difference]:
    """Where decisions differ: once for each branch, or for the search if its ranks compete."""
    if got.decisions is None or expected.decisions is None:
        raise ValueError("decisions were not kept; decode with keep_decisions=True")
    parted: set[int] = set()
    for mine, theirs in zip(got.decisions, expected.decisions, strict=False):
        if expected.competing:
            worst = max(_choices(index, mine, theirs, expected), key=lambda found: found.gap, default=None)
            worst = worst or _stopping(index, mine, theirs)
            if worst is not None:
                yield worst
                return
        else:
            for found in _choices(index, mine, theirs, expected):
                if found.branch not in parted:
                    parted.add(found.branch)
                    yield found


def _choices(index: int, got: Decision, expected: Decision, search: Search) -> Iterator[Difference]:
    mine = dict(zip(got.branches, got.picks, strict=True))
    for place, (branch, pick) in enumerate(zip(expected.branches, expected.picks, strict=True)):
        other = mine.get(branch)
        same_row = search.competing and other is not None and other.row == pick.row
        if other is None or (other.token == pick.token and (same_row or not search.competing)):
            continue
        gap = search.gap(expected, place, other)
        yield Difference(index, expected.position, branch, str(pick.token), str(other.token), gap)


def _stopping(index: int, got: Decision, expected: Decision) -> Difference | None:
    """A search that stopped when the other went on."""
    wanted, found = (
        "goes on" if decision.stop is None or decision.stop < 0 else "stops" for decision in (expected, got)
    )
    if wanted == found:
        return None
    gap = float("inf") if expected.stop is None or got.stop is None else abs(expected.stop)
    return Difference(index, expected.position, 0, wanted, found, gap)


def _final(index: int, got: Decoded, expected: Decoded) -> Iterator[Difference]:
    """Outputs that differ although every decision was the same: hypotheses in another order."""
    ours, wanted = got.outputs[index], expected.outputs[index]
    if len(ours) != len(wanted):
        yield Difference(index, 0, 0, f"{len(wanted)} outputs", f"{len(ours)}", float("inf"))
        return
    for rank, (one, other) in enumerate(zip(ours, wanted, strict=True)):
        if one.tokens != other.tokens:
            gap = abs(one.score - other.score)
            yield Difference(index, 0, rank, str(other.tokens), str(one.tokens), gap)
            return
