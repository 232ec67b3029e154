"""Keys of blocks by what is in them: equal keys mean equal tokens from the very first on."""

from __future__ import annotations

import numpy as np

from sim.identity import mixed_words
from sim.request import Request

_CONTENT = np.uint64(0xD6E8FEB86659FD93)
_INSIDE = np.uint64(0xA0761D6478BD642F)


def prefix_keys(request: Request, num_blocks: int, block_size: int) -> list[int]:
    """The keys of a request's first blocks, all of them full.

    A block that ends inside the named content of the prompt has a key of 64 bits, chained along the names as
    the identities of tokens are. Where blocks are smaller than `content_grain`, a name h becomes (h, j): a
    block is found only if the whole name agrees, so hits are a lower bound there. All other blocks, with
    content of the request's own or generated tokens, have a key that only this request asks for.
    """
    if not request.content:
        return own_keys(request, 0, num_blocks)
    grain = request.content_grain
    covered = min(len(request.content) * grain, request.prompt_tokens)
    named = min(num_blocks, covered // block_size)
    ends = np.arange(block_size - 1, named * block_size, block_size)
    at = ends // grain
    words = np.array(request.content[: int(at[-1]) + 1 if named else 0]).astype(np.uint64)
    words = mixed_words(words)
    words += np.arange(1, len(words) + 1, dtype=np.uint64) * _CONTENT
    keys = mixed_words(words).cumsum()[at]
    if block_size % grain:
        keys = mixed_words(keys + (ends % grain).astype(np.uint64) * _INSIDE)
    return [*keys.tolist(), *own_keys(request, named, num_blocks)]


def own_keys(request: Request, first: int, stop: int) -> list[int]:
    """Keys of blocks that nobody else has: negative, so that they are none of named content."""
    base = own_key(request, 0)
    return list(range(base + first, base + stop))


def own_key(request: Request, index: int) -> int:
    """Key of one such block."""
    return index - (request.id + 1 << 32)
