"""A tour of the core in figures: block tables as sequences fork and part, decoding with sharing, errors.

Everything is computed when asked for, on the CPU, and comes as plain data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from attention.cache import BlockAllocator, PagedKVCache
from attention.functional import paged_attention, write
from attention.generation.agreement import Difference, compare
from attention.generation.beam_search import BeamSearch
from attention.generation.decoding import Sharing, decode
from attention.generation.sampling import Greedy, Sampling
from attention.generation.search import DecodingRequest, Method
from attention.generation.transformer import Transformer, TransformerConfig
from attention.plain import plain_attention

VOCAB_SIZE, EOS = 256, 7
METHODS: dict[str, Method] = {
    "greedy": Greedy(),
    "4 samples": Sampling(4, seed=1),
    "beam search, 4": BeamSearch(4),
}
LENGTHS = (40, 64, 91)
"""Tokens of the prompts; the second fills its blocks exactly."""


@dataclass(frozen=True, slots=True)
class Held:
    """A block as a sequence's table has it: its number, tokens of the sequence in it, who else holds it."""

    block: int
    tokens: int
    holders: int


@dataclass(frozen=True, slots=True)
class Picture:
    """Block tables at a moment: a row of blocks for each sequence, by its letter."""

    told: str
    tables: dict[str, list[Held]]
    num_free: int
    copies: int  # on write, to get here


@dataclass(frozen=True, slots=True)
class Generation:
    """A way of decoding over the paged cache, beside the same over a contiguous one.

    `clones` are the tokens that the contiguous cache copied at forks.
    """

    method: str
    dtype: str
    block_size: int
    outputs: int
    tokens: int
    equal: int
    differences: list[Difference]
    unexplained: int
    max_score_error: float
    sharing: Sharing
    clones: int
    blocks_left: int  # still taken when all was done


@dataclass(frozen=True, slots=True)
class AttentionError:
    """Largest difference of paged attention in float32 from the formula in float64, and what is allowed."""

    block_size: int
    num_heads: int
    num_kv_heads: int
    lengths: tuple[int, ...]
    error: float
    bound: float


