"""A layout: where the tokens of some sequences are, as an allocator says."""

from __future__ import annotations

from itertools import chain

import numpy as np

from sim.identity import Ints
from sim.request import Sequence
from sim.tiers.tier import Tier


class Layout:
    """Slot of every token of some sequences, one sequence after the other, in order of position.

    `slots` has what the allocator's `slots` gave for each sequence; without it the block tables alone say.
    """

    def __init__(self, sequences: list[Sequence], slots: list[Ints] | None = None) -> None:
        self.sequences = sequences
        self.lengths = [sequence.num_tokens for sequence in sequences]
        self._given = slots
        long = np.array(self.lengths)
        self.ends: Ints = np.cumsum(long)
        self.positions: Ints = np.arange(long.sum()) - np.repeat(self.ends - long, long)

    def complaint(self, tier: Tier, tabled: bool) -> str:
        """What is wrong with the layout, empty if nothing is; after that, `slots` are in range."""
        by_table = None
        if tabled and all(sequence.block_table for sequence in self.sequences):
            size = tier.block_size
            for sequence, length in zip(self.sequences, self.lengths, strict=True):
                if len(sequence.block_table) * size < length:
                    return f"{sequence} has {length} tokens, and {len(sequence.block_table)} blocks of {size} slots"
            by_table = self._by_table(size)
        if self._given is None:
            assert by_table is not None
            self.slots = by_table
        else:
            for sequence, length, slots in zip(self.sequences, self.lengths, self._given, strict=True):
                if len(slots) != length:
                    return f"{sequence} has {length} tokens, and slots for {len(slots)}"
            self.slots = np.concatenate(self._given)
        outside = np.flatnonzero((self.slots < 0) | (self.slots >= len(tier.slots)))
        if len(outside):
            return f"{self.told(int(outside[0]), tier.name)} is outside the {len(tier.slots)} slots"
        if self._given is not None and by_table is not None:
            differing = np.flatnonzero(self.slots != by_table)
            if len(differing):
                at = int(differing[0])
                block, offset = divmod(int(by_table[at]), tier.block_size)
                return (
                    f"{self.told(at, tier.name)}: expected slot {by_table[at]}, "
                    f"offset {offset} of block {block} in its block table"
                )
        return ""

    def _by_table(self, size: int) -> Ints:
        """Block table times block size plus offset."""
        tables = [sequence.block_table for sequence in self.sequences]
        blocks = np.fromiter(chain.from_iterable(tables), np.int64)
        lengths = np.array([len(table) for table in tables])
        first = np.repeat(np.cumsum(lengths) - lengths, self.lengths)
        index = self.positions // size
        return (blocks[first + index] - index) * size + self.positions

    def told(self, at: int, tier: str = "device") -> str:
        """Which token stands at an index, and in which slot."""
        sequence = self.sequences[int(np.searchsorted(self.ends, at, side="right"))]
        return f"{sequence}, token {self.positions[at]}, {tier} slot {self.slots[at]}"
