"""Shared prefixes: what many prompts begin with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.registry import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from workloads.lengths import lognormal, whole
from workloads.streams import Streams

LONGEST_PREFIX = 1 << 24
"""Tokens that no prefix exceeds."""


class Lead(NamedTuple):
    """What a prompt begins with: the names of its content, and the positions where the run of each ends."""

    names: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.ends[-1] if self.ends else 0


class SharedPrefix(ABC):
    """A pool of prefixes of which each request, or session, begins with one.

    They are popular by Zipf's law: the one of rank i is drawn in proportion to 1 / i^zipf.
    """

    stream: str
    """The named random stream that it draws from."""

    def __init__(self, count: int, zipf: float) -> None:
        weights = np.arange(1, count + 1, dtype=np.float64) ** -zipf
        self._shares = np.cumsum(weights / weights.sum())
        self._shares[-1] = 1.0

    @abstractmethod
    def lengths(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Tokens of each prefix of the pool, by rank; the first are the same however many there are."""

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Ranks from 0 of so many requests' prefixes."""
        return np.searchsorted(self._shares, rng.random(size), side="right")


class SystemPrompts(SharedPrefix):
    """System prompts, the instructions of an application that stand before what its users say.

    Their popularity follows Zipf's law with an exponent of 1.1, as in the evaluation of Preble (Srivatsa et al.,
    2024); their length is the shortest that ChunkAttention was evaluated with, 1,024 tokens (Ye et al., ACL
    2024, which goes up to 4,096). That there are 100 is an assumption.

    Fields:
        count: Different system prompts.
        zipf: Exponent of their popularity; 0 makes all equally popular.
        tokens_median: Median of their lengths.
        tokens_sigma: Standard deviation of the logarithm of their lengths; 0 makes all equally long.
    """

    stream = "system_prompts"

    def __init__(
        self,
        *,
        count: PositiveInt = 100,
        zipf: NonNegativeFloat = 1.1,
        tokens_median: PositiveFloat = 1024.0,
        tokens_sigma: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(count, zipf)
        self.count = count
        self.tokens = (tokens_median, tokens_sigma)

    def lengths(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Lognormal lengths."""
        return whole(lognormal(rng, self.count, *self.tokens), LONGEST_PREFIX)


class FewShot(SharedPrefix):
    """Instructions with examples, the same for all requests of a task.

    The lengths are those of the shared prefixes of the PagedAttention paper (Kwon et al., SOSP 2023, section
    6.4, translation with LLaMA-13B): 80 tokens with one example, 341 with five.

    Fields:
        tasks: Different tasks.
        zipf: Exponent of their popularity; 0 makes all equally popular.
        instruction_tokens: Tokens before the examples.
        examples: Examples of each task.
        example_tokens: Tokens of an example.
    """

    stream = "few_shot"

    def __init__(
        self,
        *,
        tasks: PositiveInt = 1,
        zipf: NonNegativeFloat = 1.1,
        instruction_tokens: NonNegativeInt = 15,
        examples: PositiveInt = 5,
        example_tokens: PositiveInt = 65,
    ) -> None:
        super().__init__(tasks, zipf)
        self.tasks = tasks
        self.tokens = min(instruction_tokens + examples * example_tokens, LONGEST_PREFIX)

    def lengths(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """The same for all."""
        return np.full(self.tasks, self.tokens)


class Leads:
    """What requests begin with, drawn from pools that stand one behind the other in a prompt."""

    def __init__(self, streams: Streams, pools: Sequence[SharedPrefix]) -> None:
        self.pools = pools
        self._streams = streams
        # A stream for the lengths alone, so that the draws do not depend on how many prefixes there are.
        self._lengths = [pool.lengths(streams(f"{pool.stream}.lengths")) for pool in pools]
        self._made: dict[tuple[int, ...], Lead] = {}

    @property
    def shortest(self) -> int:
        """Tokens that every prompt begins with at least."""
        return sum(int(lengths.min()) for lengths in self._lengths)

    def chunks(self, size: int) -> Iterator[list[Lead]]:
        """Endless lists of the leads of requests that follow each other; equal leads are one object."""
        streams = [self._streams(pool.stream) for pool in self.pools]
        while True:
            drawn = [pool.draw(rng, size).tolist() for pool, rng in zip(self.pools, streams, strict=True)]
            yield [self._lead(ranks) for ranks in zip(*drawn, strict=True)]

    def _lead(self, ranks: tuple[int, ...]) -> Lead:
        lead = self._made.get(ranks)
        if lead is None:
            pools = len(ranks)
            names = tuple(-1 - rank * pools - pool for pool, rank in enumerate(ranks))
            tokens = [int(self._lengths[pool][rank]) for pool, rank in enumerate(ranks)]
            lead = self._made[ranks] = Lead(names, tuple(np.cumsum(tokens).tolist()))
        return lead
