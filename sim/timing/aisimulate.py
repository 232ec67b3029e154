"""Step times of AISimulate's default formula."""

from __future__ import annotations

from sim.hardware import Device, Model
from sim.request import NEVER
from sim.step import Step
from sim.timing.base import StepTime, timing


@timing("aisimulate_polynomial")
class AISimulatePolynomial(StepTime):
    """A polynomial of the prompt tokens of a step plus one of the share of memory that its decodes fill.

    The default of AISimulate (core 0.13.0), milliseconds rounded to whole nanoseconds each. Prompts count at
    the mean length that is new in them, times their number; what is computed again of generated tokens does
    not count, and a request that gets a further token by it counts as a decode. With u the tokens of the
    decoding sequences over all slots, decodes take -25.74 u^2 + 54.01 u + 5.74.
    """

    def __init__(self, model: Model | None = None, device: Device | None = None) -> None:
        """Neither the model nor the device counts."""

    def seconds(self, step: Step) -> float:
        """Prompts, then decodes."""
        prompts = known = context = resumed = 0
        cached = 0
        for sequence, start, tokens in step.chunks:
            request = sequence.request
            end = start + tokens
            if start < request.prompt_tokens:
                prompts += 1
                known += min(end, request.prompt_tokens)
                cached += start
            if request.first_token_time != NEVER and end == request.prefill_tokens:
                resumed += 1
                context += end
        nanoseconds = 0
        if prompts:
            tokens = prompts * (known // prompts - cached // prompts)
            if tokens > 0:
                nanoseconds = _rounded(4.209989e-7 * tokens * tokens + 1.518344e-2 * tokens + 16.50142)
        if step.num_decodes or resumed:
            nanoseconds += self._decode(step.decode_context + context)
        return nanoseconds / 1e9

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        """The second polynomial."""
        return self._decode(context) / 1e9

    def _decode(self, context: int) -> int:
        share = min(1.0, context / self.num_slots)
        return _rounded(max(1.0, -25.74 * share * share + 54.01 * share + 5.74))


def _rounded(milliseconds: float) -> int:
    return round(milliseconds * 1e6)
