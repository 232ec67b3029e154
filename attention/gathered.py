"""Paged attention by gathering: the history is copied into one piece, then attended over. Runs anywhere.

On a CPU one sequence follows the other, since a padded batch costs more than a loop. Query heads that share a KV
head stand in the place of query positions, so that every key is read once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.call import AttentionCall
from attention.plain import exact, plain_attention, visible

_Attend = Callable[[AttentionCall, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

MAX_SCORES = 1 << 22
"""Scores of one head that are made at once: longer prompts are attended to in pieces of their queries."""
PIECE_BYTES = 1 << 21
"""K of one decode on a CPU that is gathered at once: with its V it stays in the cache until it is used."""


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
    block_size, num_kv_heads, head_dim = call.k_cache.shape[1:]
    in_pieces = attend is _fast and call.q.device.type == "cpu" and tells_lse()
    piece = max(1, PIECE_BYTES // (block_size * num_kv_heads * head_dim * call.k_cache.element_size()))
    out = torch.zeros_like(call.q)
    lse = None
    if call.return_lse:
        lse = call.q.new_full(call.q.shape[:2], -torch.inf, dtype=exact(call.q.dtype))
    gather = _Gathering(call)
    for index, begin, end, length in call.rows():
        oldest = 0  # of what nobody sees, whole blocks are not even gathered
        if call.sliding_window is not None:
            oldest = max(0, length - (end - begin) + 1 - call.sliding_window) // block_size
        blocks = call.block_tables[index, oldest : -(-length // block_size)]
        tokens = length - oldest * block_size
        if in_pieces and end - begin == 1:
            unseen = max(0, tokens - (call.sliding_window or tokens))
            pieces = [blocks[first : first + piece] for first in range(0, len(blocks), piece)]
            out[begin] = _decode(call, call.q[begin], gather, pieces, unseen, tokens)
            continue
        k, v = gather(blocks, tokens)
        for first in range(begin, end, max(1, MAX_SCORES // length)):
            last = min(end, first + max(1, MAX_SCORES // length))
            seen = tokens - (end - last)
            out[first:last], sums = attend(call, call.q[first:last], k[:seen], v[:seen])
            if lse is not None and sums is not None:
                lse[first:last] = sums
    return out, lse


@functools.cache
def tells_lse() -> bool:
    """Whether this torch has the private operator that tells the log-sum-exp on a CPU, as it is called here."""
    q, kv = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
    try:
        out, lse = _flash(q, kv, kv, 1.0)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return out.shape == q.shape and lse.numel() == 1 and abs(float(lse) - math.log(2)) < 1e-6


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention on a CPU, all `[1, heads, tokens, head_dim]`, and its log-sum-exp."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out, lse


class _Gathering:
    """Copies blocks out of the caches, into the same buffers again and again."""

    def __init__(self, call: AttentionCall) -> None:
        self.caches = call.k_cache, call.v_cache
        self.buffers = tuple(cache.new_empty(0, *cache.shape[1:]) for cache in self.caches)

    def __call__(self, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of these blocks' first tokens, `[tokens, num_kv_heads, head_dim]` each, until the next call."""
        if len(blocks) > len(self.buffers[0]):
            self.buffers = tuple(cache.new_empty(len(blocks), *cache.shape[1:]) for cache in self.caches)
        k, v = (
            torch.index_select(cache, 0, blocks, out=buffer[: len(blocks)]).flatten(0, 1)[:tokens]
            for cache, buffer in zip(self.caches, self.buffers, strict=True)
        )
        return k, v


def _decode(
    call: AttentionCall, q: Tensor, gather: _Gathering, pieces: list[Tensor], unseen: int, tokens: int
) -> Tensor:
    """One query q `[num_heads, head_dim]` over a history in pieces, merged as in Flash-Decoding (Dao et al., 2023).

    The first `unseen` tokens are outside the window. torch tells the log-sum-exp in a private operator
    only; where that is not as expected (`tells_lse`) histories are gathered whole.
    """
    block_size, num_kv_heads, head_dim = call.k_cache.shape[1:]
    queries = q.reshape(1, num_kv_heads, -1, head_dim)
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for number, blocks in enumerate(pieces):
        before = number * len(pieces[0]) * block_size
        k, v = gather(blocks, tokens - before)
        skipped = max(0, unseen - before)
        if skipped >= len(k):
            continue
        keys, values = (tensor[skipped:].transpose(0, 1)[None] for tensor in (k, v))
        out, lse = _flash(queries, keys, values, call.scale)
        outs.append(out.reshape_as(q))
        sums.append(lse.reshape(-1, 1))
    if len(outs) == 1:
        return outs[0]
    weights = torch.softmax(torch.stack(sums), dim=0)  # [pieces, num_heads, 1]
    merged: Tensor = (torch.stack(outs) * weights).sum(dim=0)
    return merged


def _plainly(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = exact(q.dtype)
    return plain_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), call.scale, call.sliding_window, call.soft_cap
    )


def _fast(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """One sequence; shapes as in `plain_attention`."""
    query_len, seq_len = len(q), len(k)
    causal = query_len == seq_len and call.sliding_window is None
    mask = None if causal else visible(query_len, seq_len, call.sliding_window, q.device)
    queries, keys, values = (
        tensor.transpose(0, 1)[None] for tensor in (q, k, v)
    )  # [1, heads, tokens, head_dim]
    out = scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=causal, scale=call.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1), None


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
