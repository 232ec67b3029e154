"""A tier: one memory of KV slots, as the ledger keeps it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.identity import UNWRITTEN, Ints
from sim.pools.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class Journey:
    """A block that went through tiers: where it was, (tier, block) in order, and what is in it, [block_size] each.

    `row` has the identities, `quantized` which of them have lost precision.
    """

    row: Ints
    quantized: NDArray[np.bool_]
    places: tuple[tuple[str, int], ...]


NOWHERE = Journey(np.empty(0, np.int64), np.empty(0, np.bool_), ())
"""In the place of a journey: nothing was ever written there."""


class Tier:
    """What every slot of a memory holds, as the identity of the last write.

    `slots` [num_slots] and `rows` [num_blocks, block_size] are views of the same identities; `quantized`, of the
    same shape as `rows`, says what has lost precision. The pool flags in
    `fresh` what it hands out; those blocks become UNWRITTEN together.
    """

    __slots__ = ("_flags", "block_size", "fresh", "name", "pool", "quantized", "rows", "slots")

    def __init__(self, name: str, num_blocks: int, block_size: int, pool: BlockPool | None = None) -> None:
        self.name = name
        self.block_size = block_size
        self.pool = pool
        self.slots: Ints = np.full(num_blocks * block_size, UNWRITTEN, np.int64)
        self.rows = self.slots.reshape(num_blocks, block_size)
        self.quantized = np.zeros((num_blocks, block_size), np.bool_)
        self.fresh = bytearray(num_blocks)
        self._flags = np.frombuffer(self.fresh, np.bool_)
        if pool is not None:
            pool.fresh = self.fresh

    def reset(self) -> None:
        """Forget what fresh blocks held; to be called before anything is read or written."""
        fresh = np.flatnonzero(self._flags)
        if len(fresh):
            self.rows[fresh] = UNWRITTEN
            self.quantized[fresh] = False
            self._flags[fresh] = False

    def held(self) -> NDArray[np.bool_]:
        """Whether somebody holds each block, shape [num_blocks]; without a pool nobody says so of any."""
        if self.pool is None:
            return np.zeros(len(self.rows), np.bool_)
        return np.fromiter(self.pool.references, np.int64, len(self.rows)) > 0

    def complaint(self) -> str:
        """What is wrong with the pool's own lists, empty if nothing is."""
        if self.pool is None:
            return ""
        unheld, free = self.pool.references.count(0), self.pool.num_free
        if unheld != free:
            return f"{self.name} pool: blocks without references({unheld}) != free({free})"
        return ""
