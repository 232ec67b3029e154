"""Trials: calls of attention, linear layers, copies and swaps with made-up contents, ready to be timed.

Contents do not matter to the time; where they lie does. Blocks are drawn at random from a pool that is larger than
the caches, and calls take turns over different ones (L2-safe rotation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.calibration.measuring import Call, cache_bytes, find_device, rotations, seconds
from attention.functional import copy_blocks, paged_attention
from attention.swap.swapping import swap_in, swap_out

SEED = 20231023
RAGGED = 0.1
"""Lengths of a batch lie so far, as a share, around their mean."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"

    @property
    def kv_values(self) -> int:
        """K and V values of a token."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def pair_flops(self) -> int:
        """FLOPs of a (query token, key) pair: two products over all query heads."""
        return 4 * self.num_heads * self.head_dim


class Bench:
    """Memory that all trials of a device share: a K and a V pool, seen in blocks of any shape.

    Args:
        device: Where it lies.
        dtype: Of everything.
        num_bytes: K and V together; at least twice the caches are taken, so that a rotation fits.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, num_bytes: int) -> None:
        self.device = device
        self.dtype = dtype
        size = max(num_bytes, 4 * cache_bytes(device)) // 2 // dtype.itemsize
        self._k, self._v = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        for pool in (self._k, self._v):
            pool.uniform_(-1, 1, generator=torch.Generator(device).manual_seed(SEED))
        self._random = torch.Generator().manual_seed(SEED)

    def caches(self, block_size: int, heads: Heads) -> tuple[Tensor, Tensor]:
        """K and V caches `[num_blocks, block_size, num_kv_heads, head_dim]` over all of the pool."""
        shape = (block_size, heads.num_kv_heads, heads.head_dim)
        number = self._k.numel() // math.prod(shape)
        k, v = (pool[: number * math.prod(shape)].view(number, *shape) for pool in (self._k, self._v))
        return k, v

    def values(self, *shape: int) -> Tensor:
        """Random values."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def tables(self, seq_lens: Sequence[int], block_size: int, num_blocks: int, number: int) -> list[Tensor]:
        """Block tables `[num_seqs, max_blocks]` (int32), whose blocks differ within a table and, as far as they
        last, between tables. Raises ValueError where the pool has too few blocks for one.
        """
        blocks = [-(-length // block_size) for length in seq_lens]
        if sum(blocks) > num_blocks:
            raise ValueError(f"seq_lens: got {sum(blocks)} blocks in all, expected at most {num_blocks}")
        order = torch.randperm(num_blocks, generator=self._random, dtype=torch.int32)
        tables, first = [], 0
        for _ in range(number):
            if first + sum(blocks) > num_blocks:
                first = 0
            rows = torch.split(order[first : first + sum(blocks)], blocks)
            tables.append(torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(self.device))
            first += sum(blocks)
        return tables

    def attention(
        self, seq_lens: Sequence[int], block_size: int, heads: Heads, query_lens: Sequence[int] | None = None,
        impl: str = "auto", run_blocks: int = 1, told: bool = True,
    ) -> list[Call]:  # fmt: skip
        """Paged attention over sequences of these lengths, one call for each of several block tables.

        One query token a sequence, or the last `query_lens` tokens of each. Tables are made of aligned runs of
        `run_blocks` blocks, and attention is `told` so.
        """
        k_cache, v_cache = self.caches(block_size, heads)
        blocks = sum(-(-length // block_size) for length in seq_lens)
        number = rotations(blocks * block_size * heads.kv_values * self.dtype.itemsize, self.device)
        tables = self.tables(seq_lens, block_size * run_blocks, len(k_cache) // run_blocks, number)
        if run_blocks > 1:
            within = torch.arange(run_blocks, dtype=torch.int32, device=self.device)
            tables = [(table[:, :, None] * run_blocks + within).flatten(1) for table in tables]
        lens = torch.tensor(seq_lens, dtype=torch.int32, device=self.device)
        starts, longest = None, None
        if query_lens is not None:
            ends = torch.tensor([0, *query_lens]).cumsum(0)
            starts, longest = ends.to(self.device, torch.int32), max(query_lens)
        q = self.values(sum(query_lens or [1] * len(seq_lens)), heads.num_heads, heads.head_dim)
        furthest = max(seq_lens)

        def call(table: Tensor) -> Call:
            return lambda: paged_attention(
                q, k_cache, v_cache, table, lens, query_start_loc=starts, max_query_len=longest,
                max_seq_len=furthest, run_blocks=run_blocks if told else 1, check=False, impl=impl,
            )  # fmt: skip

        return [call(table) for table in tables]

    def dense(self, hidden_size: int, num_tokens: int) -> tuple[list[Call], int]:
        """The linear layers of a transformer layer (`layer_weights`), and how many weights they have."""
        shapes = layer_weights(hidden_size)
        weights = sum(rows * columns for rows, columns in shapes)
        inputs = {columns: self.values(num_tokens, columns) for _, columns in shapes}
        number = min(
            rotations(weights * self.dtype.itemsize, self.device), max(1, self._k.numel() // weights)
        )

        def layer(index: int) -> Call:
            sizes = [rows * columns for rows, columns in shapes]
            parts = torch.split(self._k[index * weights : (index + 1) * weights], sizes)
            matrices = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

            def call() -> None:
                for matrix in matrices:
                    torch.nn.functional.linear(inputs[matrix.shape[1]], matrix)

            return call

        return [layer(index) for index in range(number)], weights

    def moves(self, kind: str, num_blocks: int, block_size: int, heads: Heads, num_layers: int) -> list[Call]:
        """Copies of blocks on the device (`copy`), or to the host (`swap_out`) and back (`swap_in`)."""
        k_cache, v_cache = self.caches(block_size, heads)
        per_layer = len(k_cache) // num_layers
        caches = [
            cache[layer * per_layer : (layer + 1) * per_layer]
            for layer in range(num_layers)
            for cache in (k_cache, v_cache)
        ]
        size = 2 * num_layers * num_blocks * k_cache[0].nbytes
        number = min(rotations(size, self.device), max(1, per_layer // (2 * num_blocks)))
        if 2 * num_blocks > per_layer:
            raise ValueError(f"num_blocks: got {num_blocks}, expected at most {per_layer // 2}")
        order = torch.randperm(per_layer, generator=self._random)[: 2 * number * num_blocks]
        drawn = order.view(number, num_blocks, 2)
        if kind == "copy":
            pairs = drawn.to(self.device)
            return [lambda mapping=mapping: copy_blocks(caches, mapping) for mapping in pairs]  # type: ignore[misc]
        pinned = self.device.type == "cuda"
        host = [
            torch.zeros((num_blocks, *k_cache.shape[1:]), dtype=self.dtype, pin_memory=pinned) for _ in caches
        ]
        calls: list[Call] = []
        for mapping in drawn:
            mapping[:, 1] = torch.arange(num_blocks)
            if kind == "swap_out":
                calls.append(lambda mapping=mapping: swap_out(caches, host, mapping))  # type: ignore[misc]
            else:
                back = mapping.flip(1).contiguous()
                calls.append(lambda mapping=back: swap_in(caches, host, mapping))  # type: ignore[misc]
        return calls


def layer_weights(hidden_size: int) -> list[tuple[int, int]]:
    """(rows, columns) of a layer's matrices: Q, K and V with a quarter of KV heads; output; gate and up; down."""
    middle = hidden_size * 7 // 2
    return [
        (hidden_size * 3 // 2, hidden_size), (hidden_size, hidden_size), (2 * middle, hidden_size),
        (hidden_size, middle),
    ]  # fmt: skip


def ragged(batch: int, context: int) -> list[int]:
    """Lengths evenly spread around `context`, which is their mean; the same whenever they are made."""
    spread = int(context * RAGGED)
    if batch == 1 or not spread:
        return [context] * batch
    lengths = [context - spread + round(2 * spread * index / (batch - 1)) for index in range(batch)]
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(SEED)).tolist()
    return [lengths[index] for index in order]


