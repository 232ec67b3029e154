"""A layer of attention over a paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attention.cache import AttentionMetadata, PagedKVCache
from attention.functional import check_options, implementation, paged_attention, write
from attention.plain import exact
from attention.rotary import rotate, rotations


class PagedAttention(nn.Module):
    """Causal self-attention of new tokens over all that came before, kept in a paged cache (Kwon et al., SOSP 2023).

    For inference: nothing here keeps gradients.

    Args:
        hidden_dim: Width of the input, a multiple of `num_heads`.
        num_heads: Query heads.
        block_size: Tokens per block, as the cache's.
        num_kv_heads: Heads of K and V, of which `num_heads` is a multiple (GQA); by default as many.
        rope_theta: Base of a rotary position embedding; by default there is none.
        layer: Which layer of the cache is this one's.
        sliding_window: A token sees itself and the `sliding_window - 1` tokens before it.
        soft_cap: Scores become soft_cap * tanh(score / soft_cap).
        bias: Whether the projections add one.
        impl: As in `paged_attention`.
        device: Of the weights.
        dtype: Of the weights.

    Raises ValueError for sizes that do not go together.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        block_size: int,
        *,
        num_kv_heads: int | None = None,
        rope_theta: float | None = None,
        layer: int = 0,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        bias: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(impl, sliding_window, soft_cap)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or hidden_dim < 1 or hidden_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of hidden_dim {hidden_dim}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: got {num_kv_heads}, expected a divisor of num_heads {num_heads}")
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_dim // num_heads
        self.block_size = block_size
        self.rope_theta = rope_theta
        self.layer = layer
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap
        self.impl = impl
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"rope_theta: got heads of {self.head_dim}, expected an even width")
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_dim, hidden_dim, bias, device, dtype)
        self.k_proj = nn.Linear(hidden_dim, kv_dim, bias, device, dtype)
        self.v_proj = nn.Linear(hidden_dim, kv_dim, bias, device, dtype)
        self.o_proj = nn.Linear(hidden_dim, hidden_dim, bias, device, dtype)

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        cache: PagedKVCache,
        seq_ids: Sequence[int] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Append the tokens to their sequences and attend over all of each, the new ones included.

        Args:
            x: `[batch_size, num_tokens, hidden_dim]`: the next tokens of each sequence.
            cache: Where K and V are kept. A model whose layers share it calls `extend` once and `attend` in
                every layer.
            seq_ids: The sequence of each row; by default the cache's own, one for each row.
            positions: `[batch_size, num_tokens]`, for the rotary embedding; by default a token's place in its
                sequence. Without rotary embedding there are no others.

        Returns:
            `[batch_size, num_tokens, hidden_dim]`.

        Raises ValueError for shapes, dtypes and sequences that do not fit, OutOfBlocks if the pool has too few
        blocks; both leave everything as it was.
        """
        batch_size, num_tokens = self._check(x, cache)
        if positions is not None and positions.shape != x.shape[:2]:
            raise ValueError(f"positions: got shape {list(positions.shape)}, expected {list(x.shape[:2])}")
        if seq_ids is not None and len(seq_ids) != batch_size:
            raise ValueError(f"seq_ids: got {len(seq_ids)}, expected {batch_size}, one for each row of x")
        made = not cache.has_rows
        ids = cache.rows(batch_size) if seq_ids is None else seq_ids
        try:
            if positions is not None and self.rope_theta is None:
                self._check_positions(positions, [cache.length(seq_id) for seq_id in ids])
            metadata = cache.extend(ids, num_tokens)
        except Exception:
            if seq_ids is None and made:
                cache.drop_rows()
            raise
        flat = None if positions is None else positions.reshape(-1).to(x.device)
        return self.attend(x.reshape(-1, self.hidden_dim), cache, metadata, flat).reshape_as(x)

    @torch.no_grad()
    def attend(
        self, x: Tensor, cache: PagedKVCache, metadata: AttentionMetadata, positions: Tensor | None = None
    ) -> Tensor:
        """The layer over tokens that `cache.extend` has made room for.

        x `[num_tokens, hidden_dim]`, ragged as `metadata` says; positions `[num_tokens]`; returns like x.
        """
        cache.bind(self.num_kv_heads, self.head_dim, x.dtype, x.device)
        q = self.q_proj(x).view(len(x), self.num_heads, self.head_dim)
        k = self.k_proj(x).view(len(x), self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).view(len(x), self.num_kv_heads, self.head_dim)
        if self.rope_theta is not None:
            positions = metadata.positions if positions is None else positions
            rotation = rotations(positions, self.head_dim, self.rope_theta, exact(x.dtype))
            q, k = rotate(q, rotation), rotate(k, rotation)
        metadata.wait(self.layer)
        k_cache, v_cache = cache.k[self.layer], cache.v[self.layer]
        write(k, v, k_cache, v_cache, metadata.slot_mapping, check=False)
        out = paged_attention(
            q, k_cache, v_cache, **metadata.arguments(), sliding_window=self.sliding_window,
            soft_cap=self.soft_cap, impl=self.impl, check=False,
        )  # fmt: skip
        projected: Tensor = self.o_proj(out.reshape(len(x), self.hidden_dim))
        return projected

    def _check(self, x: Tensor, cache: PagedKVCache) -> tuple[int, int]:
        """Everything that can be wrong with x and the cache, before anything changes."""
        if x.dim() != 3 or x.shape[2] != self.hidden_dim or not x.shape[0] or not x.shape[1]:
            raise ValueError(
                f"x: got shape {list(x.shape)}, expected [batch_size, num_tokens, {self.hidden_dim}]"
            )
        weight = self.q_proj.weight
        if x.dtype != weight.dtype or x.device != weight.device:
            raise ValueError(
                f"x: got {x.dtype} on {x.device}, expected {weight.dtype} on {weight.device} as the weights"
            )
        for name in ("hidden_dim", "block_size"):
            if getattr(cache, name) != getattr(self, name):
                raise ValueError(
                    f"cache: got {name} {getattr(cache, name)}, expected {getattr(self, name)} as the layer"
                )
        if self.layer >= cache.num_layers:
            raise ValueError(f"cache: got {cache.num_layers} layers, expected more than {self.layer}")
        implementation(self.impl, self.head_dim, x.dtype, x.device)
        cache.bind(self.num_kv_heads, self.head_dim, x.dtype, x.device)
        return x.shape[0], x.shape[1]

    def _check_positions(self, positions: Tensor, lengths: list[int]) -> None:
        """Without rotary embedding only the order in the cache counts."""
        follow = torch.tensor(lengths)[:, None] + torch.arange(positions.shape[1])
        if not torch.equal(positions.cpu().long(), follow):
            raise ValueError(
                f"positions: got {positions.tolist()}, expected {follow.tolist()}, where the sequences go on; "
                "rope_theta makes others possible"
            )
