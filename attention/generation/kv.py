"""What a transformer keeps its K and V in: the paged cache, or one plain tensor per sequence and layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attention.cache import PagedKVCache
from attention.functional import paged_attention, write
from attention.plain import exact, plain_attention

KVMetadata = Any
"""What a backend's `extend` returns and its `attend` takes; nobody else looks into it."""


class KV(Protocol):
    """K and V of sequences, and attention over them. Both backends behave alike, but for what they hold."""

    copied_tokens: int  # tokens whose K and V were copied so far, because sequences fork or part

    @property
    def cache(self) -> Any:
        """Who owns the sequences, for those who move them between steps."""

    @property
    def device(self) -> torch.device:
        """Where K and V lie."""

    def new(self) -> int:
        """An empty sequence."""

    def fork(self, seq_id: int) -> int:
        """A sequence with the same tokens."""

    def free(self, seq_id: int) -> None:
        """Forget a sequence."""

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence."""

    def extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> KVMetadata:
        """Make room for new tokens of each sequence; all of them, or none and OutOfBlocks."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, metadata: KVMetadata) -> Tensor:
        """Keep the new tokens' K and V, then attend over everything; q `[num_tokens, num_heads, head_dim]`."""

    def blocks(self, seq_ids: Sequence[int]) -> tuple[int, int]:
        """Blocks that these sequences would hold if none were shared, and blocks that they hold."""


class PagedKV:
    """K and V in the blocks of a `PagedKVCache`; a fork shares blocks, and copies one when it writes into it."""

    def __init__(self, cache: PagedKVCache, impl: str = "auto") -> None:
        self.cache = cache
        self.impl = impl
        self.copied_tokens = 0

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.cache.k.device

    def new(self) -> int:
        """An empty sequence of the cache."""
        return self.cache.new()

    def fork(self, seq_id: int) -> int:
        """A sequence that shares all blocks of its parent."""
        return self.cache.fork(seq_id)

    def free(self, seq_id: int) -> None:
        """Drop the sequence's references to its blocks."""
        self.cache.free(seq_id)

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence."""
        return self.cache.length(seq_id)

    def extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> KVMetadata:
        """Blocks for new tokens; a shared last block that is written into is copied first."""
        metadata = self.cache.extend(seq_ids, num_tokens)
        self.copied_tokens += metadata.copied_blocks * self.cache.block_size
        return metadata

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, metadata: KVMetadata) -> Tensor:
        """Write by slot mapping, then paged attention through the block tables, behind this layer's copies."""
        metadata.wait(layer)
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        write(k, v, k_cache, v_cache, metadata.slot_mapping, check=False)
        out: Tensor = paged_attention(
            q, k_cache, v_cache, **metadata.arguments(), check=False, impl=self.impl
        )
        return out

    def blocks(self, seq_ids: Sequence[int]) -> tuple[int, int]:
        """Entries of their block tables, and different blocks among them."""
        tables = [self.cache.block_table(seq_id) for seq_id in seq_ids]
        return sum(map(len, tables)), len(set().union(*tables))


@dataclass(frozen=True, slots=True)
class Rows:
    """The step of a `ContiguousKV`: rows `starts[i]` to `starts[i + 1]` of a batch belong to `seq_ids[i]`."""

    seq_ids: Sequence[int]
    starts: Sequence[int]


class ContiguousKV:
    """K and V of each sequence and layer in one piece, `[seq_len, num_kv_heads, head_dim]`; a fork is a clone.

    Nothing is shared, and attention is the formula: what generation over the paged cache must equal.
    """

    def __init__(self, num_layers: int, device: torch.device | str = "cpu") -> None:
        self.num_layers = num_layers
        self.device = torch.device(device)
        self.copied_tokens = 0
        self._next = 0
        self._lengths: dict[int, int] = {}
        self._history: dict[int, list[tuple[Tensor, Tensor] | None]] = {}

    @property
    def cache(self) -> ContiguousKV:
        """Itself."""
        return self

    def new(self) -> int:
        """An empty sequence."""
        seq_id = self._next
        self._next += 1
        self._lengths[seq_id] = 0
        self._history[seq_id] = [None] * self.num_layers
        return seq_id

    def fork(self, seq_id: int) -> int:
        """A sequence with copies of everything that its parent has."""
        child = self.new()
        self._lengths[child] = self._lengths[seq_id]
        self._history[child] = [kept and (kept[0].clone(), kept[1].clone()) for kept in self._history[seq_id]]
        self.copied_tokens += self._lengths[seq_id]
        return child

    def free(self, seq_id: int) -> None:
        """Forget a sequence."""
        del self._lengths[seq_id], self._history[seq_id]

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence."""
        return self._lengths[seq_id]

    def extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> Rows:
        """Which rows of the batch belong to whom."""
        starts = [0]
        for seq_id, count in zip(seq_ids, num_tokens, strict=True):
            self._lengths[seq_id] += count
            starts.append(starts[-1] + count)
        return Rows(tuple(seq_ids), starts)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, metadata: Rows) -> Tensor:
        """Append, then the formula, sequence by sequence; half precision is computed in float32."""
        dtype = exact(q.dtype)
        out = torch.empty_like(q)
        scale = 1 / math.sqrt(q.shape[-1])
        for index, seq_id in enumerate(metadata.seq_ids):
            rows = slice(metadata.starts[index], metadata.starts[index + 1])
            kept = self._history[seq_id][layer]
            history = (
                (k[rows], v[rows])
                if kept is None
                else (torch.cat((kept[0], k[rows])), torch.cat((kept[1], v[rows])))
            )
            self._history[seq_id][layer] = history
            query, keys, values = (tensor.to(dtype) for tensor in (q[rows], *history))
            out[rows] = plain_attention(query, keys, values, scale)[0]
        return out

    def blocks(self, seq_ids: Sequence[int]) -> tuple[int, int]:
        """Tokens in place of blocks: a piece has no blocks, and shares nothing."""
        total = sum(self._lengths[seq_id] for seq_id in seq_ids)
        return total, total
