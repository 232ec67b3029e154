"""Paged attention by gathering: the history is copied into one piece, then attended over. Runs anywhere.

On a CPU one sequence follows the other, since a padded batch costs more than a loop, and the buffers for K and V
are made once a call. Query heads that share a KV head stand in the place of query positions, so that every key
is read once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.call import AttentionCall
from attention.plain import exact, plain_attention, visible

_Attend = Callable[[AttentionCall, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

MAX_SCORES = 1 << 22
"""Scores of one head that are made at once: longer prompts are attended to in pieces of their queries."""


def reference(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """The formula itself, sequence by sequence; half precision is computed in float32."""
    return _loop(call, _plainly)


def gathered(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """torch's scaled_dot_product_attention, or the formula where it lacks what is asked for."""
    if call.soft_cap is not None or call.return_lse:
        return _loop(call, _plainly)
    if call.query_start_loc is None and call.q.device.type != "cpu" and len(call.q):
        return _padded(call), None
    return _loop(call, _fast)


def _loop(call: AttentionCall, attend: _Attend) -> tuple[Tensor, Tensor | None]:
    """One sequence after the other."""
    block_size = call.k_cache.shape[1]
    out = torch.zeros_like(call.q)
    lse = (
        call.q.new_full(call.q.shape[:2], -torch.inf, dtype=exact(call.q.dtype)) if call.return_lse else None
    )
    shape = (-(-call.max_seq_len // block_size), *call.k_cache.shape[1:])
    buffers = call.k_cache.new_empty(shape), call.v_cache.new_empty(shape)
    for index, begin, end, length in call.rows():
        oldest = 0
        if call.sliding_window is not None:  # of what nobody sees, whole blocks are not even gathered
            oldest = max(0, length - (end - begin) + 1 - call.sliding_window) // block_size
        blocks = call.block_tables[index, oldest : -(-length // block_size)]
        k, v = (
            torch.index_select(cache, 0, blocks, out=buffer[: len(blocks)])
            .flatten(0, 1)[: length - oldest * block_size]
            for cache, buffer in zip((call.k_cache, call.v_cache), buffers, strict=True)
        )  # fmt: skip
        for first in range(begin, end, max(1, MAX_SCORES // length)):
            last = min(end, first + max(1, MAX_SCORES // length))
            seen = len(k) - (end - last)
            out[first:last], sums = attend(call, call.q[first:last], k[:seen], v[:seen])
            if lse is not None and sums is not None:
                lse[first:last] = sums
    return out, lse


def _plainly(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = exact(q.dtype)
    return plain_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), call.scale, call.sliding_window, call.soft_cap
    )


def _fast(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """One sequence; shapes as in `plain_attention`."""
    query_len, num_heads, head_dim = q.shape
    seq_len, num_kv_heads, _ = k.shape
    if query_len == 1:
        if call.sliding_window is not None:
            k, v = k[-call.sliding_window :], v[-call.sliding_window :]
        mask, causal = None, False
    else:
        causal = query_len == seq_len and call.sliding_window is None
        mask = None if causal else visible(query_len, seq_len, call.sliding_window, q.device)
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # [1, num_kv_heads, seq_len, head_dim]
    if query_len > 1:
        queries = q.transpose(0, 1)[None]  # [1, num_heads, query_len, head_dim]
        grouped = num_heads != num_kv_heads
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=call.scale, enable_gqa=grouped
        )
        return out[0].transpose(0, 1), None
    queries = q.reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return scaled_dot_product_attention(queries, keys, values, scale=call.scale).reshape_as(q), None


def _padded(call: AttentionCall) -> Tensor:
    """All histories gathered at once, padded to the longest: one query a sequence, nothing waits for the device.

    Padding reads a slot of the sequence itself: what lies behind a history, even if it is not a number, cannot
    leak in.
    """
    num_tokens, num_heads, head_dim = call.q.shape
    block_size, num_kv_heads = call.k_cache.shape[1:3]
    positions = torch.arange(max(1, call.max_seq_len), device=call.q.device)
    lengths = call.seq_lens[:, None]
    inside = positions < lengths  # [num_tokens, max_seq_len]
    if call.sliding_window is not None:
        inside &= positions >= lengths - call.sliding_window
    index = torch.where(inside, positions, (lengths - 1).clamp(min=0))
    blocks = call.block_tables.gather(1, index // block_size).long()
    blocks = torch.where(lengths > 0, blocks, 0)
    k = call.k_cache[blocks, index % block_size].transpose(1, 2)  # [num_tokens, num_kv_heads, seq, head_dim]
    v = call.v_cache[blocks, index % block_size].transpose(1, 2)
    grouped = call.q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    empty = lengths == 0
    mask = (inside | empty)[:, None, None, :]  # a row that sees nothing would give no number at all
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=call.scale)
    return out.reshape_as(call.q).masked_fill(empty[:, :, None], 0)
