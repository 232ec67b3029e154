"""Calibration grids: which calls a calibration measures, by device and by how long it may take."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from attention.calibration.fitting import Observation
from attention.calibration.measuring import Call
from attention.calibration.trials import Bench, Heads, layer_weights, ragged
from sim.timing.profile import S_PER_WEIGHT, US, DecodeCost, MoveCost, PrefillCost

HELD_BACK = 0.25
SEED = 7
MOVES = ("copy", "swap_out", "swap_in")
TERMS = ("decode", "prefill", "dense", *MOVES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Shapes to measure: the product of the lists, as far as one call stays below the limits.

    `between` are token counts of the linear layers that the fit never sees: they show what lies between two of
    `tokens`. `heads` are (query heads, KV heads, head size).
    """

    heads: tuple[tuple[int, int, int], ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    block_sizes: tuple[int, ...]
    max_kv_bytes: int
    prompts: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    prompt_contexts: tuple[int, ...]
    max_prefill_flops: float
    hidden_sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    between: tuple[int, ...]
    moved_blocks: tuple[int, ...]
    moved_block_sizes: tuple[int, ...]
    moved_layers: tuple[int, ...]
    passes: int

    def num_bytes(self, itemsize: int) -> int:
        """Bytes that the largest call touches."""
        weights = max(
            sum(rows * columns for rows, columns in layer_weights(size)) for size in self.hidden_sizes
        )
        return max(self.max_kv_bytes, 2 * weights * itemsize)


GRIDS = {
    ("cpu", True): Grid(
        heads=((32, 8, 128), (16, 16, 64)), batches=(1, 4, 16), contexts=(64, 256, 1024), block_sizes=(4, 16),
        max_kv_bytes=48 << 20, prompts=(1, 2), prompt_tokens=(16, 64, 256), prompt_contexts=(0, 256, 1024),
        max_prefill_flops=3e9, hidden_sizes=(512, 1024), tokens=(1, 2, 3, 4, 8, 16, 32, 64, 128), between=(24, 96),
        moved_blocks=(1, 8, 64), moved_block_sizes=(4, 16), moved_layers=(2, 8), passes=3,
    ),
    ("cpu", False): Grid(
        heads=((32, 8, 128), (32, 32, 128), (16, 2, 64)), batches=(1, 4, 16, 64), contexts=(64, 256, 1024, 4096),
        block_sizes=(1, 8, 16, 64), max_kv_bytes=160 << 20, prompts=(1, 4), prompt_tokens=(16, 64, 256, 1024),
        prompt_contexts=(0, 256, 1024, 4096), max_prefill_flops=3e10, hidden_sizes=(1024, 2048, 3072),
        tokens=(1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512), between=(6, 24, 96, 384),
        moved_blocks=(1, 4, 16, 64, 256), moved_block_sizes=(4, 16, 64), moved_layers=(2, 8, 32), passes=5,
    ),
    ("cuda", True): Grid(
        heads=((32, 8, 128),), batches=(1, 16, 128), contexts=(1024, 8192), block_sizes=(16, 64),
        max_kv_bytes=4 << 30, prompts=(1, 4), prompt_tokens=(64, 512, 2048), prompt_contexts=(0, 4096),
        max_prefill_flops=1e12, hidden_sizes=(2048, 4096),
        tokens=(1, 8, 32, 64, 128, 256, 512, 1024), between=(48, 384),
        moved_blocks=(1, 8, 64), moved_block_sizes=(16, 64), moved_layers=(2, 8), passes=1,
    ),
    ("cuda", False): Grid(
        heads=((32, 8, 128), (32, 32, 128), (64, 8, 128)), batches=(1, 4, 16, 64, 256),
        contexts=(256, 1024, 4096, 16384, 32768), block_sizes=(1, 16, 64, 256), max_kv_bytes=16 << 30,
        prompts=(1, 4), prompt_tokens=(16, 64, 256, 1024, 4096, 8192), prompt_contexts=(0, 1024, 8192, 32768),
        max_prefill_flops=4e12, hidden_sizes=(2048, 4096, 8192),
        tokens=(1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048, 4096, 8192), between=(3, 48, 384, 3072),
        moved_blocks=(1, 4, 16, 64, 256), moved_block_sizes=(16, 64), moved_layers=(2, 8, 32), passes=1,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of one term: how a reader names it, its amounts, whether the fit may see it, and its calls."""

    term: str
    name: str
    amounts: dict[str, float]
    held_back: bool
    calls: Callable[[], list[Call]]

    def observed(self, seconds: float) -> Observation:
        """The case with what it took."""
        return Observation(self.amounts, seconds)


def cases(grid: Grid, bench: Bench) -> Iterator[Case]:
    """All cases of a grid by term; which of them are held back is the same in every calibration."""
    made = [*_decode(grid, bench), *_prefill(grid, bench), *_moves(grid, bench)]
    for term in ("decode", "prefill", *MOVES):
        mine = [case for case in made if case.term == term]
        drawn = random.Random(f"{SEED} {term}").sample(range(len(mine)), int(HELD_BACK * len(mine)))
        for number, case in enumerate(mine):
            yield replace(case, held_back=number in drawn)
    yield from _dense(grid, bench)


def _decode(grid: Grid, bench: Bench) -> Iterator[Case]:
    for shape, batch, context, block_size in product(
        grid.heads, grid.batches, grid.contexts, grid.block_sizes
    ):
        heads, seq_lens = Heads(*shape), ragged(batch, context)
        kv_bytes = sum(seq_lens) * heads.kv_values * bench.dtype.itemsize
        blocks = sum(-(-length // block_size) for length in seq_lens)
        if blocks * block_size * heads.kv_values * bench.dtype.itemsize <= grid.max_kv_bytes:
            yield Case(
                "decode",
                f"batch {batch}, context {context}, block {block_size}, heads {heads}",
                DecodeCost.amounts(batch, blocks, kv_bytes, sum(seq_lens) * heads.pair_flops),
                False,
                lambda s=seq_lens, b=block_size, h=heads: bench.attention(s, b, h),  # type: ignore[misc]
            )


def _prefill(grid: Grid, bench: Bench) -> Iterator[Case]:
    block_size = 16
    for shape, prompts, tokens, context in product(
        grid.heads, grid.prompts, grid.prompt_tokens, grid.prompt_contexts
    ):
        heads, size = Heads(*shape), bench.dtype.itemsize
        pairs = prompts * (tokens * context + tokens * (tokens + 1) // 2)
        kv_bytes = prompts * (context + tokens) * heads.kv_values * size
        query_bytes = 2 * prompts * tokens * heads.num_heads * heads.head_dim * size
        fits = kv_bytes <= grid.max_kv_bytes and query_bytes <= grid.max_kv_bytes
        if fits and pairs * heads.pair_flops <= grid.max_prefill_flops:
            seq_lens, query_lens = [context + tokens] * prompts, [tokens] * prompts
            yield Case(
                "prefill",
                f"{prompts} x {tokens} tokens after {context}, block {block_size}, heads {heads}",
                PrefillCost.amounts(prompts, query_bytes, kv_bytes, pairs * heads.pair_flops),
                False,
                lambda s=seq_lens, h=heads, q=query_lens: bench.attention(s, block_size, h, q),  # type: ignore[misc]
            )


def _dense(grid: Grid, bench: Bench) -> Iterator[Case]:
    """The held-back ones are the token counts between, and one of the sizes at some of the others."""
    for index, hidden_size in enumerate(grid.hidden_sizes):
        weights = sum(rows * columns for rows, columns in layer_weights(hidden_size))
        for place, tokens in enumerate(sorted({*grid.tokens, *grid.between})):
            yield Case(
                "dense",
                f"{tokens} tokens, hidden size {hidden_size}",
                {"base_us": US, f"{tokens}": S_PER_WEIGHT * weights},
                tokens in grid.between or (place + index) % 4 == 3,
                lambda h=hidden_size, t=tokens: bench.dense(h, t)[0],  # type: ignore[misc]
            )


def _moves(grid: Grid, bench: Bench) -> Iterator[Case]:
    heads = Heads(*grid.heads[0])
    for kind, number, block_size, layers in product(
        MOVES, grid.moved_blocks, grid.moved_block_sizes, grid.moved_layers
    ):
        block_bytes = block_size * heads.kv_values * bench.dtype.itemsize
        if 4 * number * layers * block_bytes <= grid.max_kv_bytes:
            yield Case(
                kind,
                f"{number} blocks of {block_size}, {layers} layers, heads {heads}",
                MoveCost.amounts(layers, number * layers, number * layers * block_bytes),
                False,
                lambda k=kind, n=number, b=block_size, la=layers: bench.moves(k, n, b, heads, la),  # type: ignore[misc]
            )
