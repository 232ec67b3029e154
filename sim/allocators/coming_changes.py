"""What is to come to the blocks of all counted groups of beams, by tick."""

from __future__ import annotations

import numpy as np

from sim.genealogy import LEFT, NUM_CHANGES, TAKEN, Ints


class ComingChanges:
    """Sums of the changes of groups (`sim/genealogy.py`) in a ring of ticks, longer than any sequence."""

    __slots__ = ("_mask", "_rows")

    def __init__(self, longest: int) -> None:
        self._mask = (1 << longest.bit_length()) - 1
        self._rows = np.zeros((self._mask + 1, NUM_CHANGES), np.int64)

    def __getitem__(self, tick: int) -> Ints:
        """The changes at a tick, to be written into as well."""
        row: Ints = self._rows[tick & self._mask]
        return row

    def add(self, found: Ints, tick: int) -> None:
        """Add changes from a tick on; negative ones are taken out."""
        begin = tick & self._mask
        split = self._mask + 1 - begin
        self._rows[begin : begin + len(found)] += found[:split]
        if split < len(found):
            self._rows[: len(found) - split] += found[split:]

    def ahead(self, tick: int, ticks: int) -> Ints:
        """The changes at a tick and at so many after it."""
        begin = tick & self._mask
        if begin + ticks <= self._mask:
            return self._rows[begin : begin + ticks + 1].copy()
        rows: Ints = self._rows[np.arange(tick, tick + ticks + 1) & self._mask]
        return rows

    def quiet_for(self, tick: int, limit: int) -> int:
        """Ticks after this one, at most so many, before which nothing turns over and in which nothing grows."""
        if self[tick][LEFT]:
            return 0
        limit = min(limit, self._mask)
        rows = self.ahead(tick, limit)
        busy = rows[1:, TAKEN] > 0
        busy[1:] |= rows[1:-1, LEFT] > 0
        return int(busy.argmax()) if busy.any() else limit

    def bounded(self, tick: int, limit: int, free: int) -> int:
        """Ticks after this one, at most so many, in which growths never take more than the blocks that are free."""
        limit = min(limit, self._mask)
        if limit < 1:
            return 0
        rows = self.ahead(tick, limit)
        short = free + rows[:-1, LEFT].cumsum() < rows[1:, TAKEN].cumsum()
        return int(short.argmax()) if short.any() else limit
