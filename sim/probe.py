"""Probes: whoever looks at a run now and then, to prove the block tables right."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Protocol

from sim.allocators.base import Allocator
from sim.request import Sequence


class Probe(Protocol):
    """Looks at a run where it wants to. Everything that it finds wrong is a ProbeError.

    `next_sample` is the index of the next engine step that it wants to see; it may come nearer while a step is
    planned.
    """

    next_sample: int

    def start(self, allocator: Allocator) -> None:
        """A run with this allocator begins; nothing is held."""

    def sample(self, step: int, time: int, sequences: Ordered[Sequence]) -> None:
        """Engine step `step` runs now (ns); these sequences, by arrival, hold slots of the device."""

    def finish(self) -> None:
        """The run is over: nothing is held any more."""
