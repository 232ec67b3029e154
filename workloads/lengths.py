"""Length samplers: how long prompts and outputs are. The parametric families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from sim.errors import UserError
from sim.registry import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, Registry

Tokens = NDArray[np.int64]
Pairs = tuple[Tokens, Tokens]
"""Prompt and output tokens, one entry a request."""

LONGEST = 1 << 31
"""Tokens that no length exceeds."""

lengths: Registry[type[LengthSampler]] = Registry("length sampler")


class LengthSampler(ABC):
    """A distribution of (prompt tokens, output tokens); its keyword-only parameters are its YAML fields.

    Families are stated for real numbers, which are rounded to the nearest whole one, at least 1. Lengths
    above `max_prompt` and `max_output` are cut to them.
    """

    @abstractmethod
    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """So many pairs.

        `max_total` is the longest sequence that the engine serves, for samplers that keep to it; the engine
        itself cuts an output to what fits, and refuses a prompt that is longer.
        """


@lengths("fixed")
class Fixed(LengthSampler):
    """The same lengths for all.

    Fields:
        prompt: Prompt tokens.
        output: Output tokens.
        max_prompt: Longest prompt.
        max_output: Longest output.
    """

    def __init__(
        self,
        *,
        prompt: PositiveInt,
        output: PositiveInt,
        max_prompt: PositiveInt | None = None,
        max_output: PositiveInt | None = None,
    ) -> None:
        self.prompt = min(prompt, max_prompt or LONGEST)
        self.output = min(output, max_output or LONGEST)

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Constants; nothing is drawn."""
        return np.full(size, self.prompt, dtype=np.int64), np.full(size, self.output, dtype=np.int64)


@lengths("uniform")
class Uniform(LengthSampler):
    """Every whole number of a range with equal chance.

    Fields:
        prompt_min: Shortest prompt.
        prompt_max: Longest prompt drawn.
        output_min: Shortest output.
        output_max: Longest output drawn.
        max_prompt: Longest prompt; longer draws are cut.
        max_output: Longest output; longer draws are cut.
    """

    def __init__(
        self,
        *,
        prompt_min: PositiveInt = 1,
        prompt_max: PositiveInt,
        output_min: PositiveInt = 1,
        output_max: PositiveInt,
        max_prompt: PositiveInt | None = None,
        max_output: PositiveInt | None = None,
    ) -> None:
        _require_order("prompt_min", prompt_min, "prompt_max", prompt_max)
        _require_order("output_min", output_min, "output_max", output_max)
        self.prompt = (prompt_min, prompt_max)
        self.output = (output_min, output_max)
        self.limits = (max_prompt, max_output)

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Independent uniform prompts and outputs."""
        prompts = rng.integers(*self.prompt, size, endpoint=True)
        outputs = rng.integers(*self.output, size, endpoint=True)
        return np.minimum(prompts, self.limits[0] or LONGEST), np.minimum(outputs, self.limits[1] or LONGEST)


@lengths("lognormal")
class Lognormal(LengthSampler):
    """Lengths whose logarithm is normal: the usual first fit to prompts and answers of people.

    Fields:
        prompt_median: Median prompt tokens.
        prompt_sigma: Standard deviation of the logarithm of prompt tokens; the mean is the median x
            exp(sigma^2 / 2).
        output_median: Median output tokens.
        output_sigma: Standard deviation of the logarithm of output tokens.
        max_prompt: Longest prompt; longer draws are cut.
        max_output: Longest output; longer draws are cut.
    """

    def __init__(
        self,
        *,
        prompt_median: PositiveFloat,
        prompt_sigma: NonNegativeFloat,
        output_median: PositiveFloat,
        output_sigma: NonNegativeFloat,
        max_prompt: PositiveInt | None = None,
        max_output: PositiveInt | None = None,
    ) -> None:
        self.prompt = (prompt_median, prompt_sigma)
        self.output = (output_median, output_sigma)
        self.limits = (max_prompt, max_output)

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Independent lognormal prompts and outputs."""
        prompts = lognormal(rng, size, *self.prompt)
        outputs = lognormal(rng, size, *self.output)
        return whole(prompts, self.limits[0]), whole(outputs, self.limits[1])


