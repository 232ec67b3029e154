"""What allocators of equal blocks share: growth by a block at a time, and the slots of a block table."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import Allocator
from sim.pools.block_pool import BlockPool
from sim.pools.page_pool import PagePool
from sim.request import Sequence


def grow_by_block(
    owner: Allocator, pool: BlockPool, batches: Collection[tuple[int, list[Sequence]]]
) -> list[tuple[int, int, int]]:
    """`Allocator.grow` with one more block of the pool for each sequence of each batch."""
    size = owner.block_size
    held, internal = owner.num_held, owner.num_internal
    needed = 0
    for _, sequences in batches:
        needed += len(sequences)
    blocks = iter(pool.take(needed))
    books = []
    for tick, sequences in batches:
        held += len(sequences) * size
        done = []
        for sequence, block in zip(sequences, blocks, strict=False):  # `blocks` serves all batches
            sequence.block_table.append(block)
            sequence.capacity = capacity = sequence.capacity + size
            if capacity >= sequence.final_tokens:
                internal += capacity - sequence.final_tokens
                done.append(sequence)
        for sequence in done:
            sequences.remove(sequence)
        books.append((tick, held, internal))
    owner.num_held, owner.num_internal = held, internal
    return books


def count_growth(
    owner: Allocator, pool: PagePool, batches: Collection[tuple[int, list[Sequence]]]
) -> list[tuple[int, int, int]]:
    """`grow_by_block` that takes blocks on account and leaves the tables as they are."""
    size = owner.block_size
    held, internal = owner.num_held, owner.num_internal
    pool.owe(sum([len(sequences) for _, sequences in batches]))
    books = []
    for tick, sequences in batches:
        held += len(sequences) * size
        done = []
        for sequence in sequences:
            sequence.capacity = capacity = sequence.capacity + size
            if capacity >= sequence.final_tokens:
                internal += capacity - sequence.final_tokens
                done.append(sequence)
        for sequence in done:
            sequences.remove(sequence)
        books.append((tick, held, internal))
    owner.num_held, owner.num_internal = held, internal
    return books


def in_common(sequences: list[Sequence], full: int) -> list[tuple[Sequence, int] | None]:
    """Of each branch one before it that has the same leading blocks, of `full` ones, and how many; None without any.

    What branches share, they share from the first block on.
    """
    owners: dict[int, Sequence] = {}
    found: list[tuple[Sequence, int] | None] = []
    for sequence in sequences:
        table, shared = sequence.block_table[:full], None
        blocks = 0
        for block in table:
            owner = owners.get(block)
            if owner is None:
                break
            blocks += 1
            shared = owner, blocks
        owners |= dict.fromkeys(table[blocks:], sequence)
        found.append(shared)
    return found


def block_slots(table: list[int], block_size: int, num_tokens: int) -> NDArray[np.int64]:
    """Block table times block size plus offset, shape [num_tokens]."""
    blocks = np.asarray(table, dtype=np.int64)
    slots = blocks[:, None] * block_size + np.arange(block_size)
    return slots.reshape(-1)[:num_tokens]
