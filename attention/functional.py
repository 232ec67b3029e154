"""Paged attention as functions: write K and V into a paged cache, attend over it through block tables.

Layouts are those of vLLM and FlashInfer: a cache is `[num_blocks, block_size, num_kv_heads, head_dim]`, a slot is
block * block_size + offset, and query head h reads KV head h // (num_heads // num_kv_heads).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]

INTEGERS = (torch.int32, torch.int64)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of one new token per sequence over the sequence's history in a paged cache.

    Args:
        q: `[num_tokens, num_heads, head_dim]`, the decode query of each sequence.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`; `num_heads` is a multiple of `num_kv_heads`.
        v_cache: As `k_cache`.
        block_tables: `[num_tokens, max_blocks]`, int32 or int64: the blocks of each sequence in order; entries
            behind the last block in use are not read.
        seq_lens: `[num_tokens]`, int32 or int64: tokens that each sequence has in the cache, the new one included.
            An empty sequence gives zeros.
        scale: What the scores are multiplied with; by default 1 / sqrt(head_dim).
        impl: `reference` computes plain attention over the gathered history, one sequence after the other, in
            the dtype that it is given; `torch` gathers all at once for scaled_dot_product_attention; `auto`
            takes the fastest that there is.

    Returns:
        `[num_tokens, num_heads, head_dim]`.

    Raises ValueError for shapes that do not fit, and on the CPU for tables that leave the cache.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    _check_cache(k_cache, v_cache)
    _check_like("q", q, ("num_tokens", "num_heads", k_cache.shape[3]), k_cache)
    num_tokens, num_heads, head_dim = q.shape
    if num_heads % k_cache.shape[2]:
        raise ValueError(f"q: got {num_heads} heads, expected a multiple of the {k_cache.shape[2]} KV heads")
    _check_index("block_tables", block_tables, (num_tokens, "max_blocks"), k_cache)
    _check_index("seq_lens", seq_lens, (num_tokens,), k_cache)
    if not num_tokens:
        return torch.empty_like(q)
    if q.device.type == "cpu":  # elsewhere looking at the values would wait for the device
        _check_reach(block_tables, seq_lens, k_cache)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    return IMPLEMENTATIONS[impl](q, k_cache, v_cache, block_tables, seq_lens, scale)


def write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write the K and V of tokens into their slots, in place.

    Args:
        k: `[num_tokens, num_kv_heads, head_dim]`.
        v: As `k`.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`.
        v_cache: As `k_cache`.
        slot_mapping: `[num_tokens]`, int32 or int64: the slot of each token, different ones; -1 drops a token.

    Raises ValueError for shapes that do not fit, and on the CPU for slots outside the cache.
    """
    _check_cache(k_cache, v_cache)
    _check_like("k", k, ("num_tokens", *k_cache.shape[2:]), k_cache)
    _check_like("v", v, tuple(k.shape), k_cache)
    _check_index("slot_mapping", slot_mapping, (k.shape[0],), k_cache)
    num_blocks, block_size = k_cache.shape[:2]
    if k.device.type == "cpu":
        outside = slot_mapping[(slot_mapping < -1) | (slot_mapping >= num_blocks * block_size)]
        if len(outside):
            raise ValueError(
                f"slot_mapping: got slot {outside[0]}, expected -1 to {num_blocks * block_size - 1}"
            )
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    places = slots // block_size, slots % block_size
    k_cache[places] = k[kept]
    v_cache[places] = v[kept]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one query over a history that lies in one piece, as the formula says.

    q `[num_heads, head_dim]`, k and v `[seq_len, num_kv_heads, head_dim]`; returns `[num_heads, head_dim]`.
    """
    group = q.shape[0] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,nhd->hn", q, k) * scale
    weights = torch.exp(scores - scores.amax(dim=1, keepdim=True))
    return torch.einsum("hn,nhd->hd", weights / weights.sum(dim=1, keepdim=True), v)


def _reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """Shapes as in `paged_attention`: gather a history, attend over it, go on with the next."""
    block_size = k_cache.shape[1]
    out = torch.zeros_like(q)
    for row, length in enumerate(seq_lens.tolist()):
        if length:
            blocks = block_tables[row, : -(-length // block_size)].long()
            k = k_cache[blocks].flatten(0, 1)[:length]
            v = v_cache[blocks].flatten(0, 1)[:length]
            out[row] = plain_attention(q[row], k, v, scale)
    return out


def _torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """Shapes as in `paged_attention`: all histories gathered at once, padded to the longest.

    Query heads that share a KV head stand in the place of query positions. Padding reads a slot of the
    sequence itself: what lies behind a history, even if it is not a number, cannot leak in.
    """
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    longest = max(1, int(seq_lens.max()))
    positions = torch.arange(longest, device=q.device)
    inside = positions < seq_lens[:, None]  # [num_tokens, longest]
    index = torch.where(inside, positions, 0)
    blocks = block_tables.gather(1, index // block_size).long()
    blocks = torch.where((seq_lens > 0)[:, None], blocks, 0)
    k = k_cache[blocks, index % block_size].transpose(1, 2)  # [num_tokens, num_kv_heads, longest, head_dim]
    v = v_cache[blocks, index % block_size].transpose(1, 2)
    grouped = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = (inside | (positions == 0))[:, None, None, :]  # an empty row would give no number at all
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.reshape_as(q).masked_fill((seq_lens == 0)[:, None, None], 0)


IMPLEMENTATIONS: dict[str, Attention] = {"auto": _torch, "reference": _reference, "torch": _torch}


def _check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.dim() != 4:
        expected = "[num_blocks, block_size, num_kv_heads, head_dim]"
        raise ValueError(f"k_cache: got shape {list(k_cache.shape)}, expected {expected}")
    _check_like("v_cache", v_cache, tuple(k_cache.shape), k_cache)


def _check_like(name: str, tensor: Tensor, shape: tuple[int | str, ...], cache: Tensor) -> None:
    """Shape, dtype and device of values that go with a cache; a name stands for any size."""
    if not _fits(tensor, shape):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [{', '.join(map(str, shape))}]")
    if tensor.dtype != cache.dtype:
        raise ValueError(f"{name}: got {tensor.dtype}, expected {cache.dtype} as k_cache")
    if tensor.device != cache.device:
        raise ValueError(f"{name}: got it on {tensor.device}, expected it on {cache.device} as k_cache")


def _check_index(name: str, tensor: Tensor, shape: tuple[int | str, ...], cache: Tensor) -> None:
    """Shape, dtype and device of integers that go with a cache."""
    if not _fits(tensor, shape):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [{', '.join(map(str, shape))}]")
    if tensor.dtype not in INTEGERS:
        raise ValueError(f"{name}: got {tensor.dtype}, expected torch.int32 or torch.int64")
    if tensor.device != cache.device:
        raise ValueError(f"{name}: got it on {tensor.device}, expected it on {cache.device} as k_cache")


def _fits(tensor: Tensor, shape: tuple[int | str, ...]) -> bool:
    return tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )


def _check_reach(block_tables: Tensor, seq_lens: Tensor, cache: Tensor) -> None:
    """No history leaves its table, no table entry that is read leaves the cache."""
    num_blocks, block_size = cache.shape[:2]
    room = block_tables.shape[1] * block_size
    wrong = torch.nonzero((seq_lens < 0) | (seq_lens > room))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"seq_lens[{row}]: got {int(seq_lens[row])}, expected 0 to {room}, "
            f"{block_tables.shape[1]} blocks of {block_size} slots"
        )
    used = torch.arange(block_tables.shape[1]) * block_size < seq_lens[:, None]
    wrong = torch.nonzero(used & ((block_tables < 0) | (block_tables >= num_blocks)))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"block_tables[{row}, {column}]: got {int(block_tables[row, column])}, "
            f"expected 0 to {num_blocks - 1}"
        )
