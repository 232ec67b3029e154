"""Twins: a paged cache, and beside it the same histories each in one piece, to compare attention over both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.cache import BlockAllocator, PagedKVCache
from attention.functional import write
from attention.plain import plain_attention, visible


@dataclass(frozen=True, slots=True)
class Form:
    """Sizes of a problem, what its values are, and what is asked of attention beside the plain thing."""

    block_size: int = 16
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    sliding_window: int | None = None
    soft_cap: float | None = None
    sharpness: float = 1.0  # queries are N(0, 1) times this
    num_splits: int | None = None
    num_layers: int = 1


@dataclass(frozen=True)
class Problem:
    """One call of paged attention, and the histories that it stands for.

    `arguments` are those of `paged_attention`. `histories` are the K and V of each sequence in one piece,
    `[seq_len, num_kv_heads, head_dim]`, kept aside when they were written: what is expected does not come from
    the cache.
    """

    form: Form
    arguments: dict[str, Any]
    q: Tensor
    query_lens: tuple[int, ...]
    histories: tuple[tuple[Tensor, Tensor], ...]

    @property
    def rows(self) -> list[slice]:
        """The rows of q of each sequence."""
        ends = [sum(self.query_lens[: number + 1]) for number in range(len(self.query_lens))]
        return [slice(end - length, end) for end, length in zip(ends, self.query_lens, strict=True)]

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return 1 / math.sqrt(self.form.head_dim)

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp by the formula, in float64 on the CPU."""
        q = self.q.cpu().double()
        found = [
            plain_attention(
                q[rows], k.cpu().double(), v.cpu().double(), self.scale,
                self.form.sliding_window, self.form.soft_cap,
            )
            for rows, (k, v) in zip(self.rows, self.histories, strict=True)
        ]  # fmt: skip
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    @cached_property
    def error_of_torch(self) -> float:
        """The largest error of torch's own attention, over the same histories in one piece and in their type.

        It knows no soft-cap, which only makes scores smaller: there its error without one is taken.
        """
        worst = 0.0
        for rows, (k, v) in zip(self.rows, self.histories, strict=True):
            q = self.q[rows]
            window = self.form.sliding_window
            causal = window is None and len(q) == len(k)  # without a mask, so that the fastest way is open
            mask = (
                None
                if causal or (window is None and len(q) == 1)
                else visible(len(q), len(k), window, q.device)
            )
            out = scaled_dot_product_attention(
                q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
                attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=True,
            )[0].transpose(0, 1)  # fmt: skip
            if self.form.soft_cap is None:
                expected = self.expected[0][rows]
            else:
                q64, k64, v64 = (part.cpu().double() for part in (q, k, v))
                expected, _ = plain_attention(q64, k64, v64, self.scale, window)
            worst = max(worst, float((out.cpu().double() - expected).abs().max()))
        return worst


