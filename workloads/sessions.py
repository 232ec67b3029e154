"""Sessions: requests that follow from answers. Conversations and agents, one request after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from sim.registry import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, Registry
from sim.units import FOREVER, SECOND
from workloads.lengths import LONGEST, lognormal, whole

session: Registry[type[SessionKind]] = Registry("session")

Turns = Annotated[float, Bounds(ge=1)]


@dataclass(frozen=True, slots=True)
class Script:
    """What a session is going to ask, whatever is answered: waves of requests, one after the other.

    waves: of each request the place in the wave before of the one that it goes on from, 0 in the first wave.
    pauses: ns between the last answer of the wave before and this one; nothing for the first. added: tokens that
    each request of the later waves, in order, adds to what it goes on from; None where they are like prompts.
    """

    waves: list[list[int]]
    pauses: list[int]
    added: list[int] | None = None


class SessionKind(ABC):
    """What users or programs do with answers; its keyword-only parameters are its YAML fields.

    A request of the first wave asks what `lengths` says, behind the shared prefixes. Every later one repeats the
    whole history: the prompt that it goes on from, the answer to it, and something new.
    """

    @abstractmethod
    def scripts(self, rng: np.random.Generator, count: int) -> list[Script]:
        """The scripts of so many sessions."""


@session("conversation", "chat")
class Conversation(SessionKind):
    """A user who reads the answer, thinks, and asks on: each prompt is the whole conversation so far.

    Defaults are the chatbot of InferCept (Abhyankar et al., ICML 2024, table 1), made of ShareGPT: 4.45 pauses in
    a conversation, of 28.6 s with a standard deviation of 15.6 s. Turns are geometric, as they nearly are in public
    ShareGPT conversations (mean 5.15, variance 24.5, where a geometric distribution has 21.4); think times are
    gamma. A conversation ends early where the next prompt would leave no room for an answer.

    Fields:
        turns: Mean number of requests in a conversation.
        max_turns: Most requests in a conversation.
        think_time_s: Mean time from an answer to the user's next message.
        think_time_cv: Standard deviation of that time over its mean; 0 makes all equal.
    """

    def __init__(
        self,
        *,
        turns: Turns = 5.45,
        max_turns: PositiveInt | None = None,
        think_time_s: NonNegativeFloat = 28.6,
        think_time_cv: NonNegativeFloat = 0.545,
    ) -> None:
        self.turns = turns
        self.max_turns = max_turns
        self.think_time = (think_time_s, think_time_cv)

    def scripts(self, rng: np.random.Generator, count: int) -> list[Script]:
        """Chains."""
        turns = rng.geometric(1.0 / self.turns, count)
        pauses = gamma_times(rng, int(turns.sum()), *self.think_time)
        return [
            Script([[0]] * (stop - start), pauses[start:stop]) for start, stop in _cut(turns, self.max_turns)
        ]


@session("agent")
class Agent(SessionKind):
    """A program that calls tools: the answer is a call, the next prompt repeats all and adds the tool's result.

    Calls and their times are by default those of question answering with Wikipedia in InferCept (Abhyankar et al.,
    ICML 2024, table 1): 2.52 calls of 0.69 s with a standard deviation of 0.17 s. The length of results is an
    assumption, as it is not published there. Numbers of calls are geometric, from 1 on; after the last call comes
    the answer. An agent ends early where the next prompt would leave no room for an answer.

    Fields:
        calls: Mean number of tool calls.
        max_calls: Most tool calls.
        tool_time_s: Mean time that a call takes.
        tool_time_cv: Standard deviation of that time over its mean; 0 makes all equal.
        result_tokens_median: Median tokens that a result adds to the context.
        result_tokens_sigma: Standard deviation of the logarithm of them; 0 makes all equal.
    """

    def __init__(
        self,
        *,
        calls: Turns = 2.52,
        max_calls: PositiveInt | None = None,
        tool_time_s: NonNegativeFloat = 0.69,
        tool_time_cv: NonNegativeFloat = 0.246,
        result_tokens_median: PositiveFloat = 100.0,
        result_tokens_sigma: NonNegativeFloat = 1.0,
    ) -> None:
        self.calls = calls
        self.max_calls = max_calls
        self.tool_time = (tool_time_s, tool_time_cv)
        self.result_tokens = (result_tokens_median, result_tokens_sigma)

    def scripts(self, rng: np.random.Generator, count: int) -> list[Script]:
        """Chains with a request more than calls."""
        calls = rng.geometric(1.0 / self.calls, count)
        total = int(calls.sum())
        pauses = gamma_times(rng, total, *self.tool_time)
        results = whole(lognormal(rng, total, *self.result_tokens), LONGEST).tolist()
        return [
            Script([[0]] * (stop - start + 1), [0, *pauses[start:stop]], results[start:stop])
            for start, stop in _cut(calls, self.max_calls)
        ]


def _cut(sizes: NDArray[np.int64], most: int | None) -> list[tuple[int, int]]:
    """Where each of so many runs that stand one behind the other begins and ends, of `most` entries at most."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    stops = ends if most is None else np.minimum(ends, starts + most)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def gamma_times(rng: np.random.Generator, count: int, mean_s: float, cv: float) -> list[int]:
    """Gamma distributed times in ns, all equal if cv is 0."""
    draws = np.ones(count) if cv == 0 else rng.standard_gamma(cv**-2, count) * cv**2
    times: list[int] = np.minimum(np.rint(draws * (mean_s * SECOND)), FOREVER).astype(np.int64).tolist()
    return times
