"""Cases of paged attention: a poisoned pool for the kernel, the histories themselves for the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attention.call import AttentionCall
from attention.functional import paged_attention

NOWHERE = 2**30
"""An id in table entries that nobody may read: far outside every pool."""


@dataclass
class Case:
    """Sequences in a pool in which every slot that is not visible is NaN, and every unused table entry NOWHERE."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None
    histories: list[tuple[Tensor, Tensor]]  # K and V [seq_len, num_kv_heads, head_dim] of each sequence
    options: dict[str, Any] = field(default_factory=dict)  # scale, sliding_window, soft_cap

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        """(out, lse) by the kernels."""
        return paged_attention(
            self.q, self.k_cache, self.v_cache, self.block_tables, self.seq_lens,
            query_start_loc=self.query_start_loc, return_lse=True, impl="triton",
            **{"check": False, "max_query_len": self.longest_query, "max_seq_len": int(self.seq_lens.max())}
            | self.options | options,
        )  # fmt: skip

    def call(self) -> AttentionCall:
        """What the implementation gets."""
        options = {
            "scale": 1 / math.sqrt(self.q.shape[2]),
            "sliding_window": None,
            "soft_cap": None,
        } | self.options
        return AttentionCall(
            q=self.q, k_cache=self.k_cache, v_cache=self.v_cache, block_tables=self.block_tables,
            seq_lens=self.seq_lens, query_start_loc=self.query_start_loc, max_query_len=self.longest_query,
            max_seq_len=int(self.seq_lens.max()), num_splits=None, return_lse=True, **options,
        )  # fmt: skip

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Rows of q that each sequence has."""
        count = len(self.histories)
        starts = range(count + 1) if self.query_start_loc is None else self.query_start_loc.tolist()
        return [(starts[index], starts[index + 1]) for index in range(count)]

    @property
    def longest_query(self) -> int:
        return max(stop - start for start, stop in self.rows)

    def expected(self) -> tuple[Tensor, Tensor]:
        """(out, lse) in float64, by the formula, on each history alone."""
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        lse = torch.full(self.q.shape[:2], -math.inf, dtype=torch.float64)
        for (start, stop), (k, v) in zip(self.rows, self.histories, strict=True):
            if len(k) and start < stop:
                queries = self.q[start:stop].cpu().double()
                out[start:stop], lse[start:stop] = formula(queries, k.double(), v.double(), **self.options)
        return out, lse

    def sdpa(self) -> Tensor:
        """torch's own attention in the dtype of the case, on each history alone."""
        out = torch.zeros_like(self.q)
        for (start, stop), (k, v) in zip(self.rows, self.histories, strict=True):
            if len(k) and start < stop:
                allowed = visible(stop - start, len(k), self.options.get("sliding_window")).to(self.q.device)
                heads = [tensor.to(self.q.device).transpose(0, 1)[None] for tensor in (k, v)]
                queries = self.q[start:stop].transpose(0, 1)[None]
                result = torch.nn.functional.scaled_dot_product_attention(
                    queries, *heads, attn_mask=allowed, enable_gqa=True
                )
                out[start:stop] = result[0].transpose(0, 1)
        return out

    def check(self, **options: Any) -> None:
        """The kernels are within the bounds of float32, or of twice the error of SDPA in shorter types."""
        out, lse = (tensor.cpu().double() for tensor in self.run(**options))
        want, want_lse = self.expected()
        error = (out - want).abs().max().item()
        values = max((v.abs().max().item() for _, v in self.histories if len(v)), default=1.0)
        if self.q.dtype == torch.float32:
            bound = 1e-5 * min(max(1.0, want.abs().max().item()), values)
        else:
            bound = 2 * (self.sdpa().cpu().double() - want).abs().max().item()
        assert error <= bound, f"error {error:.2e} over {bound:.2e}"
        assert torch.equal(lse.isinf(), want_lse.isinf())
        gap = (lse - want_lse).abs() / want_lse.abs().clamp(min=1)
        assert gap[want_lse.isfinite()].max().item() <= 1e-5 if want_lse.isfinite().any() else True


def visible(query_len: int, seq_len: int, sliding_window: int | None) -> Tensor:
    """Which keys each query sees, bool `[query_len, seq_len]`."""
    position = torch.arange(seq_len - query_len, seq_len)[:, None]
    key = torch.arange(seq_len)[None, :]
    seen = key <= position
    return seen if sliding_window is None else seen & (key > position - sliding_window)


def formula(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of one sequence: q `[query_len, heads, dim]`, k and v `[seq_len, kv_heads, dim]`."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1))
    scores = scores * (1 / math.sqrt(q.shape[2]) if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible(len(q), len(k), sliding_window), -math.inf)
    lse = torch.logsumexp(scores, 2)
    weights = torch.exp(scores - lse[:, :, None])
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)), lse.transpose(0, 1)


def case(
    device: torch.device, lengths: Sequence[int], query_lens: Sequence[int] | None = None, *, block_size: int = 16,
    heads: int = 4, kv_heads: int = 2, head_dim: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0,
    shared: int = 0, sharpness: float = 1.0, index: torch.dtype = torch.int32, **options: Any,
) -> Case:  # fmt: skip
    """Random sequences in permuted blocks; `shared` full blocks at the front are the same for all that are longer."""
    random = torch.Generator().manual_seed(seed)
    drawn = query_lens if query_lens is not None else [1] * len(lengths)
    q = torch.randn(sum(drawn), heads, head_dim, generator=random) * sharpness
    prefix = torch.randn(2, shared * block_size, kv_heads, head_dim, generator=random)
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + shared + 2
    free = torch.randperm(num_blocks, generator=random).tolist()
    front = [free.pop() for _ in range(shared)]
    caches = torch.full((2, num_blocks, block_size, kv_heads, head_dim), math.nan, dtype=dtype)
    tables = torch.full((len(lengths), max(counts) + 2), NOWHERE, dtype=index)
    histories = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        history = torch.randn(2, length, kv_heads, head_dim, generator=random)
        shares = bool(shared) and length >= shared * block_size
        if shares:
            history[:, : shared * block_size] = prefix
        history = history.to(dtype)
        histories.append((history[0], history[1]))
        blocks = (
            front + [free.pop() for _ in range(count - shared)]
            if shares
            else [free.pop() for _ in range(count)]
        )
        hidden = 0
        window = options.get("sliding_window")
        if window is not None and not shared:  # nobody sees what lies before the first query's window
            hidden = max(length - drawn[row] - window + 1, 0) if drawn[row] else length
        for place, block in enumerate(blocks):
            first, last = place * block_size, min((place + 1) * block_size, length)
            if last > hidden:
                tables[row, place] = block
                begin = max(first, hidden)
                caches[:, block, begin - first : last - first] = history[:, begin:last]
    starts = None
    if query_lens is not None:
        starts = torch.tensor([0, *query_lens]).cumsum(0).to(index).to(device)
    return Case(
        q.to(dtype).to(device), *caches.to(device).unbind(0), tables.to(device),
        torch.tensor(lengths, dtype=index, device=device), starts, histories, options,
    )  # fmt: skip
