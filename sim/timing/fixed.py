"""Fixed step times."""

from __future__ import annotations

from typing import ClassVar

from sim.hardware import Device, Model
from sim.registry import NonNegativeFloat
from sim.step import Step
from sim.timing.base import StepTime, timing


@timing("fixed")
class Fixed(StepTime):
    """A constant for the prompts of a step plus a constant for its decodes, whatever their number.

    Fields:
        prefill_ms: Time if the step has any prompt token.
        decode_ms: Time if the step has any decode, added to that.
    """

    context_free: ClassVar[bool] = True

    def __init__(
        self,
        model: Model | None = None,
        device: Device | None = None,
        *,
        prefill_ms: NonNegativeFloat = 10.0,
        decode_ms: NonNegativeFloat = 10.0,
    ) -> None:
        self.prefill = prefill_ms / 1e3
        self.decode = decode_ms / 1e3

    def seconds(self, step: Step) -> float:
        """Both constants, each if the step has such tokens."""
        prompts = len(step.chunks) > step.num_unprompted
        decodes = step.num_decodes or step.num_resumed
        return (self.prefill if prompts else 0.0) + (self.decode if decodes else 0.0)

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        """The decode constant."""
        return self.decode
