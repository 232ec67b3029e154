"""Step times linear in batch, context and tokens."""

from __future__ import annotations

from sim.hardware import Device, Model
from sim.registry import NonNegativeFloat
from sim.step import Step
from sim.timing.base import StepTime, timing


@timing("linear")
class Linear(StepTime):
    """decode = base + a batch + b batch context; prefill = base + c tokens + d tokens length.

    The form that Splitwise's measurements follow (Patel et al., ISCA 2024); the defaults are fitted to its
    Llama-2-70B on eight H100s. `batch context` is the sum of the contexts, `tokens length` the sum over the
    prompts of tokens computed times tokens attended to. A step with both reads the weights once: it takes the
    larger base and the sum of all other terms.

    Fields:
        decode_base_ms: Time of a decode step without sequences.
        decode_per_seq_ms: Time per sequence.
        decode_per_context_token_ms: Time per token of context, over all sequences.
        prefill_base_ms: Time of a prefill step without tokens.
        prefill_per_token_ms: Time per prompt token.
        prefill_per_token_length_ms: Time per prompt token and token of its prompt.
    """

    def __init__(
        self,
        model: Model | None = None,
        device: Device | None = None,
        *,
        decode_base_ms: NonNegativeFloat = 29.9,
        decode_per_seq_ms: NonNegativeFloat = 0.206,
        decode_per_context_token_ms: NonNegativeFloat = 0.000174,
        prefill_base_ms: NonNegativeFloat = 5.4,
        prefill_per_token_ms: NonNegativeFloat = 0.0899,
        prefill_per_token_length_ms: NonNegativeFloat = 1.46e-6,
    ) -> None:
        self.decode_base = decode_base_ms / 1e3
        self.per_seq = decode_per_seq_ms / 1e3
        self.per_context = decode_per_context_token_ms / 1e3
        self.prefill_base = prefill_base_ms / 1e3
        self.per_token = prefill_per_token_ms / 1e3
        self.per_token_length = prefill_per_token_length_ms / 1e3

    def seconds(self, step: Step) -> float:
        """The larger base and all other terms."""
        base = total = 0.0
        if step.num_decodes:
            base = self.decode_base
            total = self.per_seq * step.num_decodes + self.per_context * step.decode_context
        if step.chunks:
            base = max(base, self.prefill_base)
            lengths = sum([tokens * (start + tokens) for _, start, tokens in step.chunks])
            total = total + self.per_token * step.num_prefill_tokens + self.per_token_length * lengths
        return base + total

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        """Base, batch and context terms."""
        return self.decode_base + (self.per_seq * num_decodes + self.per_context * context)