@dataclass(slots=True)
class Twin:
    """A paged cache whose tables are shuffled and whose unwritten slots are not numbers, and its histories.

    `append` writes random K and V in every layer; the other methods do to both what `PagedKVCache` does.
    """

    form: Form
    num_blocks: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    cache: PagedKVCache = field(init=False)
    histories: dict[int, list[tuple[Tensor, Tensor]]] = field(init=False, default_factory=dict)
    random: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        form = self.form
        self.random = torch.Generator().manual_seed(self.seed)
        hidden_dim = form.num_heads * form.head_dim
        allocator = BlockAllocator(self.num_blocks, form.block_size, hidden_dim)
        order = torch.randperm(self.num_blocks, generator=self.random)
        allocator.pool.free[:] = order.tolist()
        self.cache = PagedKVCache(
            form.block_size, hidden_dim, allocator, num_layers=form.num_layers, num_kv_heads=form.num_kv_heads,
            head_dim=form.head_dim, dtype=self.dtype, device=self.device,
        )  # fmt: skip
        self.cache.k.fill_(torch.nan)
        self.cache.v.fill_(torch.nan)

    def new(self, count: int = 1) -> list[int]:
        """Empty sequences."""
        seq_ids = [self.cache.new() for _ in range(count)]
        for seq_id in seq_ids:
            empty = torch.empty(
                0, self.form.num_kv_heads, self.form.head_dim, dtype=self.dtype, device=self.device
            )
            self.histories[seq_id] = [(empty, empty)] * self.form.num_layers
        return seq_ids

    def fork(self, seq_id: int) -> int:
        """A sequence with the same history in the same blocks."""
        child = self.cache.fork(seq_id)
        self.histories[child] = list(self.histories[seq_id])
        return child

    def free(self, seq_ids: Sequence[int]) -> None:
        """Drop sequences, and spoil the blocks that nobody holds any more."""
        for seq_id in seq_ids:
            self.cache.free(seq_id)
            del self.histories[seq_id]
        self.spoil()

    def spoil(self) -> None:
        """Fill what is free with what is not a number: whoever still reads it shows."""
        free = self.cache.allocator.pool.free
        self.cache.in_flight.hold(written=free)
        self.cache.k[:, free] = torch.nan
        self.cache.v[:, free] = torch.nan

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1) in the cache's type and place."""
        return torch.randn(*shape, generator=self.random).to(self.device, self.dtype)

    def append(self, seq_ids: Sequence[int], counts: int | Sequence[int]) -> Problem:
        """New tokens for sequences, their K and V random; returns attention of their queries in the last layer."""
        counts = [counts] * len(seq_ids) if isinstance(counts, int) else list(counts)
        rows = sum(counts), self.form.num_kv_heads, self.form.head_dim
        return self.put(seq_ids, counts, [(self.normal(*rows), self.normal(*rows)) for _ in self.layers])

    def recompute(self, seq_id: int, chunk: int) -> int:
        """Free a sequence and write its history again, in chunks, under another id; returns that."""
        history = self.histories[seq_id]
        self.free([seq_id])
        (again,) = self.new()
        for first in range(0, len(history[0][0]), chunk):
            parts = [(k[first : first + chunk], v[first : first + chunk]) for k, v in history]
            self.put([again], [len(parts[0][0])], parts)
        return again

    @property
    def layers(self) -> range:
        """All layers."""
        return range(self.form.num_layers)

    def put(self, seq_ids: Sequence[int], counts: list[int], new: list[tuple[Tensor, Tensor]]) -> Problem:
        """As `append`, with these K and V of every layer, `[num_tokens, num_kv_heads, head_dim]`."""
        metadata = self.cache.extend(seq_ids, counts)
        for layer, (k, v) in enumerate(new):
            metadata.wait(layer)
            write(k, v, self.cache.k[layer], self.cache.v[layer], metadata.slot_mapping)
            for seq_id, mine, its in zip(
                seq_ids, torch.split(k, counts), torch.split(v, counts), strict=True
            ):
                kept = self.histories[seq_id][layer]
                self.histories[seq_id][layer] = torch.cat((kept[0], mine)), torch.cat((kept[1], its))
        q = self.normal(sum(counts), self.form.num_heads, self.form.head_dim) * self.form.sharpness
        return self.problem(seq_ids, counts, q, metadata.arguments())

    def again(self, seq_ids: Sequence[int], problem: Problem) -> Problem:
        """The same queries once more, through the tables as they are now."""
        tables = [self.cache.block_table(seq_id) for seq_id in seq_ids]
        self.cache.in_flight.hold(read=[block for table in tables for block in table])
        padded = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int64)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = torch.tensor(table)
        arguments = {**problem.arguments, "block_tables": padded.to(self.device)}
        return self.problem(seq_ids, list(problem.query_lens), problem.q, arguments)

    def problem(
        self, seq_ids: Sequence[int], counts: list[int], q: Tensor, arguments: dict[str, Any]
    ) -> Problem:
        """Attention of `q` in the last layer, as the cache's metadata says."""
        places = torch.arange(arguments["block_tables"].shape[1], device=self.device) * self.form.block_size
        unread = places >= arguments["seq_lens"][:, None]
        told = {
            **arguments,
            "block_tables": arguments["block_tables"].masked_fill(unread, -1),
            "k_cache": self.cache.k[-1],
            "v_cache": self.cache.v[-1],
            "q": q,
            "sliding_window": self.form.sliding_window,
            "soft_cap": self.form.soft_cap,
            "num_splits": self.form.num_splits,
        }
        histories = tuple(self.histories[seq_id][-1] for seq_id in seq_ids)
        return Problem(self.form, told, q, tuple(counts), histories)
