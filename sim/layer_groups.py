"""Layer groups: layers whose K and V, or states, stand in one block table, and the pages that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sim.errors import UserError


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers of a model that keep the same: K and V of every token, of a window of them, or a state.

    `token_bytes` is what a token leaves in one of the layers, 0 where each keeps a state of `state_bytes`
    whatever the length (Mamba). A token attends to `window` tokens, itself included; None is all before it.
    """

    count: int
    token_bytes: float = 0
    window: int | None = None
    state_bytes: float = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a block table; a page of it holds a block of tokens, or one state.

    In slots: what a token, or a state, takes of a page, and the page, which may be larger.
    """

    window: int | None
    token_slots: int
    state_slots: int
    page_slots: int


@dataclass(frozen=True, slots=True)
class Pages:
    """The groups of a model, the tokens of a block, and the bytes of a slot; 0 bytes where nothing says them."""

    groups: tuple[Group, ...]
    block_size: int
    slot_bytes: int = 0


def windowed_pages(windows: Sequence[int | None], block_size: int) -> Pages:
    """A group for each window, all of as many layers: a slot is a token in one group."""
    return Pages(tuple(Group(window, 1, 0, block_size) for window in windows), block_size)


def unified_pages(kinds: Sequence[LayerKind], block_size: int) -> Pages:
    """Groups whose pages have one size, as vLLM's main makes them (`kv_cache_utils.py`, remembered).

    A group has as many layers as the rarest kind, or as the most frequent if that is less than a quarter
    more; where a kind does not come out even, its groups leave part of their pages empty. A block is
    lengthened by multiples of 16 tokens until a layer's state fits into its page, which is padded.
    """
    tokens = [kind for kind in kinds if kind.token_bytes]
    if not tokens:
        raise UserError("a model whose layers all keep states leaves nothing to page")
    if len({kind.token_bytes for kind in tokens}) > 1:
        raise UserError("pages of one size need layers with equal K and V a token")
    token_bytes = tokens[0].token_bytes
    state = max(kind.state_bytes for kind in kinds)
    if state > block_size * token_bytes:
        block_size = 16 * math.ceil(state / (16 * token_bytes))
    fewest, most = min(kind.count for kind in kinds), max(kind.count for kind in kinds)
    size = most if most < 1.25 * fewest else fewest
    slot = _common(kinds)
    page = round(size * block_size * token_bytes) // slot
    groups = []
    for kind in kinds:
        number = -(-kind.count // size)
        for index in range(number):
            layers = kind.count // number + (index < kind.count % number)
            groups.append(_group(kind, layers, slot, page))
    return Pages(tuple(groups), block_size, slot)


def own_pages(kinds: Sequence[LayerKind], block_size: int) -> Pages:
    """One group for each kind, its pages as large as its own blocks, or its states (Jenga)."""
    slot = _common(kinds)
    groups = []
    for kind in kinds:
        kept = kind.state_bytes or block_size * kind.token_bytes
        groups.append(_group(kind, kind.count, slot, round(kind.count * kept) // slot))
    return Pages(tuple(groups), block_size, slot)


def _group(kind: LayerKind, layers: int, slot: int, page: int) -> Group:
    return Group(
        kind.window,
        round(layers * kind.token_bytes) // slot,
        round(layers * kind.state_bytes) // slot,
        page,
    )


def _common(kinds: Sequence[LayerKind]) -> int:
    """Bytes of a slot: the largest number that what any layer keeps is a multiple of."""
    sizes = [size for kind in kinds for size in (kind.token_bytes, kind.state_bytes)]
    if any(size != round(size) for size in sizes):
        raise UserError("layers of several kinds need whole bytes a token and layer")
    return math.gcd(*map(round, sizes))
