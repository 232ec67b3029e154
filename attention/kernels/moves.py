# ruff: noqa: N803 - constants of a kernel are written in capitals
# mypy: ignore-errors
"""Moves: tokens' K and V into their slots, and blocks over blocks. They copy bits: tensors come as integers.

`write_kernel` is what vLLM calls reshape_and_cache; `copy_kernel` is the copying of copy-on-write.
"""

from __future__ import annotations

import triton
import triton.language as tl

WRITE_INTEGERS = (
    "num_slots", "k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride", "k_block_stride",
    "k_slot_stride", "k_row_stride", "v_block_stride", "v_slot_stride", "v_row_stride",
)  # fmt: skip
COPY_INTEGERS = (
    "num_blocks", "num_rows", "inner_rows", "tensor_stride", "block_stride", "outer_stride", "inner_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=WRITE_INTEGERS)
def write_kernel(
    k,  # [num_tokens, num_kv_heads, head_dim]
    v,
    k_cache,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache,
    slot_mapping,  # [num_tokens]
    num_slots, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    k_block_stride, k_slot_stride, k_row_stride, v_block_stride, v_slot_stride, v_row_stride,
    KV_HEADS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STEP: tl.constexpr,
    FROM_DIM_STRIDE: tl.constexpr, K_DIM_STRIDE: tl.constexpr, V_DIM_STRIDE: tl.constexpr,
):  # fmt: skip
    """ROWS heads of one token; the grid is (num_tokens, head chunks). Slots outside 0..num_slots drop the token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if (slot < 0) | (slot >= num_slots):
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    heads = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    dims = tl.arange(0, DIMS).to(tl.int64)
    inside = (heads < KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    across = dims[None, :]
    from_k = k + ((token * k_token_stride + heads * k_head_stride) * STEP)[:, None] + across * FROM_DIM_STRIDE
    from_v = v + ((token * v_token_stride + heads * v_head_stride) * STEP)[:, None] + across * FROM_DIM_STRIDE
    k_rows = (block * k_block_stride + offset * k_slot_stride + heads * k_row_stride) * STEP
    v_rows = (block * v_block_stride + offset * v_slot_stride + heads * v_row_stride) * STEP
    k_tile = tl.load(from_k, mask=inside)
    v_tile = tl.load(from_v, mask=inside)
    tl.store(k_cache + k_rows[:, None] + across * K_DIM_STRIDE, k_tile, mask=inside)
    tl.store(v_cache + v_rows[:, None] + across * V_DIM_STRIDE, v_tile, mask=inside)


@triton.jit(do_not_specialize=COPY_INTEGERS)
def copy_kernel(
    cache,  # [num_blocks, outer, inner, row], the first of tensors that lie tensor_stride apart
    block_mapping,  # [num_pairs, 2], source and target, contiguous
    num_blocks, num_rows, inner_rows, tensor_stride, block_stride, outer_stride, inner_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, DIM_STRIDE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of WIDTH elements of one block of one tensor; the grid is (num_pairs, row chunks, tensors)."""
    pair = tl.program_id(0)
    source = tl.load(block_mapping + 2 * pair).to(tl.int64)
    target = tl.load(block_mapping + 2 * pair + 1).to(tl.int64)
    if (source < 0) | (source >= num_blocks) | (target < 0) | (target >= num_blocks):
        return
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    places = rows // inner_rows * outer_stride + rows % inner_rows * inner_stride
    places += tl.program_id(2).to(tl.int64) * tensor_stride
    for column in range(0, WIDTH, COLUMNS):
        columns = (column + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        across = columns[None, :] * DIM_STRIDE
        tile = tl.load(cache + ((places + source * block_stride) * STEP)[:, None] + across, mask=inside)
        tl.store(cache + ((places + target * block_stride) * STEP)[:, None] + across, tile, mask=inside)
