"""Journeys: what device blocks hold that go through the tiers behind it, and come back."""

from __future__ import annotations

import numpy as np

from sim.errors import ProbeError
from sim.tiers.tier import NOWHERE, Journey, Tier


class Journeys:
    """The part of a ledger that follows blocks from the device into tiers, from tier to tier, and back."""

    device: Tier
    changed: set[int]

    def __init__(self) -> None:
        self.stored: dict[tuple[str, int], Journey] = {}  # in tiers behind the device, by tier and slot
        self.loaded: dict[int, Journey] = {}  # by the device block where it ended
        self._lifted: dict[int, list[Journey]] = {}

    def error(self, what: str) -> ProbeError:
        """An error that says when."""
        raise NotImplementedError

    def arrived(self, block: int) -> None:
        """A block came back from a tier."""

    def lift(self, block: int) -> None:
        """Keep what the block holds."""
        if self.device.fresh[block]:
            self.device.reset()
        device = self.device
        journey = Journey(device.rows[block].copy(), device.quantized[block].copy(), (("device", block),))
        self._lifted.setdefault(block, []).append(journey)

    def transfer(self, source: str, block: int, tier: str, slot: int) -> None:
        """The slot of the one tier holds what the block of the other holds; of what was lifted the last first."""
        device = self.device
        if source == "device":
            self.lift(block)
        if source in ("device", "lifted"):
            journey = self._lifted[block].pop()
        else:
            journey = self.stored.get((source, block), NOWHERE)
            if journey is NOWHERE:
                raise self.error(f"{source} slot {block} is copied to {tier}, and nothing was written there")
        journey = Journey(journey.row, journey.quantized, (*journey.places, (tier, slot)))
        if tier != "device":
            self.stored[tier, slot] = journey
            return
        device.fresh[slot] = 0
        device.rows[slot] = journey.row
        device.quantized[slot] = journey.quantized
        self.changed.add(slot)
        self.loaded[slot] = journey
        self.arrived(slot)

    def journey(self, block: int) -> Journey | None:
        """How what a device block holds came there, if that was through other tiers."""
        journey = self.loaded.get(block)
        if journey is None or not np.array_equal(journey.row, self.device.rows[block]):
            return None  # it was handed out again since
        return journey
