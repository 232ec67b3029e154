"""What a timing model is: seconds for a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from sim.registry import Registry
from sim.step import Step
from sim.units import FOREVER

timing: Registry[type[StepTime]] = Registry("timing")


class StepTime(ABC):
    """Seconds that the device takes for a step's computation, moves of blocks aside.

    Only + - * /, min, max and table look-ups are used, so that a step costs the same to the bit wherever and
    however it is computed. Its first parameters are the model and the device, or None where the experiment
    names none; the keyword-only ones are its YAML fields.
    """

    context_free: ClassVar[bool] = False
    """True if a decode step's time depends on the number of sequences only."""
    num_slots: int = FOREVER
    """KV slots of the device; the engine says it before the first step."""
    num_entries: int | None = None
    """Entries of all block tables, where blocks differ in size; the engine says it before each step."""
    counts_entries: ClassVar[bool] = False
    """Whether a step's time depends on them."""

    @abstractmethod
    def seconds(self, step: Step) -> float:
        """Seconds of any step."""

    @abstractmethod
    def decode_seconds(self, num_decodes: int, context: int) -> float:
        """Seconds of a step that only decodes: `num_decodes` sequences over `context` tokens in all."""

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(dotted path, complaint) for options of a whole experiment that contradict each other."""
        return ()
