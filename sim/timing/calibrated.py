"""Step times from a device's measured profile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from sim.errors import UserError
from sim.hardware import Device, Model
from sim.registry import InFile, NonNegativeFloat, PositiveInt
from sim.step import Step
from sim.timing.base import StepTime, timing
from sim.timing.profile import NS, S_PER_BYTE, S_PER_FLOP, US, DecodeCost, Profile


@timing("calibrated")
class Calibrated(StepTime):
    """Sums of what `kvsim calibrate` measured on a device, for a model of any shape.

    Attention of decodes and of prompts costs what the profile says for the model's heads and the bytes of its
    K and V, in every layer; the linear layers cost in proportion to the model's weights, taken to be of the
    profile's dtype (of a mixture of experts, at least what reading the experts of the step's tokens takes).
    One fused step: linear layers over all tokens, then attention for the decodes and for the prompts, added.
    Tensor parallel devices share heads and weights evenly; their communication is part of the step overhead.
    The last block of a sequence counts as half full; where blocks differ in size, those that are held count.

    Fields:
        profile: What the device takes: the name of a shipped profile, or a file of kvsim calibrate.
        step_overhead_ms: Time per step beside the operators: scheduling, sampling, communication.
        block_size: Tokens of a block; by default the allocator's, 16 where it has none.
    """

    counts_entries = True

    def __init__(
        self,
        model: Model | None,
        device: Device | None,
        *,
        profile: Annotated[Profile, InFile("profiles")],
        step_overhead_ms: NonNegativeFloat = 0.0,
        block_size: PositiveInt | None = None,
    ) -> None:
        if model is None:
            raise UserError("timing calibrated needs a model: name one, for example opt-13b")
        block_size = 16 if block_size is None else block_size
        layers = model.num_layers
        shared = 1 / (device.count if device is not None else 1)
        self.overhead = step_overhead_ms / 1e3
        self.profile = profile
        # Attention: seconds per sequence, per token of context and so on, of all layers together.
        heads = model.num_heads * model.head_dim * shared
        kv_token = model.kv_bytes_per_token / layers * shared
        query_token = 2.0 * heads * model.kv_bytes_per_value
        self._decode_shape = (layers, block_size, kv_token, 4.0 * heads)
        self.refine(profile.decode)
        prefill = profile.prefill
        self.prefill_base = layers * (prefill.base_us * US)
        self.per_chunk = layers * (prefill.us_per_sequence * US)
        self.per_prompt_token = layers * (prefill.ms_per_query_gb * S_PER_BYTE * query_token)
        self.per_key = layers * (prefill.ms_per_kv_gb * S_PER_BYTE * kv_token)
        self.per_pair = layers * (prefill.ms_per_tflop * S_PER_FLOP * (4.0 * heads))
        # Linear layers.
        self.dense_base = layers * (profile.dense.base_us * US)
        self.curve = profile.dense.curve()
        self.weights = model.num_params * shared
        self.active_weights = model.active_params * shared
        self.read_weight = self.curve(1)

    def refine(self, decode: DecodeCost) -> None:
        """From now on attention of decodes costs this: what a run's own steps say of it."""
        layers, block_size, kv_token, flops = self._decode_shape
        half = (block_size - 1) / (2 * block_size)
        self.decode_base = layers * (decode.base_us * US)
        self.per_entry = layers * (decode.ns_per_block * NS)
        self.per_bare_decode = layers * (decode.us_per_sequence * US)
        self.per_bare_context = layers * (
            decode.ms_per_kv_gb * S_PER_BYTE * kv_token + decode.ms_per_tflop * S_PER_FLOP * flops
        )
        self.per_decode = layers * (decode.us_per_sequence * US + decode.ns_per_block * NS * half)
        self.per_context = layers * (
            decode.ns_per_block * NS / block_size
            + decode.ms_per_kv_gb * S_PER_BYTE * kv_token
            + decode.ms_per_tflop * S_PER_FLOP * flops
        )

    def seconds(self, step: Step) -> float:
        """One fused step of prompts and decodes."""
        tokens = step.num_decodes
        prompts = 0.0
        if step.chunks:
            keys = pairs = 0
            for _, start, chunk in step.chunks:
                keys += start + chunk
                pairs += chunk * start + chunk * (chunk + 1) // 2
            tokens += step.num_prefill_tokens
            prompts = self.prefill_base + (
                self.per_chunk * len(step.chunks)
                + self.per_prompt_token * step.num_prefill_tokens
                + self.per_key * keys
                + self.per_pair * pairs
            )
        decodes = self._decodes(step.num_decodes, step.decode_context) if step.num_decodes else 0.0
        return self.overhead + (self._dense(tokens) + (decodes + prompts))

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        """One token for each sequence."""
        return self.overhead + (self._dense(num_decodes) + self._decodes(num_decodes, context))

    def attention_seconds(self, num_decodes: float, context: float, entries: float) -> float:
        """Attention of so many decodes over so many tokens, in block tables of so many entries in all."""
        return self.decode_base + (
            self.per_bare_decode * num_decodes + self.per_bare_context * context + self.per_entry * entries
        )

    def _decodes(self, num_decodes: int, context: int) -> float:
        if self.num_entries is not None:
            return self.attention_seconds(num_decodes, context, self.num_entries)
        return self.decode_base + (self.per_decode * num_decodes + self.per_context * context)

    def _dense(self, tokens: int) -> float:
        read = self.read_weight * min(self.weights, self.active_weights * tokens)
        return self.dense_base + max(read, self.curve(tokens) * self.active_weights)

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """A profile has no figures of kernels that dequantise."""
        if config.get("kv_cache_dtype"):
            yield "kv_cache_dtype", "profiles were not measured with quantised caches: take timing roofline"
