"""Places in tiers: where runs of blocks are, and what goes farther for those that come."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Ordered

from sim.errors import IntegrityError
from sim.tiers.run_index import RunIndex
from sim.tiers.storage_tier import Run, StorageTier
from sim.tiers.traffic import TierTraffic
from sim.witness import Witness


class TierPlaces:
    """Tiers from near to far with the runs in them, each block in one; a run that is found in parts is parted."""

    def __init__(self, tiers: Ordered[StorageTier]) -> None:
        self.tiers = list(tiers)
        self.traffic = TierTraffic(self.tiers)
        self.index = RunIndex()
        self.probe: Witness | None = None
        self.dropped_blocks = 0

    def _parted(self, keys: Ordered[Hashable]) -> list[Run]:
        """The runs that hold these keys, parted from what else was with them."""
        runs = []
        for run, first, count in self.index.pieces(keys):  # which looks at the next ones as they are then
            tier = run.tier
            assert tier is not None
            if first + count < len(run.keys):
                self.index.name(tier.part(run, first + count))
            runs.append(self.index.name(tier.part(run, first)) if first else run)
        return runs

    def _place(
        self, run: Run, place: int, source: str, blocks: Ordered[int], *, written: bool = True
    ) -> None:
        """Give a run, which is in these blocks of the source, slots in a tier.

        What goes for it goes one tier farther, and so does what the whole tier is too small for.
        """
        if place == len(self.tiers):
            self._drop(run, run.keys)
            return
        tier = self.tiers[place]
        self.index.changes += 1
        count = len(run.keys)
        rest = None
        if count > tier.num_blocks:
            rest, count = self.index.name(run.part(tier.num_blocks)), tier.num_blocks
        missing = tier.num_used + count - tier.num_blocks
        if missing > 0:
            if place + 1 == len(self.tiers):
                for gone, keys in tier.drop(missing):
                    self._drop(gone, keys)
            else:
                for victim in tier.evict(missing):
                    if self.index.get(victim.keys[0]) is not victim:  # a part of a run
                        self.index.name(victim)
                    self._place(victim, place + 1, tier.name, victim.slots.copy())
        tier.add(run)
        others = blocks[count:]
        if (
            others
        ):  # of what does not fit, or of what left a run that is moved for one that was moved before it
            blocks = blocks[:count]
        if self.probe is not None:
            self._tell(source, blocks, tier.name, run.slots)
        if written:
            lifted = source == "lifted"
            self.traffic.write(tier, run, blocks if lifted or source == "device" else None, lifted=lifted)
        if rest is not None:
            self._place(rest, place + 1, source, others)

    def _drop(self, run: Run, keys: Ordered[Hashable]) -> None:
        """These blocks of a run are in no tier any more."""
        self.dropped_blocks += len(keys)
        self.index.drop(run, keys)

    def _tell(self, source: str, blocks: Ordered[int], tier: str, slots: Ordered[int]) -> None:
        """Tell the probe of copies, block by block, the last first."""
        if self.probe is not None:
            for block, slot in zip(reversed(blocks), reversed(slots), strict=True):
                self.probe.transfer(source, block, tier, slot)

    def check_integrity(self) -> None:
        """Recount the tiers. Raises IntegrityError with the equation that failed."""
        placed = 0
        for tier in self.tiers:
            tier.check_integrity()
            for run in tier.runs:
                placed += len(run.keys)
                for key in run.keys:
                    if self.index.get(key) is not run:
                        raise IntegrityError(f"{tier.name}: {key!r} is not found where it is")
        if placed != len(self.index):
            raise IntegrityError(f"blocks to be found({len(self.index)}) != blocks in tiers({placed})")
