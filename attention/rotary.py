"""Rotary position embedding (Su et al., 2021), in the halves layout of Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, `[num_tokens, 1, head_dim / 2]` each, of the angles position * theta ** (-2 i / head_dim).

    positions `[num_tokens]`; head_dim is even.
    """
    half = head_dim // 2
    steps = torch.arange(half, dtype=dtype, device=positions.device) / half
    angles = positions.to(dtype)[:, None, None] * theta**-steps
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of every head; x `[num_tokens, num_heads, head_dim]`, returns like x."""
    cos, sin = rotation
    low, high = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)
