"""Plain attention: the formula over one history that lies in one piece. What everything else must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a sequence's last tokens over all of its tokens, in the dtype that it is given.

    Args:
        q: `[query_len, num_heads, head_dim]`, the last `query_len` tokens of the sequence.
        k: `[seq_len, num_kv_heads, head_dim]`; query head h reads KV head h // (num_heads // num_kv_heads).
        v: As `k`.
        scale: What the scores are multiplied with.
        sliding_window: A token sees itself and the `sliding_window - 1` before it (Mistral; Beltagy et al., 2020).
        soft_cap: Scores become soft_cap * tanh(score / soft_cap) (Gemma 2).

    Returns:
        The output `[query_len, num_heads, head_dim]`, and the logarithm of the sum of the exponentials of the
        scores `[query_len, num_heads]`.
    """
    query_len, num_heads, head_dim = q.shape
    seq_len, num_kv_heads, _ = k.shape
    grouped = q.reshape(query_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("qhgd,nhd->hgqn", grouped, k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if query_len > 1 or sliding_window is not None:
        scores = scores.masked_fill(~visible(query_len, seq_len, sliding_window, q.device), -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.einsum("hgqn,nhd->qhgd", weights / total, v)
    lse = (highest + total.log())[..., 0]
    return out.reshape_as(q), lse.permute(2, 0, 1).reshape(query_len, num_heads)


def visible(
    query_len: int, seq_len: int, sliding_window: int | None, device: torch.device | None = None
) -> Tensor:
    """Which keys each of the last `query_len` tokens sees, bool `[query_len, seq_len]`."""
    keys = torch.arange(seq_len, device=device)
    positions = torch.arange(seq_len - query_len, seq_len, device=device)[:, None]
    mask = keys <= positions
    return mask if sliding_window is None else mask & (keys > positions - sliding_window)


def exact(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are computed in: half precision in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
