"""A small decoder-only transformer in the manner of Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Its weights are random. It is there to run whole generations over a paged cache and over a plain one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from attention.cache import BlockAllocator, PagedKVCache
from attention.generation.kv import KV, ContiguousKV, KVMetadata, PagedKV
from attention.plain import exact
from attention.rotary import rotate, rotations


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Shape and seed of a transformer. Raises ValueError for heads that do not divide."""

    vocab_size: int = 256
    hidden_dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_dim: int = 128
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_head: bool = False  # the head that makes logits is the embedding
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: got {self.num_heads}, expected a multiple of {self.num_kv_heads} KV heads"
            )
        if self.hidden_dim % (2 * self.num_heads):
            wanted = f"a multiple of {2 * self.num_heads}, an even number of features a head"
            raise ValueError(f"hidden_dim: got {self.hidden_dim}, expected {wanted}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype: got {self.dtype}, expected a floating-point one")

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_dim // self.num_heads


class Transformer(nn.Module):
    """The model. Equal seeds give equal weights in every dtype, but for their rounding."""

    def __init__(self, config: TransformerConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        draw = _Weights(config, torch.device(device))
        self.embedding = draw(config.vocab_size, config.hidden_dim)
        self.layers = nn.ModuleList(DecoderLayer(config, index, draw) for index in range(config.num_layers))
        self.norm = draw.ones(config.hidden_dim)
        self.head = self.embedding if config.tied_head else draw(config.vocab_size, config.hidden_dim)

    def paged_kv(self, num_blocks: int, block_size: int, impl: str = "auto") -> PagedKV:
        """An empty paged cache for this model's K and V."""
        config = self.config
        cache = PagedKVCache(
            block_size,
            config.hidden_dim,
            BlockAllocator(num_blocks, block_size, config.hidden_dim),
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=config.dtype,
            device=self.embedding.device,
        )
        return PagedKV(cache, impl)

    def contiguous_kv(self) -> ContiguousKV:
        """An empty contiguous cache for this model's K and V."""
        return ContiguousKV(self.config.num_layers, self.embedding.device)

    @torch.no_grad()
    def forward(self, tokens: Tensor, positions: Tensor, kv: KV, metadata: KVMetadata) -> Tensor:
        """Logits `[num_tokens, vocab_size]` of the tokens that follow.

        Args:
            tokens: `[num_tokens]`, the new tokens of all sequences of the step, one sequence after the other.
            positions: `[num_tokens]`, where each stands in its sequence.
            kv: Keeps K and V, and attends over them.
            metadata: What `kv.extend` returned for this step; all layers use the same.
        """
        config = self.config
        x = self.embedding[tokens]
        rotation = rotations(positions, config.head_dim, config.rope_theta, exact(config.dtype))
        for layer in self.layers:
            x = layer(x, rotation, kv, metadata)
        return linear(rms_norm(x, self.norm, config.norm_epsilon), self.head)


class DecoderLayer(nn.Module):
    """Attention, then a gated feed-forward network, each after a norm and added to what came in."""

    def __init__(self, config: TransformerConfig, index: int, draw: _Weights) -> None:
        super().__init__()
        self.config = config
        self.index = index
        hidden, kv_dim = config.hidden_dim, config.num_kv_heads * config.head_dim
        self.attention_norm = draw.ones(hidden)
        self.q_weight = draw(hidden, hidden)
        self.k_weight = draw(kv_dim, hidden)
        self.v_weight = draw(kv_dim, hidden)
        self.out_weight = draw(hidden, hidden)
        self.ffn_norm = draw.ones(hidden)
        self.gate_weight = draw(config.ffn_dim, hidden)
        self.up_weight = draw(config.ffn_dim, hidden)
        self.down_weight = draw(hidden, config.ffn_dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], kv: KV, metadata: KVMetadata) -> Tensor:
        """x `[num_tokens, hidden_dim]` in and out."""
        epsilon = self.config.norm_epsilon
        x = x + self._attend(rms_norm(x, self.attention_norm, epsilon), rotation, kv, metadata)
        y = rms_norm(x, self.ffn_norm, epsilon)
        gated = silu(linear(y, self.gate_weight)) * linear(y, self.up_weight)  # SwiGLU (Shazeer, 2020)
        return x + linear(gated, self.down_weight)

    def _attend(self, x: Tensor, rotation: tuple[Tensor, Tensor], kv: KV, metadata: KVMetadata) -> Tensor:
        heads = (len(x), -1, self.config.head_dim)
        q = rotate(linear(x, self.q_weight).view(heads), rotation)
        k = rotate(linear(x, self.k_weight).view(heads), rotation)
        v = linear(x, self.v_weight).view(heads)
        return linear(kv.attend(self.index, q, k, v, metadata).flatten(1), self.out_weight)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x `[..., dim]` over its root mean square, times a weight (Zhang and Sennrich, 2019)."""
    wide = x.to(exact(x.dtype))
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return scaled.to(x.dtype) * weight


class _Weights:
    """Draws weights one after the other, in float64 on the CPU, so that dtype and device change nothing else."""

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        self.dtype, self.device = config.dtype, device
        self.random = torch.Generator().manual_seed(config.seed)

    def __call__(self, rows: int, columns: int) -> nn.Parameter:
        drawn = torch.randn(rows, columns, generator=self.random, dtype=torch.float64) / math.sqrt(columns)
        return nn.Parameter(drawn.to(self.device, self.dtype), requires_grad=False)

    def ones(self, size: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(size, device=self.device, dtype=self.dtype), requires_grad=False)
