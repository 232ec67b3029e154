# ruff: noqa: N803 - constants of a kernel are written in capitals
# mypy: ignore-errors
"""Combine: the shares of a split decode, weighed by their log-sum-exp, into one output."""

from __future__ import annotations

import triton
import triton.language as tl

from attention.kernels.blocks import history_of, share_of
from attention.kernels.softmax import narrowed

INTEGERS = ("window", "num_splits", "max_blocks")


@triton.jit(do_not_specialize=INTEGERS)
def combine_kernel(
    out,  # [num_tokens, num_heads, head_dim], contiguous
    lse,  # [num_tokens, num_heads] float32, natural logarithm; written where LSE
    part_out,  # [num_seqs, num_heads, num_splits, head_dim] float32
    part_lse,  # [num_seqs, num_heads, num_splits] float32, base 2
    seq_lens,  # [num_seqs]
    query_start_loc,  # [num_seqs + 1]; read where RAGGED
    window, num_splits, max_blocks,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    RAGGED: tl.constexpr, WINDOWED: tl.constexpr, LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One head of one sequence; the grid is (num_heads, num_seqs). Shares are read SPLITS at a time.

    Shares that `decode_kernel` left out because they are empty are not read; TILE and WINDOWED must be its own.
    """
    head = tl.program_id(0)
    seq = tl.program_id(1)
    num_heads = tl.num_programs(0)
    token = seq.to(tl.int64)
    if RAGGED:
        token = tl.load(query_start_loc + seq).to(tl.int64)
        if tl.load(query_start_loc + seq + 1) - token != 1:
            return
    _, first, stop = history_of(seq, seq_lens, max_blocks, window, BLOCK_SIZE, TILE, WINDOWED)
    share = share_of(stop - first, num_splits, TILE)
    filled = tl.cdiv(stop - first, tl.maximum(share, 1))

    dims = tl.arange(0, DIMS)
    place = seq.to(tl.int64) * num_heads + head
    acc = tl.zeros([DIMS], tl.float32)
    highest = float("-inf")
    mass = 0.0
    for group in range(0, filled, SPLITS):
        splits = group + tl.arange(0, SPLITS)
        there = splits < filled
        logs = tl.load(part_lse + place * num_splits + splits, mask=there, other=float("-inf"))
        parts = tl.load(
            part_out + (place * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :],
            mask=there[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        raised = tl.maximum(highest, tl.max(logs, 0))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(logs - base)
        shrink = tl.exp2(highest - base)
        acc = acc * shrink + tl.sum(parts * weights[:, None], 0)
        mass = mass * shrink + tl.sum(weights, 0)
        highest = raised
    some = tl.where(mass > 0, mass, 1.0)
    place = token * num_heads + head
    tl.store(
        out + place * HEAD_DIM + dims,
        narrowed(acc / some, out.dtype.element_ty, UPCAST),
        mask=dims < HEAD_DIM,
    )
    if LSE:
        log_mass = tl.where(mass > 0, highest + tl.log2(some), float("-inf"))
        tl.store(lse + place, log_mass * 0.6931471805599453)
