"""Keys of blocks by what is in them: equal keys mean equal tokens from the very first on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Ordered
from functools import lru_cache
from itertools import chain, repeat
from typing import Any

import numpy as np

from sim.identity import mixed, mixed_words
from sim.request import Request, Sequence

_CONTENT = 0xD6E8FEB86659FD93
_INSIDE = 0xA0761D6478BD642F
_TAIL = 0x8EBC6AF09C88C6E3
_MASK = (1 << 64) - 1
_FEW = 12
"""Keys that are not worth the way through numpy."""


def prefix_keys(request: Request, num_blocks: int, block_size: int, first: int = 0) -> Ordered[int]:
    """The keys of a request's first blocks, all of them full, from the block `first` on.

    A block that ends inside named content has a key of 64 bits, chained along the names, where their runs begin and
    where the block ends, as the identities of tokens are. Generated tokens have a name if the request says so and
    all of its prompt has. Names of a grain are those of a trace: where blocks are smaller than `content_grain`, a
    name h becomes (h, j), and a block is found only if the whole name agrees, so hits are a lower bound there. All
    other blocks, with content of the request's own, have a key that only this request asks for.
    """
    if not request.content:
        return own_keys(request, first, num_blocks)
    if request.content_ends:
        keys = _keys_of_runs(request, num_blocks, block_size, first)
    else:
        keys = _keys_of_grains(request, num_blocks, block_size, first)
    return [*keys, *own_keys(request, first + len(keys), num_blocks)]


def sequence_keys(sequence: Sequence, num_blocks: int, block_size: int, first: int = 0) -> Ordered[int]:
    """`prefix_keys` for any branch: blocks from before a fork have the same keys for all who come from it.

    What is named of the output is what branch 0 generates; another branch has keys of its own from its fork on.
    """
    request, link, stop = sequence.request, sequence.lineage, num_blocks
    parts: list[Ordered[int]] = []
    while link is not None and stop > first:  # from the last fork back
        begin = max(first, link.start // block_size)
        if link.branch and begin < stop:
            parts.append(own_keys(request, begin, stop, link.branch))
            stop = begin
        link = link.parent
    if not parts:
        return prefix_keys(request, num_blocks, block_size, first)
    if stop > first:
        parts.append(prefix_keys(request, stop, block_size, first))
    return parts[0] if len(parts) == 1 else [*chain.from_iterable(reversed(parts))]


def _keys_of_runs(request: Request, num_blocks: int, block_size: int, first: int) -> list[int]:
    """Keys of blocks that end inside named runs of any length."""
    if request.content_chains is None:
        request.content_chains = _chained_runs(request)
    ends, chained = request.content_chains
    block = first
    chains: list[int] = []
    counts: list[int] = []
    for run in range(bisect_left(ends, (first + 1) * block_size), len(ends)):
        stop = min(ends[run] // block_size, num_blocks)
        if stop > block:
            chains.append(chained[run])
            counts.append(stop - block)
            block = stop
        if stop == num_blocks:
            break
    if block - first <= _FEW:
        return [
            mixed(names + last * _INSIDE & _MASK)
            for names, last in zip(
                chain.from_iterable(map(repeat, chains, counts)),
                range((first + 1) * block_size - 1, block * block_size, block_size),
                strict=True,
            )
        ]
    keys = np.arange((first + 1) * block_size - 1, block * block_size, block_size, dtype=np.uint64)
    keys *= np.uint64(_INSIDE)
    keys += np.repeat(np.array(chains, np.uint64), counts)
    whole: list[int] = mixed_words(keys).tolist()
    return whole


def _chained_runs(request: Request) -> tuple[Ordered[int], list[int]]:
    """Where the named runs of a request end, and the chain of names up to each; that of its output has no end."""
    content, ends = request.content, request.content_ends
    assert content is not None
    if request.output_content is not None and ends[-1] == request.prompt_tokens:
        content = (*content, request.output_content)
        ends = (*ends, 1 << 62)
    chain = start = 0
    chains = []
    for name, end in zip(content, ends, strict=True):
        chain = chain + mixed(mixed(name & _MASK) + (start + 1) * _CONTENT & _MASK) & _MASK
        chains.append(chain)
        start = end
    return ends, chains


def _keys_of_grains(request: Request, num_blocks: int, block_size: int, first: int) -> list[int]:
    """Keys of blocks that end inside names of `content_grain` tokens each."""
    content, grain = request.content, request.content_grain
    assert content is not None
    covered = len(content) * grain
    if grain > 1:  # the last name may go on behind the prompt, what is generated there is another's
        covered = min(covered, request.prompt_tokens)
    named = min(num_blocks, covered // block_size)
    if named <= first:
        return []
    last = np.arange((first + 1) * block_size - 1, named * block_size, block_size)
    at = last // grain
    words = mixed_words(np.array(content[: int(at[-1]) + 1]).astype(np.uint64))
    words += np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(_CONTENT)
    keys = mixed_words(words).cumsum()[at]
    if block_size % grain:
        keys = mixed_words(keys + (last % grain).astype(np.uint64) * np.uint64(_INSIDE))
    whole: list[int] = keys.tolist()
    return whole


def own_keys(request: Request, first: int, stop: int, branch: int = 0) -> range:
    """Keys of blocks that nobody else has: negative, so that they are none of named content."""
    base = own_key(request, 0)
    if branch:  # far below those of all branches 0
        base -= _branch_offset(request.id, branch)
    return range(base + first, base + stop)


@lru_cache(maxsize=1024)
def _branch_offset(request: int, branch: int) -> int:
    return mixed(mixed(request) + branch & _MASK) + 1 << 64


def tail_key(request: Request, num_tokens: int) -> int | None:
    """The key of all of a request's first tokens, where they end inside named content.

    It is none that a full block has: a block that is filled in part is known with the number of its tokens.
    """
    (key,) = prefix_keys(request, 1, num_tokens)
    return None if key < 0 else mixed(key + _TAIL & _MASK)


def own_key(request: Request, index: int) -> int:
    """Key of one such block."""
    return index - (request.id + 1 << 32)


def owner(key: int) -> int:
    """A number that such keys of one branch have in common, and no others."""
    return key >> 32


def stretch(keys: Ordered[Any]) -> Ordered[Any]:
    """Keys of blocks one after the other; as a range, where all are such keys of one branch."""
    if isinstance(keys, range):
        return keys
    first, last = keys[0], keys[-1]
    if isinstance(first, int) and first < 0 and isinstance(last, int) and last - first == len(keys) - 1:
        return range(first, last + 1)
    return keys
