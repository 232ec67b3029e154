"""Plans: what a kernel is compiled for and launched with, from shapes on the host; nothing here looks at the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attention.kernels.configurations import Configuration, power_of_two

MOST_SPLITS = 128
SHORTEST_SPLIT = 256
"""Tokens; shorter shares would write more partial results than is worth it."""


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


def num_splits(num_programs: int, longest: int, slots: int) -> int:
    """Shares per history for a grid of `num_programs` without splits on a device that runs `slots` at a time.

    FlashAttention's rule: none if the grid alone fills 80 % of the device; otherwise the fewest whose last wave is
    within 85 % of the best fill. `longest` is rounded up to a power of two, so that it rarely changes.
    """
    if num_programs >= 0.8 * slots:
        return 1
    most = max(1, min(MOST_SPLITS, power_of_two(longest) // SHORTEST_SPLIT))
    fill = [
        num_programs * splits / slots / -(-num_programs * splits // slots) for splits in range(1, most + 1)
    ]
    return next(splits for splits, share in enumerate(fill, 1) if share >= 0.85 * max(fill))


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
