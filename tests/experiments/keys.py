"""Keys of blocks by the tokens in them, for the plain replays of recordings."""

from __future__ import annotations

from collections.abc import Sequence


def block_keys(tokens: Sequence[int], block_size: int, known: Sequence[int] = ()) -> list[int]:
    """A key for each full block, chained along the tokens; `known` are those of the first blocks."""
    keys = list(known)
    key = keys[-1] if keys else 0
    for end in range((len(keys) + 1) * block_size, len(tokens) + 1, block_size):
        key = hash((key, *tokens[end - block_size : end]))
        keys.append(key)
    return keys
