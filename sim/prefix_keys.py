"""Keys of blocks by what is in them: equal keys mean equal tokens from the very first on."""

from __future__ import annotations

import numpy as np

from sim.identity import Words, mixed_words
from sim.request import Request

_CONTENT = np.uint64(0xD6E8FEB86659FD93)
_INSIDE = np.uint64(0xA0761D6478BD642F)


def prefix_keys(request: Request, num_blocks: int, block_size: int) -> list[int]:
    """The keys of a request's first blocks, all of them full.

    A block that ends inside named content has a key of 64 bits, chained along the names, where their runs begin and
    where the block ends, as the identities of tokens are. Generated tokens have a name if the request says so and
    all of its prompt has. With runs of `content_grain` tokens and smaller blocks, a name h becomes (h, j): names of
    a grain are those of a trace, where unequal names may begin with equal tokens, so hits are a lower bound there.
    All other blocks, with content of the request's own, have a key that only this request asks for.
    """
    content, grain = request.content, request.content_grain
    if not content:
        return own_keys(request, 0, num_blocks)
    if request.content_ends:
        ends = request.content_ends
        covered = ends[-1]
        if covered == request.prompt_tokens and request.output_content is not None:
            content = (*content, request.output_content)
            covered = num_blocks * block_size
    else:
        covered = min(len(content) * grain, request.prompt_tokens)
    named = min(num_blocks, covered // block_size)
    last = np.arange(block_size - 1, named * block_size, block_size)
    if request.content_ends:
        at = np.searchsorted(ends, last, side="right")
        starts = np.array((0, *ends), np.uint64)[: len(content)]
    else:
        at = last // grain
        content = content[: int(at[-1]) + 1 if named else 0]
        starts = np.arange(len(content), dtype=np.uint64)
    keys = _chained(np.array(content).astype(np.uint64), starts)[at]
    if not grain or block_size % grain:
        inside = last % grain if grain else last
        keys = mixed_words(keys + inside.astype(np.uint64) * _INSIDE)
    return [*keys.tolist(), *own_keys(request, named, num_blocks)]


def _chained(names: Words, starts: Words) -> Words:
    """For each name a word for all names up to it and where their runs begin."""
    words = mixed_words(names)
    words += (starts + np.uint64(1)) * _CONTENT
    return mixed_words(words).cumsum()


def own_keys(request: Request, first: int, stop: int) -> list[int]:
    """Keys of blocks that nobody else has: negative, so that they are none of named content."""
    base = -(request.id + 1 << 32)
    return list(range(base + first, base + stop))
