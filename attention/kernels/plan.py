"""Plans: what a kernel is compiled for and launched with, from shapes on the host; nothing here looks at the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

from attention.kernels.configurations import Configuration, power_of_two

MOST_SPLITS = 128
SPLIT_TILE = 64
"""Tokens in the unit of the model of `num_splits`; its other constants are in units of the time for so many."""
LONELY = 0.75
PARTIAL = 0.3
COMBINE = 2.5
COMBINE_SPLIT = 0.05

UNALIGNED = {
    "decode": Configuration(tile=16, rows=16, num_warps=8, num_stages=1),
    "prefill": Configuration(tile=16, rows=32, num_warps=8, num_stages=1),
}
"""What does not spill where loads are one element wide."""


def constants(
    kind: str, configuration: Configuration, *, head_dim: int, group: int, block_size: int
) -> dict[str, int]:
    """Sizes that `decode_kernel` or `prefill_kernel` is compiled for.

    Decoding packs the query heads of a KV head, at most `rows` of them, into at least 16 rows; prefill fills
    `rows` with query tokens times heads. Groups beyond that are cut into chunks.
    """
    heads = min(group, configuration.rows)
    sizes = {
        "HEAD_DIM": head_dim,
        "DIMS": max(16, power_of_two(head_dim)),
        "GROUP": group,
        "HEADS": heads,
        "BLOCK_SIZE": block_size,
        "TILE": configuration.tile,
    }
    if kind == "decode":
        return sizes | {"ROWS": max(16, power_of_two(heads))}
    return sizes | {"ROWS": configuration.rows, "QUERIES": configuration.rows // heads}


def step_of(strides: Sequence[int], item_size: int) -> int:
    """Elements that all strides are counted in: 16 bytes where they allow it, so that loads are that wide."""
    step = 16 // item_size
    return step if all(stride % step == 0 for stride in strides) else 1


def num_splits(num_programs: int, longest: int, num_sms: int, programs_per_sm: int) -> int:
    """Shares per history for decoding with `num_programs` programs before splitting, on so many multiprocessors.

    `longest` is a bound of the lengths; it is rounded up to a power of two, so that the grid rarely changes.
    """
    return _num_splits(num_programs, power_of_two(max(longest, 1)), num_sms, programs_per_sm)


@functools.lru_cache(maxsize=4096)
def _num_splits(num_programs: int, longest: int, num_sms: int, programs_per_sm: int) -> int:
    """The number with the least time in a model of it, in units of a tile at full bandwidth; the fewest of equals.

    The busiest multiprocessor does `waves` programs. A share costs its tiles and the writing of its partial result;
    where fewer than programs_per_sm run at a time, their waiting shows. Splitting costs the launch of `combine`,
    which reads all shares. The form is that of FlashInfer's planner; the constants are estimates for an H100.
    """
    tiles = longest / SPLIT_TILE
    best, least = 1, math.inf
    for splits in range(1, min(MOST_SPLITS, math.ceil(tiles)) + 1):
        waves = math.ceil(num_programs * splits / num_sms)
        waiting = 1 + LONELY * max(0, programs_per_sm - waves) / programs_per_sm
        cost = waves * waiting * (tiles / splits + (PARTIAL if splits > 1 else 0))
        cost += COMBINE + COMBINE_SPLIT * splits if splits > 1 else 0
        if cost < least:
            best, least = splits, cost
    return best


def fitted(
    configuration: Configuration, *, head_dim: int, item_size: int, shared_memory: int
) -> Configuration:
    """The configuration with as many stages as there is room for in `shared_memory` bytes, on smaller GPUs."""
    dims = max(16, power_of_two(head_dim))
    stages = configuration.num_stages
    buffer = 2 * configuration.tile * dims * item_size
    others = (configuration.rows * dims + configuration.rows * configuration.tile) * item_size
    while stages > 1 and (stages - 1) * buffer + others > shared_memory:
        stages -= 1
    return replace(configuration, num_stages=stages)