@contextmanager
def _one_thread() -> Iterator[None]:
    """So little is computed at a time that more threads would only wait for work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fork_story(block_size: int = 4, num_blocks: int = 16) -> list[Picture]:
    """Three samples of one prompt, from its blocks shared by all to branches that part and one that ends."""
    cache = PagedKVCache(block_size, 8, BlockAllocator(num_blocks, block_size, 8), num_kv_heads=1, head_dim=8)
    names: dict[str, int] = {"A": cache.new()}
    pictures: list[Picture] = []

    def picture(told: str, before: dict[str, list[int]]) -> None:
        tables = {name: cache.block_table(seq_id) for name, seq_id in names.items()}
        copies = sum(
            tables[name][place] != block
            for name, blocks in before.items()
            if name in tables
            for place, block in enumerate(blocks)
        )
        rows = {
            name: [
                Held(
                    block,
                    min(block_size, cache.length(names[name]) - place * block_size),
                    cache.allocator.references(block),
                )
                for place, block in enumerate(table)
            ]
            for name, table in tables.items()
        }
        pictures.append(Picture(told, rows, cache.allocator.num_free, copies))

    def grow(count: int) -> dict[str, list[int]]:
        before = {name: cache.block_table(seq_id) for name, seq_id in names.items()}
        cache.extend(list(names.values()), count)
        return before

    prompt = 2 * block_size + block_size // 2
    picture(f"the prompt of {prompt} tokens", grow(prompt))
    names |= {"B": cache.fork(names["A"]), "C": cache.fork(names["A"])}
    picture("three samples of it: a fork takes no blocks", {})
    picture("a token each: copies, the last holder keeps its block", grow(1))
    picture(f"{block_size - 1} tokens more each", grow(block_size - 1))
    cache.free(names.pop("B"))
    picture("B has ended", {})
    return pictures


def generations(max_tokens: int = 48, block_size: int = 16) -> list[Generation]:
    """Batches of three prompts: every method in float64, where tokens must be equal, and in float32."""
    with _one_thread():
        return [
            _generation(name, dtype, max_tokens, block_size)
            for dtype in (torch.float64, torch.float32)
            for name in METHODS
        ]


def _generation(name: str, dtype: torch.dtype, max_tokens: int, block_size: int) -> Generation:
    model = Transformer(TransformerConfig(vocab_size=VOCAB_SIZE, dtype=dtype))
    random = torch.Generator().manual_seed(2)
    requests = [
        DecodingRequest(
            torch.randint(VOCAB_SIZE, (length,), generator=random).tolist(), max_tokens, METHODS[name], EOS,
            request_id=number,
        )
        for number, length in enumerate(LENGTHS)
    ]  # fmt: skip
    kv = model.paged_kv(num_blocks=4 * sum(LENGTHS) + 12 * max_tokens, block_size=block_size, impl="torch")
    plain = model.contiguous_kv()
    paged = decode(model, kv, requests, keep_decisions=True)
    contiguous = decode(model, plain, requests, keep_decisions=True)
    found = compare(paged, contiguous)
    pairs = [
        (mine.tokens, theirs.tokens)
        for ours, wanted in zip(paged.outputs, contiguous.outputs, strict=True)
        for mine, theirs in zip(ours, wanted, strict=False)
    ]
    return Generation(
        method=name,
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size,
        outputs=len(pairs),
        tokens=sum(len(mine) for mine, _ in pairs),
        equal=sum(mine == theirs for mine, theirs in pairs),
        differences=found.differences,
        unexplained=len(found.unexplained() if dtype == torch.float32 else found.differences),
        max_score_error=found.max_score_error,
        sharing=paged.sharing,
        clones=contiguous.sharing.copied_tokens,
        blocks_left=kv.cache.allocator.total_blocks - kv.cache.allocator.num_free,
    )


def attention_errors(block_sizes: Sequence[int] = (1, 16, 128), num_heads: int = 8) -> list[AttentionError]:
    """Prompts and decodes in one ragged batch, over permuted blocks whose unused slots are not numbers."""
    with _one_thread():
        return [
            _attention_error(block_size, num_heads, num_kv_heads)
            for block_size in block_sizes
            for num_kv_heads in (num_heads, num_heads // 4)
        ]


def _attention_error(
    block_size: int, num_heads: int, num_kv_heads: int, head_dim: int = 64
) -> AttentionError:
    random = torch.Generator().manual_seed(block_size)
    lengths, queries = (1, 37, 300, 1000), (1, 37, 20, 1)
    needed = [-(-length // block_size) for length in lengths]
    order = torch.randperm(2 * sum(needed), generator=random)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int64)
    shape = (2 * sum(needed), block_size, num_kv_heads, head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    q = torch.randn(sum(queries), num_heads, head_dim, generator=random)
    starts = torch.tensor([0, *queries]).cumsum(0)
    wanted = []
    for row, length in enumerate(lengths):
        blocks, order = order[: needed[row]], order[needed[row] :]
        tables[row, : needed[row]] = blocks
        places = torch.arange(length)
        k, v = torch.randn(2, length, num_kv_heads, head_dim, generator=random)
        write(k, v, k_cache, v_cache, blocks[places // block_size] * block_size + places % block_size)
        mine = q[starts[row] : starts[row + 1]]
        wanted.append(plain_attention(mine.double(), k.double(), v.double(), head_dim**-0.5)[0])
    expected = torch.cat(wanted)
    got = paged_attention(
        q, k_cache, v_cache, tables, torch.tensor(lengths), query_start_loc=starts, impl="torch"
    )
    return AttentionError(
        block_size, num_heads, num_kv_heads, lengths,
        error=float((got - expected).abs().max()),
        bound=1e-5 * max(1.0, float(expected.abs().max())),
    )  # fmt: skip
