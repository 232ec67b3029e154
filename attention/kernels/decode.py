# ruff: noqa: N803, N806 - constants of a kernel are written in capitals
# mypy: ignore-errors
"""Decode: one query token per sequence against its whole history, split into shares that run side by side.

Split-KV as in Flash-Decoding (Dao et al., 2023); the query heads that share a KV head are the rows of one product
(packed GQA), so that K and V are read once. The grid is (splits, KV heads x head chunks, sequences): it follows from
launch constants only, so a captured CUDA graph stays right for any lengths; how long a share is, each program finds
from the sequence's own length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attention.kernels.blocks import block_ids, history_of, share_of, slot_offsets
from attention.kernels.softmax import absorb, narrowed, scores_of, settle, unit_of

INTEGERS = (
    "window", "num_splits", "num_heads", "max_blocks", "table_stride", "q_token_stride", "q_head_stride",
    "k_block_stride", "k_slot_stride", "k_head_stride", "v_block_stride", "v_slot_stride", "v_head_stride",
)  # fmt: skip
"""Arguments for whose values nothing is compiled anew."""


@triton.jit(do_not_specialize=INTEGERS)
def decode_kernel(
    out,  # [num_tokens, num_heads, head_dim], contiguous; written where DIRECT
    lse,  # [num_tokens, num_heads] float32, natural logarithm; written where DIRECT and LSE
    part_out,  # [num_seqs, num_heads, num_splits, head_dim] float32; written unless DIRECT
    part_lse,  # [num_seqs, num_heads, num_splits] float32, base 2
    q,  # [num_tokens, num_heads, head_dim]
    k_cache,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache,
    block_tables,  # [num_seqs, max_blocks]
    seq_lens,  # [num_seqs]
    query_start_loc,  # [num_seqs + 1]; read where RAGGED
    scale, soft_cap, window, num_splits, num_heads, max_blocks, table_stride, q_token_stride, q_head_stride,
    k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride, v_head_stride,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,  # and the next power of two
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,  # query heads: per KV head, per program, padded
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
    K_DIM_STRIDE: tl.constexpr, V_DIM_STRIDE: tl.constexpr,
    RAGGED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, DIRECT: tl.constexpr, LSE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One share of one sequence for the query heads of one KV head; constants are made by `plan.constants`."""
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    split = tl.program_id(0)
    kv_head = tl.program_id(1) // CHUNKS
    chunk = tl.program_id(1) % CHUNKS
    seq = tl.program_id(2)
    token = seq.to(tl.int64)
    if RAGGED:  # in a mixed batch sequences with more or fewer than one query token are not ours
        token = tl.load(query_start_loc + seq).to(tl.int64)
        if tl.load(query_start_loc + seq + 1) - token != 1:
            return
    start, first, stop = history_of(seq, seq_lens, max_blocks, window, BLOCK_SIZE, TILE, WINDOWED)
    share = share_of(stop - first, num_splits, TILE)
    first += split * share
    if not DIRECT:
        if first >= stop:  # an empty share; `combine` knows
            return
        stop = tl.minimum(stop, first + share)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    heads = kv_head * GROUP + chunk * HEADS + rows
    ours = (rows < HEADS) & (chunk * HEADS + rows < GROUP)
    q_offsets = (token * q_token_stride + heads[:, None] * q_head_stride) * STEP + dims[None, :]
    q_tile = tl.load(q + q_offsets, mask=ours[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)

    across = dims
    if WIDE:
        across = dims.to(tl.int64)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    table = block_tables + seq.to(tl.int64) * table_stride
    ids = block_ids(table, first, start, stop, BLOCK_SIZE, TILE)
    for tile in range(first, stop, TILE):
        tokens = tile + tl.arange(0, TILE)
        seen = (tokens >= start) & (tokens < stop)
        k_rows = slot_offsets(
            ids, tile, kv_head, k_block_stride, k_slot_stride, k_head_stride, BLOCK_SIZE, TILE, STEP, WIDE
        )
        v_rows = slot_offsets(
            ids, tile, kv_head, v_block_stride, v_slot_stride, v_head_stride, BLOCK_SIZE, TILE, STEP, WIDE
        )
        ids = block_ids(table, tile + TILE, start, stop, BLOCK_SIZE, TILE)
        k_mask = seen[None, :] & (dims < HEAD_DIM)[:, None]
        k = tl.load(k_cache + k_rows[None, :] + across[:, None] * K_DIM_STRIDE, mask=k_mask, other=0.0)
        scores = scores_of(q_tile, k, scale, soft_cap, CAPPED, UPCAST)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        v_mask = seen[:, None] & (dims < HEAD_DIM)[None, :]
        v = tl.load(v_cache + v_rows[:, None] + across[None, :] * V_DIM_STRIDE, mask=v_mask, other=0.0)
        acc, highest, mass = absorb(scores, unit_of(scale, CAPPED), v, acc, highest, mass, UPCAST)

    acc, log_mass = settle(acc, highest, mass)
    stored = ours[:, None] & (dims < HEAD_DIM)[None, :]
    if DIRECT:
        places = token * num_heads + heads
        short = narrowed(acc, out.dtype.element_ty, UPCAST)
        tl.store(out + places[:, None] * HEAD_DIM + dims[None, :], short, mask=stored)
        if LSE:
            tl.store(lse + places, log_mass * 0.6931471805599453, mask=ours)
    else:
        places = (seq.to(tl.int64) * num_heads + heads) * num_splits + split
        tl.store(part_out + places[:, None] * HEAD_DIM + dims[None, :], acc, mask=stored)
        tl.store(part_lse + places, log_mass, mask=ours)
