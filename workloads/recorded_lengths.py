"""Lengths of real conversations: recorded ones, and stand-ins for published data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim.errors import UserError
from sim.registry import PositiveInt
from workloads.columns import OUTPUT, PROMPT, chosen
from workloads.csv_table import read_csv
from workloads.lengths import LONGEST, LengthSampler, Pairs, lengths, lognormal, whole

PUBLISHED_MAX_TOTAL = 2048
"""Prompt and output tokens together of the published traces at most."""

MAX_REDRAWS = 1000


@lengths("empirical")
class Empirical(LengthSampler):
    """Pairs drawn with replacement from a CSV file, so that prompts and outputs stay as related as they are.

    Columns are found under the names in use: prompt_tokens, num_prefill_tokens, input_length, ContextTokens,
    ... An output of 0 tokens counts as 1. Raises UserError with `file:line` for a row that is wrong.

    Fields:
        path: CSV file with a header, plain or gzipped.
        prompt_column: Column of prompt tokens, if it goes by another name.
        output_column: Column of output tokens, if it goes by another name.
        max_prompt: Longest prompt; longer ones are cut.
        max_output: Longest output; longer ones are cut.
    """

    def __init__(
        self,
        *,
        path: Path,
        prompt_column: str | None = None,
        output_column: str | None = None,
        max_prompt: PositiveInt | None = None,
        max_output: PositiveInt | None = None,
    ) -> None:
        columns = (
            chosen(PROMPT, prompt_column, "prompt_column"),
            chosen(OUTPUT, output_column, "output_column"),
        )
        prompts, outputs = [], []
        for block, (prompt, output) in read_csv(path, columns):
            if not prompt.all():
                row = int(np.flatnonzero(prompt == 0)[0])
                raise UserError(f"{block.where(row)}: got a prompt of 0 tokens, expected at least 1")
            prompts.append(prompt)
            outputs.append(output)
        self.prompts = np.minimum(np.concatenate(prompts), max_prompt or LONGEST)
        self.outputs = np.clip(np.concatenate(outputs), 1, max_output or LONGEST)

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Pairs of the file, each equally likely."""
        rows = rng.integers(len(self.prompts), size=size)
        return self.prompts[rows], self.outputs[rows]


@lengths("sharegpt")
class ShareGpt(LengthSampler):
    """Stand-in for vLLM's ShareGPT trace: mean prompt 161.31, mean output 337.99, at most 2048 together.

    Kwon et al., SOSP 2023, Fig. 11. Outputs are gamma of shape 1.30 and scale 264. Prompts are lognormal of
    sigma 1.28, as first turns of public ShareGPT conversations are, and of the median that gives the
    published mean. Pairs longer than 2048 tokens, or than the engine serves, are drawn again.

    Fields:
        max_prompt: Longest prompt; longer draws are cut.
        max_output: Longest output; longer draws are cut.
    """

    def __init__(
        self, *, max_prompt: PositiveInt | None = None, max_output: PositiveInt | None = None
    ) -> None:
        self.limits = (max_prompt, max_output)

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Independent pairs that fit. Raises UserError where practically none does."""
        return _fitting(
            size,
            max_total,
            self.limits,
            lambda count: lognormal(rng, count, 82.28, 1.28),
            lambda count: rng.gamma(1.30, 264.0, count),
        )


@lengths("alpaca")
class Alpaca(LengthSampler):
    """Stand-in for vLLM's Alpaca trace: mean prompt 19.31, mean output 58.45, at most 2048 together.

    Kwon et al., SOSP 2023, Fig. 11. Prompts are lognormal of mu 2.814 and sigma 0.54, outputs lognormal of
    the published mean and sigma 1.0. Pairs longer than 2048 tokens, or than the engine serves, are drawn
    again.

    Fields:
        max_prompt: Longest prompt; longer draws are cut.
        max_output: Longest output; longer draws are cut.
    """

    def __init__(
        self, *, max_prompt: PositiveInt | None = None, max_output: PositiveInt | None = None
    ) -> None:
        self.limits = (max_prompt, max_output)

    def sample(self, rng: np.random.Generator, size: int, max_total: int) -> Pairs:
        """Independent pairs that fit. Raises UserError where practically none does."""
        return _fitting(
            size,
            max_total,
            self.limits,
            lambda count: lognormal(rng, count, np.exp(2.814), 0.54),
            lambda count: lognormal(rng, count, 58.45 * np.exp(-0.5), 1.0),
        )


Draw = Callable[[int], NDArray[np.float64]]


def _fitting(
    size: int, max_total: int, limits: tuple[int | None, int | None], draw_prompts: Draw, draw_outputs: Draw
) -> Pairs:
    """Pairs drawn until each is short enough."""
    longest = min(max_total, PUBLISHED_MAX_TOTAL)
    prompts = whole(draw_prompts(size), limits[0])
    outputs = whole(draw_outputs(size), limits[1])
    for _ in range(MAX_REDRAWS):
        (over,) = np.nonzero(prompts + outputs > longest)
        if not over.size:
            return prompts, outputs
        prompts[over] = whole(draw_prompts(over.size), limits[0])
        outputs[over] = whole(draw_outputs(over.size), limits[1])
    raise UserError(
        f"got no prompt and output that fit into {longest} tokens together in {MAX_REDRAWS} draws; "
        "expected a larger max_model_len, or max_prompt and max_output that keep them short"
    )
