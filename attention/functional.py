"""Paged attention as functions: write K and V into a paged cache, attend over it through block tables.

Layouts and names are those of vLLM and FlashInfer: a cache is `[num_blocks, block_size, num_kv_heads, head_dim]`,
a slot is block * block_size + offset, and query head h reads KV head h // (num_heads // num_kv_heads). A cache may
be a strided view of a larger tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from attention import checks
from attention.call import AttentionCall, Implementation
from attention.gathered import gathered, reference
from attention.runs import folded

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")


@overload
def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, *,
    query_start_loc: Tensor | None = ..., max_query_len: int | None = ..., max_seq_len: int | None = ...,
    scale: float | None = ..., sliding_window: int | None = ..., soft_cap: float | None = ...,
    return_lse: Literal[False] = ..., num_splits: int | None = ..., run_blocks: int = ...,
    check: bool = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, *,
    query_start_loc: Tensor | None = ..., max_query_len: int | None = ..., max_seq_len: int | None = ...,
    scale: float | None = ..., sliding_window: int | None = ..., soft_cap: float | None = ...,
    return_lse: Literal[True], num_splits: int | None = ..., run_blocks: int = ...,
    check: bool = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    query_start_loc: Tensor | None = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    run_blocks: int = 1,
    check: bool = True,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each sequence's last tokens over its history in a paged cache.

    Decoding has one query token a sequence, a prompt or a chunk of it has many, and a batch may have both. The
    K and V of the query tokens are in the cache already.

    Args:
        q: `[num_tokens, num_heads, head_dim]`.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`; `num_heads` is a multiple of `num_kv_heads`.
        v_cache: As `k_cache`.
        block_tables: `[num_seqs, max_blocks]`, int32 or int64: the blocks of each sequence in order; entries
            behind the last block in use are not read.
        seq_lens: `[num_seqs]`, int32 or int64: tokens that each sequence has in the cache, its query tokens
            included. An empty sequence gives zeros, and a log-sum-exp of minus infinity.
        query_start_loc: `[num_seqs + 1]`, int32 or int64: rows `query_start_loc[s]` to `query_start_loc[s + 1]`
            of q are the last tokens of sequence s. By default each sequence has one.
        max_query_len: The largest number of query tokens of a sequence, or more.
        max_seq_len: The largest of `seq_lens`, or more. Without these two, finding them waits for the device.
        scale: What the scores are multiplied with; by default 1 / sqrt(head_dim).
        sliding_window: A token sees itself and the `sliding_window - 1` tokens before it.
        soft_cap: Scores become soft_cap * tanh(score / soft_cap).
        return_lse: Return the log-sum-exp of the scores too (natural logarithm).
        num_splits: In how many parts `triton` splits a history: 1 gives the same order of summation whatever
            the batch. The other implementations never split.
        run_blocks: A hint that every table is made of aligned runs of so many blocks: its entries, taken so many at a
            time, follow each other, and begin at a multiple of their number (the last ones in use may be fewer).
            A run is then read by one entry, as a larger block is. `attention.runs.longest_run` finds it.
        check: Look at the values of tables and lengths, which waits for the device. Without, values that leave
            the cache give undefined numbers.
        impl: `reference` computes the formula over the gathered history; `torch` gathers, then uses
            scaled_dot_product_attention; `triton` reads the cache in place, on a GPU; `auto` takes the fastest
            that there is.

    Returns:
        `[num_tokens, num_heads, head_dim]`; with `return_lse` also `[num_tokens, num_heads]`, in float32 (in
        float64 where q is).

    Raises ValueError for shapes, dtypes and devices that do not fit, for tables that leave the cache and lengths
    that leave their table, and for an implementation that this machine or this shape does not have.
    """
    checks.check_caches(k_cache, v_cache)
    checks.check_like("q", q, ("num_tokens", "num_heads", k_cache.shape[3]), k_cache)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    if not num_heads or num_heads % num_kv_heads:
        raise ValueError(f"q: got {num_heads} heads, expected a multiple of the {num_kv_heads} KV heads")
    checks.check_shape("block_tables", block_tables, ("num_seqs", "max_blocks"))
    num_seqs = block_tables.shape[0]
    checks.check_index("block_tables", block_tables, (num_seqs, "max_blocks"), k_cache)
    checks.check_index("seq_lens", seq_lens, (num_seqs,), k_cache)
    if query_start_loc is not None:
        checks.check_index("query_start_loc", query_start_loc, (num_seqs + 1,), k_cache)
    elif num_tokens != num_seqs:
        raise ValueError(
            f"q: got {num_tokens} tokens, expected {num_seqs}, one for each row of block_tables; "
            "query_start_loc tells who has how many"
        )
    check_options(impl, sliding_window, soft_cap, num_splits)
    if run_blocks < 1:
        raise ValueError(f"run_blocks: got {run_blocks}, expected at least 1")
    computed = implementation(impl, head_dim, q.dtype, q.device)
    if check:
        checks.check_tables(block_tables, seq_lens, k_cache)
        checks.check_runs(block_tables, seq_lens, k_cache, run_blocks)
        if query_start_loc is not None:
            checks.check_queries(query_start_loc, seq_lens, num_tokens)
    if check or max_seq_len is None:
        max_seq_len = checks.check_bound("max_seq_len", max_seq_len, int(seq_lens.max()) if num_seqs else 0)
    if query_start_loc is None:
        max_query_len = 1
    elif check or max_query_len is None:
        longest = int(query_start_loc.diff().max()) if num_seqs else 0
        max_query_len = checks.check_bound("max_query_len", max_query_len, longest)
    if run_blocks > 1:
        k_cache, v_cache, block_tables = folded(k_cache, v_cache, block_tables, run_blocks)
    call = AttentionCall(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        scale=1 / math.sqrt(head_dim) if scale is None else scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        num_splits=num_splits,
        return_lse=return_lse,
    )
    out, lse = computed(call)
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, check: bool = True
) -> None:
    """Write the K and V of tokens into their slots, in place (vLLM's reshape_and_cache).

    Args:
        k: `[num_tokens, num_kv_heads, head_dim]`.
        v: As `k`.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`.
        v_cache: As `k_cache`.
        slot_mapping: `[num_tokens]`, int32 or int64: the slot of each token, different ones; -1 drops a token.
        check: Look at the values of slot_mapping, which waits for the device.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for slots outside the cache.
    """
    checks.check_caches(k_cache, v_cache)
    checks.check_like("k", k, ("num_tokens", *k_cache.shape[2:]), k_cache)
    checks.check_like("v", v, tuple(k.shape), k_cache)
    checks.check_index("slot_mapping", slot_mapping, (k.shape[0],), k_cache)
    if check:
        checks.check_slots(slot_mapping, k_cache)
    if _fused(k.device):
        from attention.kernels import moving

        moving.write(k, v, k_cache, v_cache, slot_mapping)
        return
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    places = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[places] = k[kept]
    v_cache[places] = v[kept]


