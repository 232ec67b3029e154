# ruff: noqa: N803, N806 - constants of a kernel are written in capitals
# mypy: ignore-errors
"""Prefill: many query tokens per sequence, whole prompts or chunks of them, causal against the history before them.

Ragged batches come as one flat list of rows (`query_start_loc`, as in vLLM). A program takes up to QUERIES tokens of
one sequence for the query heads of one KV head: rows of its products are (token, head) pairs. The grid is an upper
bound that needs no look at the device (num_tokens // QUERIES + num_seqs, as in vLLM's unified kernel); programs
beyond end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attention.kernels.blocks import block_ids, slot_offsets
from attention.kernels.softmax import absorb, narrowed, scores_of, settle, unit_of

INTEGERS = (
    "window", "num_seqs", "num_heads", "max_blocks", "table_stride", "q_token_stride", "q_head_stride",
    "k_block_stride", "k_slot_stride", "k_head_stride", "v_block_stride", "v_slot_stride", "v_head_stride",
)  # fmt: skip
"""Arguments for whose values nothing is compiled anew."""


@triton.jit
def sequence_of(piece, query_start_loc, num_seqs, QUERIES: tl.constexpr, SEQS: tl.constexpr):
    """The sequence that a piece of up to QUERIES tokens belongs to; sequence s begins at start[s] // QUERIES + s."""
    seq = -1
    for group in range(0, num_seqs, SEQS):
        seqs = group + tl.arange(0, SEQS)
        starts = tl.load(query_start_loc + seqs, mask=seqs < num_seqs, other=0).to(tl.int32)
        seq += tl.sum(((starts // QUERIES + seqs <= piece) & (seqs < num_seqs)).to(tl.int32), 0)
    return tl.maximum(seq, 0)


@triton.jit
def attend_tile(
    acc, highest, mass, ids, q_tile, k_cache, v_cache, tile, start, stop, positions, kv_head, window, scale, soft_cap,
    k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride, v_head_stride,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    WIDE: tl.constexpr, K_DIM_STRIDE: tl.constexpr, V_DIM_STRIDE: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(acc, highest, mass) with one more tile of keys; without MASKED every row sees all of it."""
    dims = tl.arange(0, DIMS)
    across = dims
    if WIDE:
        across = dims.to(tl.int64)
    tokens = tile + tl.arange(0, TILE)
    k_rows = slot_offsets(
        ids, tile, kv_head, k_block_stride, k_slot_stride, k_head_stride, BLOCK_SIZE, TILE, STEP, WIDE
    )
    v_rows = slot_offsets(
        ids, tile, kv_head, v_block_stride, v_slot_stride, v_head_stride, BLOCK_SIZE, TILE, STEP, WIDE
    )
    k_places = k_cache + k_rows[None, :] + across[:, None] * K_DIM_STRIDE
    v_places = v_cache + v_rows[:, None] + across[None, :] * V_DIM_STRIDE
    if MASKED:
        inside = (tokens >= start) & (tokens < stop)
        k = tl.load(k_places, mask=inside[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    elif HEAD_DIM != DIMS:
        k = tl.load(k_places, mask=(dims < HEAD_DIM)[:, None], other=0.0)
    else:
        k = tl.load(k_places)
    scores = scores_of(q_tile, k, scale, soft_cap, CAPPED, UPCAST)
    if MASKED:
        seen = tokens[None, :] <= positions[:, None]
        if WINDOWED:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(v_places, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM != DIMS:
        v = tl.load(v_places, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        v = tl.load(v_places)
    return absorb(scores, unit_of(scale, CAPPED), v, acc, highest, mass, UPCAST)


@triton.jit(do_not_specialize=INTEGERS)
def prefill_kernel(
    out,  # [num_tokens, num_heads, head_dim], contiguous
    lse,  # [num_tokens, num_heads] float32, natural logarithm; written where LSE
    q,  # [num_tokens, num_heads, head_dim]
    k_cache,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache,
    block_tables,  # [num_seqs, max_blocks]
    seq_lens,  # [num_seqs]
    query_start_loc,  # [num_seqs + 1]
    scale, soft_cap, window, num_seqs, num_heads, max_blocks, table_stride, q_token_stride, q_head_stride,
    k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride, v_head_stride,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,  # and the next power of two
    GROUP: tl.constexpr, HEADS: tl.constexpr,  # query heads: per KV head, per program
    ROWS: tl.constexpr, QUERIES: tl.constexpr,  # QUERIES x HEADS rows, padded to a power of two
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
    K_DIM_STRIDE: tl.constexpr, V_DIM_STRIDE: tl.constexpr,
    MIXED: tl.constexpr,  # sequences with one query token are left to `decode_kernel`
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, LSE: tl.constexpr, UPCAST: tl.constexpr, SEQS: tl.constexpr,
):  # fmt: skip
    """Up to QUERIES tokens of one sequence for the query heads of one KV head; constants from `plan.constants`."""
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    piece = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens see most: they begin first
    kv_head = tl.program_id(1) // CHUNKS
    chunk = tl.program_id(1) % CHUNKS
    seq = sequence_of(piece, query_start_loc, num_seqs, QUERIES, SEQS)
    begin = tl.load(query_start_loc + seq).to(tl.int32)
    query_len = tl.load(query_start_loc + seq + 1).to(tl.int32) - begin
    first_query = (piece - begin // QUERIES - seq) * QUERIES
    if (first_query < 0) | (first_query >= query_len):
        return
    if MIXED and query_len == 1:
        return
    num_tokens = tl.load(seq_lens + seq).to(tl.int32)
    num_tokens = tl.minimum(num_tokens, max_blocks * BLOCK_SIZE)
    context = num_tokens - query_len

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    queries = first_query + rows // HEADS
    positions = context + queries
    heads = chunk * HEADS + rows % HEADS
    ours = (rows < QUERIES * HEADS) & (queries < query_len) & (heads < GROUP)
    heads += kv_head * GROUP
    tokens_of_q = begin.to(tl.int64) + queries
    q_offsets = (tokens_of_q * q_token_stride + heads * q_head_stride) * STEP
    in_q = ours[:, None] & (dims < HEAD_DIM)[None, :]
    q_tile = tl.load(q + q_offsets[:, None] + dims[None, :], mask=in_q, other=0.0)

    stop = tl.maximum(context + tl.minimum(first_query + QUERIES, query_len), 0)
    full = tl.maximum(context + first_query + 1, 0) // TILE * TILE  # tiles up to here are seen by all rows
    start = num_tokens * 0
    if WINDOWED:  # one loop with masks: a window is short
        start = tl.maximum(context + first_query - window + 1, 0)
        full = start // TILE * TILE
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    table = block_tables + seq.to(tl.int64) * table_stride
    if WINDOWED:
        ids = block_ids(table, full, start, stop, BLOCK_SIZE, TILE)
    else:
        ids = block_ids(table, 0, start, stop, BLOCK_SIZE, TILE)
        for tile in range(0, full, TILE):
            here = ids
            ids = block_ids(table, tile + TILE, start, stop, BLOCK_SIZE, TILE)
            acc, highest, mass = attend_tile(
                acc, highest, mass, here, q_tile, k_cache, v_cache, tile, start, stop, positions, kv_head, window,
                scale, soft_cap, k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride,
                v_head_stride, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, STEP, WIDE, K_DIM_STRIDE, V_DIM_STRIDE, WINDOWED,
                CAPPED, UPCAST, False,
            )  # fmt: skip
    for tile in range(full, stop, TILE):
        here = ids
        ids = block_ids(table, tile + TILE, start, stop, BLOCK_SIZE, TILE)
        acc, highest, mass = attend_tile(
            acc, highest, mass, here, q_tile, k_cache, v_cache, tile, start, stop, positions, kv_head, window,
            scale, soft_cap, k_block_stride, k_slot_stride, k_head_stride, v_block_stride, v_slot_stride,
            v_head_stride, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, STEP, WIDE, K_DIM_STRIDE, V_DIM_STRIDE, WINDOWED,
            CAPPED, UPCAST, True,
        )  # fmt: skip

    acc, log_mass = settle(acc, highest, mass)
    places = tokens_of_q * num_heads + heads
    tl.store(
        out + places[:, None] * HEAD_DIM + dims[None, :],
        narrowed(acc, out.dtype.element_ty, UPCAST),
        mask=in_q,
    )
    if LSE:
        tl.store(lse + places, log_mass * 0.6931471805599453, mask=ours)