@lengths("gamma")
class Gamma(LengthSampler):
    """Gamma lengths, with a tail shorter than a lognormal's.

    Fields:
        prompt_mean: Mean prompt tokens.
        prompt_shape: Shape for prompts: 1 is exponential, larger is narrower; the scale is mean / shape.
        output_mean: Mean output tokens.
        output_shape: Shape for outputs.
        max_prompt: Longest prompt; longer draws are cut.
        max_output: Longest output; longer draws are cut.
    """

    def __init__(
        self,
        *,
        prompt_mean: PositiveFloat,
        prompt_shape: PositiveFloat,
        output_mean: PositiveFloat,
        output_shape: PositiveFloat,
        max_prompt: PositiveInt | None = None,
        max_output: PositiveInt | None = None,
    ) -> None:
        self.prompt = (prompt_shape, prompt_mean / prompt_shape)
        self.output = (output_shape, output_mean / output_shape)
        self.limits = (max_prompt, max_output)

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Independent gamma prompts and outputs."""
        prompts = rng.gamma(*self.prompt, size)
        outputs = rng.gamma(*self.output, size)
        return whole(prompts, self.limits[0]), whole(outputs, self.limits[1])


@lengths("weibull")
class Weibull(LengthSampler):
    """Weibull lengths; fits answers that a limit keeps from growing.

    Fields:
        prompt_scale: Scale for prompts in tokens, which 63.2 % stay below; the mean is scale x Gamma(1 + 1 /
            shape).
        prompt_shape: Shape for prompts: 1 is exponential, larger is narrower.
        output_scale: Scale for outputs in tokens.
        output_shape: Shape for outputs.
        max_prompt: Longest prompt; longer draws are cut.
        max_output: Longest output; longer draws are cut.
    """

    def __init__(
        self,
        *,
        prompt_scale: PositiveFloat,
        prompt_shape: PositiveFloat,
        output_scale: PositiveFloat,
        output_shape: PositiveFloat,
        max_prompt: PositiveInt | None = None,
        max_output: PositiveInt | None = None,
    ) -> None:
        self.prompt = (prompt_scale, prompt_shape)
        self.output = (output_scale, output_shape)
        self.limits = (max_prompt, max_output)

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Independent Weibull prompts and outputs."""
        prompts = self.prompt[0] * rng.weibull(self.prompt[1], size)
        outputs = self.output[0] * rng.weibull(self.output[1], size)
        return whole(prompts, self.limits[0]), whole(outputs, self.limits[1])


@lengths("zipf")
class Zipf(LengthSampler):
    """Whole numbers of a range, k with a chance in proportion to k^-exponent: many short, a few very long.

    Fields:
        prompt_exponent: Exponent for prompts; 0 is uniform.
        output_exponent: Exponent for outputs.
        prompt_min: Shortest prompt.
        output_min: Shortest output.
        max_prompt: Longest prompt; by default the longest sequence of the engine.
        max_output: Longest output; by default the longest sequence of the engine.
    """

    def __init__(
        self,
        *,
        prompt_exponent: Annotated[float, Bounds(ge=0, le=20)],
        output_exponent: Annotated[float, Bounds(ge=0, le=20)],
        prompt_min: PositiveInt = 1,
        output_min: PositiveInt = 1,
        max_prompt: PositiveInt | None = None,
        max_output: PositiveInt | None = None,
    ) -> None:
        _require_order("prompt_min", prompt_min, "max_prompt", max_prompt)
        _require_order("output_min", output_min, "max_output", max_output)
        self.prompt = (prompt_exponent, prompt_min, max_prompt)
        self.output = (output_exponent, output_min, max_output)
        self._chances: dict[tuple[float, int, int], NDArray[np.float64]] = {}

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Independent Zipf prompts and outputs. Raises UserError if a range is empty or too long."""
        return self._draw(rng, size, max_total, *self.prompt), self._draw(rng, size, max_total, *self.output)

    def _draw(
        self,
        rng: np.random.Generator,
        size: int,
        max_total: int,
        exponent: float,
        least: int,
        most: int | None,
    ) -> Tokens:
        last = max_total if most is None else most
        key = (exponent, least, last)
        if key not in self._chances:
            if not 0 <= last - least < 10_000_000:
                raise UserError(
                    f"got lengths from {least} to {last}, expected a range of 1 to 10,000,000 lengths"
                )
            weights = np.cumsum((np.arange(least, last + 1) / least) ** -exponent)
            self._chances[key] = weights / weights[-1]
        return least + np.searchsorted(self._chances[key], rng.random(size), side="right")


def whole(values: NDArray[np.float64], limit: int | None) -> Tokens:
    """Lengths as whole tokens from 1 to the limit."""
    return np.clip(np.rint(values), 1, limit or LONGEST).astype(np.int64)


def lognormal(rng: np.random.Generator, size: int, median: float, sigma: float) -> NDArray[np.float64]:
    """Lognormal draws; one beyond all floats is infinite."""
    with np.errstate(over="ignore"):
        return median * np.exp(sigma * rng.standard_normal(size))


def _require_order(low_name: str, low: int, high_name: str, high: int | None) -> None:
    if high is not None and high < low:
        raise UserError(f"{high_name}: got {high}, expected at least {low_name}, {low}")
