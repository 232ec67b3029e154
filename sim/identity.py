"""Content identities: one number for a token and everything that stands before it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence as Ordered

import numpy as np
from numpy.typing import NDArray

from sim.request import Request, Sequence

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

UNWRITTEN = -1
"""In the place of an identity: a slot that was handed out and not written since."""

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_OWN, _CONTENT, _GENERATED = 1, 2, 3  # where a token comes from


def mixed(word: int) -> int:
    """A word with each bit spread over all others: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    word = (word ^ word >> 30) * _FIRST & _MASK
    word = (word ^ word >> 27) * _SECOND & _MASK
    return word ^ word >> 31


def mixed_words(words: Words) -> Words:
    """`mixed` for every word, in place."""
    shifted = words >> np.uint64(30)
    words ^= shifted
    words *= np.uint64(_FIRST)
    words ^= np.right_shift(words, np.uint64(27), out=shifted)
    words *= np.uint64(_SECOND)
    words ^= np.right_shift(words, np.uint64(31), out=shifted)
    return words


class History:
    """What the tokens of a sequence are: streams of keys, each from a position on.

    The identity of a token is the sum of the keys of all tokens up to it, in 63 bits. Keys are as good as
    random and depend on the position, so that equal sums mean equal histories but for one chance in 2**63; and
    a sum is the one chain that numpy computes along an array.

    A token's key is the number of a SplitMix64 stream at the token's position. The stream of a prompt is
    seeded by what the prompt says, run by run, or by its request where that is not known; the stream of
    generated tokens by the name that they go by, or by the request and the branch. Up to a fork both branches
    have the same streams.
    """

    __slots__ = ("seeds", "starts")

    def __init__(self, starts: list[int], seeds: list[int]) -> None:
        self.starts = starts
        self.seeds = seeds

    @classmethod
    def of(cls, request: Request) -> History:
        """The history of branch 0."""
        starts: list[int] = []
        seeds: list[int] = []
        covered = 0
        if request.content:
            if request.content_ends:
                covered = request.content_ends[-1]
                starts += (0, *request.content_ends[:-1])
            else:
                grain = request.content_grain
                covered = len(request.content) * grain
                if grain > 1:
                    covered = min(covered, request.prompt_tokens)
                starts += range(0, covered, grain)
            words = np.array([name & _MASK for name in request.content[: len(starts)]], np.uint64)
            begins = np.array(starts, np.uint64) * np.uint64(_STEP)
            seeds += mixed_words(mixed_words(words) + begins + np.uint64(_CONTENT)).tolist()
        if covered < request.prompt_tokens:
            starts.append(covered)
            seeds.append(mixed(mixed(request.id) + _OWN & _MASK))
        starts.append(max(covered, request.prompt_tokens))
        output = request.output_content
        if output is None:
            seeds.append(_branch_seed(request, 0))
        else:
            seeds.append(mixed(mixed(output & _MASK) + request.prompt_tokens * _STEP + _CONTENT & _MASK))
        return cls(starts, seeds)

    @classmethod
    def along(cls, sequence: Sequence) -> History:
        """The history of a branch by its lineage."""
        request, forks = sequence.request, []
        link = sequence.lineage
        while link is not None:
            forks.append(link)
            link = link.parent
        history = cls.of(request)
        for fork in reversed(forks):
            history = history.fork(request, fork.branch, fork.start)
        return history

    def fork(self, request: Request, branch: int, length: int) -> History:
        """The history of a branch that goes its own way after `length` tokens."""
        shared = bisect_left(self.starts, length)
        return History([*self.starts[:shared], length], [*self.seeds[:shared], _branch_seed(request, branch)])

    def total_after(self, position: int, total: int) -> int:
        """The sum of keys including the token at a position, from the sum up to there."""
        seed = self.seeds[bisect_right(self.starts, position) - 1]
        return total + mixed(seed + (position + 1) * _STEP & _MASK) & _MASK

    def identities(self, begin: int, end: int, total: int = 0) -> tuple[Ints, int]:
        """Identities of the tokens from `begin` to `end`, and the sum of keys there, from the sum at `begin`."""
        keys = np.arange(begin + 1, end + 1, dtype=np.uint64)
        keys *= np.uint64(_STEP)
        for start, stop, seed in zip(self.starts, [*self.starts[1:], end], self.seeds, strict=True):
            if begin < stop and start < end:
                keys[max(0, start - begin) : stop - begin] += np.uint64(seed)
        sums = mixed_words(keys).cumsum()
        sums += np.uint64(total)
        after = int(sums[-1]) if len(sums) else total
        sums >>= np.uint64(1)
        return sums.view(np.int64), after


def _branch_seed(request: Request, branch: int) -> int:
    return mixed(mixed(mixed(request.id) + _GENERATED & _MASK) + branch & _MASK)


def identity(total: int) -> int:
    """The identity of a token up to which the keys add up to this."""
    return total >> 1


def identities(histories: Ordered[History], lengths: Ordered[int]) -> tuple[Ints, list[int]]:
    """`History.identities` from the start of many histories at once, one after the other; the sum of keys of each."""
    long = np.array(lengths, np.int64)
    parts = np.array([len(history.starts) for history in histories], np.int64)
    starts = np.array([start for history in histories for start in history.starts], np.int64)
    seeds = np.array([seed for history in histories for seed in history.seeds], np.uint64)
    ends = np.append(starts[1:], 0)
    ends[np.cumsum(parts) - 1] = long
    limits = np.repeat(long, parts)
    spans = np.minimum(ends, limits) - np.minimum(starts, limits)
    first = np.cumsum(long) - long
    keys = np.arange(1, long.sum() + 1, dtype=np.uint64)
    keys -= np.repeat(first.astype(np.uint64), long)
    keys *= np.uint64(_STEP)
    keys += np.repeat(seeds, spans)
    sums = np.zeros(len(keys) + 1, np.uint64)
    np.cumsum(mixed_words(keys), out=sums[1:])
    before = sums[first]
    totals = sums[first + long] - before
    chained = sums[1:]
    chained -= np.repeat(before, long)
    chained >>= np.uint64(1)
    return chained.view(np.int64), totals.tolist()
