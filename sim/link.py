"""Links to the host and to tiers: copies in each direction one after the other, beside the computation."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from sim.timing.transfers import Transfers


class Copies(Protocol):
    """What says how long copies over a link take."""

    def swap_seconds(self, out_blocks: int, in_blocks: int) -> float:
        """Seconds to move so many blocks away from the device in one go, and so many back."""


C = TypeVar("C", bound=Copies)


class Link(Generic[C]):
    """First in, first out in each direction, so that the end of a copy is known when it is submitted (ns).

    It does what a `simpy.Resource` of capacity one per direction would, without an event for each copy. `now` is
    the instant of the plan that submits, `awaited` the end of the last copy that the planned step has to wait for,
    `busy_time` all copies together; `out_free_at` and `in_free_at` say when a direction has nothing left to do.
    """

    __slots__ = ("awaited", "busy_time", "in_free_at", "now", "out_free_at", "transfers")

    def __init__(self, transfers: C) -> None:
        self.transfers = transfers
        self.now = 0
        self.awaited = 0
        self.out_free_at = 0
        self.in_free_at = 0
        self.busy_time = 0

    def submit_out(self, blocks: int) -> list[int]:
        """Copy blocks to the host behind all that go there; the end of each block's copy."""
        start = max(self.now, self.out_free_at)
        seconds = self.transfers.swap_seconds
        ends = [start + round(seconds(block, 0) * 1e9) for block in range(1, blocks + 1)]
        if ends:
            self.out_free_at = ends[-1]
            self.busy_time += ends[-1] - start
        return ends

    def copy_out(self, blocks: int, after: int = 0, further: float = 0.0) -> int:
        """Copy blocks away in one go, not before `after`, and in so many `further` seconds; the end of the copy."""
        start = max(self.now, self.out_free_at, after)
        duration = round((self.transfers.swap_seconds(blocks, 0) + further) * 1e9)
        self.out_free_at = start + duration
        self.busy_time += duration
        return self.out_free_at

    def submit_in(self, blocks: int, after: int = 0, further: float = 0.0) -> int:
        """Copy blocks back, not before they have all arrived on the host (`after`); the end of the copy.

        It takes so many `further` seconds.
        """
        start = max(self.now, self.in_free_at, after)
        duration = round((self.transfers.swap_seconds(0, blocks) + further) * 1e9)
        self.in_free_at = start + duration
        self.busy_time += duration
        return self.in_free_at

    def queue_seconds(self) -> float:
        """How long copies submitted now would wait for others, both directions together."""
        return (max(0, self.out_free_at - self.now) + max(0, self.in_free_at - self.now)) / 1e9

    def stall(self: Link[Transfers], start: int, duration: int) -> int:
        """What a step that computes for `duration` and could begin at `start` waits for its copies (ns).

        Layer by layer a step computes what is there while the rest arrives: only what exceeds the computation of
        all layers but the last is waited for.
        """
        layers = self.transfers.overlapping_layers
        return max(0, self.awaited - start - duration * (layers - 1) // layers)