def copy_blocks(caches: Sequence[Tensor], block_mapping: Tensor, *, check: bool = True) -> None:
    """Copy whole blocks inside each cache, in place: what copy-on-write does for all layers at once.

    Args:
        caches: Tensors `[num_blocks, ...]`, such as the K and the V cache of every layer.
        block_mapping: `[num_pairs, 2]`, int32 or int64: source and target of each copy. Targets are different
            ones; no target is a source.
        check: Look at the values of block_mapping, which waits for the device.

    Raises ValueError for blocks outside a cache and for a mapping whose result depends on the order.
    """
    if not caches:
        return
    checks.check_index("block_mapping", block_mapping, ("num_pairs", 2), caches[0])
    sources, targets = block_mapping.unbind(1)
    if check:
        _check_mapping(caches, block_mapping)
    if _fused(caches[0].device):
        from attention.kernels import moving

        moving.copy_blocks(caches, block_mapping)
        return
    for cache in caches:
        cache[targets] = cache[sources]


def _fused(device: torch.device) -> bool:
    """Whether kernels write and copy there without waiting for the device, as indexing by values does."""
    if device.type != "cuda":
        return False
    from attention.kernels.launch import absence

    return absence(device) is None


def _check_mapping(caches: Sequence[Tensor], block_mapping: Tensor) -> None:
    fewest = min(cache.shape[0] for cache in caches)
    place = checks.first(block_mapping.lt(0) | block_mapping.ge(fewest))
    if place is not None:
        raise ValueError(
            f"block_mapping[{place[0]}, {place[1]}]: got block {int(block_mapping[place])}, "
            f"expected 0 to {fewest - 1}"
        )
    sources, targets = block_mapping.unbind(1)
    ordered = targets.sort().values
    if (ordered[1:] == ordered[:-1]).any() or torch.isin(targets, sources).any():
        raise ValueError(
            f"block_mapping: got {block_mapping.tolist()}, expected targets that are different ones and no sources"
        )


def implementation(impl: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Implementation:
    """What computes attention. Raises ValueError where it cannot run."""
    if impl == "reference":
        return reference
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return gathered
    from attention.kernels.launch import attend, refusal

    why = refusal(head_dim, dtype, device)
    if why is None:
        fused: Implementation = attend
        return fused
    if impl == "auto":
        return gathered
    raise ValueError(f"impl: got 'triton', but {why}")


def check_options(
    impl: str, sliding_window: int | None, soft_cap: float | None, num_splits: int | None = None
) -> None:
    """Raises ValueError for options that are none whatever the tensors."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    for name, count in (("sliding_window", sliding_window), ("num_splits", num_splits)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name}: got {count!r}, expected an integer >= 1, or None")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap: got {soft_cap!r}, expected a number above 0, or None")
