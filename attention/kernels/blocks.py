# ruff: noqa: N803 - constants of a kernel are written in capitals
# mypy: ignore-errors
"""Parts of kernels that find K and V: tiles of tokens through a block table, and shares of a history.

A tile is `TILE` tokens that start at a multiple of TILE. Where the block size is a multiple of TILE, a tile lies in
one block and needs one id, a scalar; otherwise it has one id per token. Ids are asked for one tile ahead (callers
carry them through their loop): Triton's pipeliner charges a load whose result is an address as a stage of its own,
and would leave one buffer for K and V instead of `num_stages - 1`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_ids(table, first, start, stop, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Ids of the blocks that hold tokens first..first + TILE, 0 for tokens outside start..stop.

    `table` is the row of the sequence; entries outside start..stop are not read. A scalar or `[TILE]`, int64.
    """
    if BLOCK_SIZE % TILE == 0:
        ids = tl.load(table + first // BLOCK_SIZE, mask=first < stop, other=0)
    else:
        tokens = first + tl.arange(0, TILE)
        inside = (tokens >= start) & (tokens < stop)
        ids = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0)
    return ids.to(tl.int64)


@triton.jit
def slot_offsets(
    ids, first, head, block_stride, slot_stride, head_stride,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets `[TILE]`, int64, in elements, of one head's row of the tokens first..first + TILE.

    Strides count STEP elements: a multiplication by a constant tells the compiler what the addresses are divisible
    by, whatever the strides are at run time. Inside a block 32 bits are enough unless WIDE.
    """
    slots = (first + tl.arange(0, TILE)) % BLOCK_SIZE
    if WIDE:
        inner = slots.to(tl.int64) * slot_stride + head.to(tl.int64) * head_stride
    else:
        inner = slots * slot_stride + head * head_stride
    return (ids * block_stride + inner) * STEP


@triton.jit
def share_of(num_tokens, num_splits, TILE: tl.constexpr):
    """Tokens per split, a multiple of TILE: the shares of a history differ by their last one only."""
    return tl.cdiv(tl.cdiv(num_tokens, num_splits), TILE) * TILE


@triton.jit
def history_of(
    seq, seq_lens, max_blocks, window,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """(first token that the last one sees, the same rounded down to a tile, number of tokens) of a sequence.

    A length beyond the table ends with the table, so that nothing behind it is read.
    """
    num_tokens = tl.load(seq_lens + seq).to(tl.int32)
    num_tokens = tl.maximum(tl.minimum(num_tokens, max_blocks * BLOCK_SIZE), 0)
    start = num_tokens * 0
    if WINDOWED:
        start = tl.maximum(num_tokens - window, 0)
    return start, start // TILE * TILE, num_tokens