def time_step(
    seq_lens: Sequence[int],
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
) -> float:
    """Seconds of one layer's paged decode attention over sequences of these lengths, in made-up block tables.

    The median of a few calls after a warm-up. `dtype` is by default float32 on a CPU and bfloat16 on a GPU.
    Raises ValueError for no sequences or an empty one, UserError for a device that is not there.
    """
    return StepTimer(block_size, Heads(num_heads, num_kv_heads, head_dim), device, dtype).seconds(seq_lens)


class StepTimer:
    """Times decode attention of one layer on the shapes of many steps; its memory is kept from step to step."""

    ROUNDS = 3

    def __init__(
        self,
        block_size: int,
        heads: Heads,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = device if isinstance(device, torch.device) else find_device(device)
        self.dtype = dtype or default_dtype(self.device)
        self.block_size = block_size
        self.heads = heads
        self._bench: Bench | None = None
        self._room = 0

    def seconds(self, seq_lens: Sequence[int]) -> float:
        """Seconds of a call over sequences of these lengths. Raises ValueError as `time_step`."""
        if not seq_lens or min(seq_lens) < 1:
            raise ValueError(f"seq_lens: got {list(seq_lens)[:8]}, expected at least one, each at least 1")
        blocks = sum(-(-length // self.block_size) for length in seq_lens)
        needed = blocks * self.block_size * self.heads.kv_values * self.dtype.itemsize
        if self._bench is None or needed > self._room:
            self._bench = None  # give the old pool back first
            self._room = needed + needed // 2
            self._bench = Bench(self.device, self.dtype, self._room)
        calls = self._bench.attention(seq_lens, self.block_size, self.heads)
        return seconds(calls, self.device, self.ROUNDS, capturable=capturable(self.device))


def default_dtype(device: torch.device) -> torch.dtype:
    """What a device is measured in: float32 on a CPU, which knows no faster, bfloat16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def capturable(device: torch.device) -> bool:
    """True if what `impl="auto"` takes there never waits for the device, as a CUDA graph needs."""
    if device.type == "cpu":
        return False
    from attention.kernels.launch import refusal

    return refusal(128, torch.bfloat16, device) is None
