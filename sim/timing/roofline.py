"""Step times from a model's shape and a device's figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from sim.errors import UserError
from sim.hardware import Device, Model
from sim.kv_precision import OPERATIONS
from sim.registry import Bounds, NonNegativeFloat, PositiveFloat
from sim.step import Step
from sim.timing.base import StepTime, timing
from sim.units import FOREVER

Efficiency = Annotated[float, Bounds(gt=0, le=1)]


@timing("roofline")
class Roofline(StepTime):
    """Per operator the larger of compute and memory time, plus a constant per step.

    Two operators (Williams et al., CACM 2009, applied as in the cost models of Vidur and of the engines'
    papers): the linear layers do 2 FLOPs per active weight and token and read the weights once a step (of a
    mixture of experts at most the active weights per token); attention does 4 FLOPs per query head, head
    dimension, layer and (query, key) pair and reads the K and V of every context once; sliding layers do so for
    what is in their window, layers of states read and write theirs. Windows of chunks are exact; those of decodes
    follow from the mean context, which is an upper bound where some contexts are shorter and others longer than
    the window. Tensor parallel devices share both evenly. Each layer ends in two all-reduces of its tokens'
    activations (Shoeybi et al., Megatron-LM, 2019), as rings of 2 (n - 1) sends of a part in n; without a link's
    bandwidth they are part of the step overhead. Of a quantised cache (`kv_cache_dtype`) attention reads fewer bytes,
    and every value that it reads or writes passes through the vector units before the matrix units have it.

    Fields:
        step_overhead_ms: Time per step beside the operators: scheduling, launches, sampling, communication.
        compute_efficiency: Share of the datasheet's FLOP/s that the linear layers and attention reach; the
            default is the datasheet's bound.
        memory_efficiency: Share of the datasheet's memory bandwidth that they reach; likewise.
        link_gb_per_s: Bandwidth from one tensor parallel device to the next, one way.
        link_latency_us: Time of a send beside its bytes.
        dequantize_ops: Vector operations for each value of a quantised cache; by default 2 for int8 and fp8 (convert,
            multiply), 4 for int4 (shift, mask, convert, multiply).
        vector_share: Share of the datasheet's FLOP/s that vector units have in operations per second; 1/32 is that of
            an A100 (9.75e12 of 312e12), an H100 has 1/30.
    """

    def __init__(
        self,
        model: Model | None,
        device: Device | None,
        *,
        step_overhead_ms: NonNegativeFloat = 5.0,
        compute_efficiency: Efficiency = 1.0,
        memory_efficiency: Efficiency = 1.0,
        link_gb_per_s: PositiveFloat | None = None,
        link_latency_us: NonNegativeFloat = 0.0,
        dequantize_ops: NonNegativeFloat | None = None,
        vector_share: Efficiency = 1 / 32,
    ) -> None:
        if model is None or device is None:
            missing = "model" if model is None else "device"
            raise UserError(f"timing roofline needs a {missing}: name one, for example opt-13b on a100-40gb")
        if link_latency_us and link_gb_per_s is None:
            raise UserError("link_latency_us without link_gb_per_s: give both, or neither")
        self.overhead = step_overhead_ms / 1e3
        flops = device.flops_per_s * device.count * compute_efficiency
        bandwidth = device.memory_bytes_per_s * device.count * memory_efficiency
        self.linear_per_token = 2.0 * model.active_params / flops
        self.weights = model.weight_bytes / bandwidth
        self.active_weights = model.active_params * model.bytes_per_value / bandwidth
        attending = model.num_layers - model.num_state_layers
        self.pair = 4.0 * attending * model.num_heads * model.head_dim / flops
        self.kv_token = model.kv_bytes_per_token / bandwidth
        self.dequantize_token = 0.0
        if model.kv_cache_dtype is not None:
            each = OPERATIONS[model.kv_cache_dtype] if dequantize_ops is None else dequantize_ops
            self.dequantize_token = model.kv_values * each / (flops * vector_share)
        self.reduced_token = 0.0
        if link_gb_per_s is not None:
            sends = 2 * model.num_layers * 2 * (device.count - 1)  # two all-reduces a layer
            self.overhead += sends * link_latency_us / 1e6
            part = model.hidden_size * model.bytes_per_value / device.count
            self.reduced_token = sends * part / (link_gb_per_s * 1e9)
        self.window = model.sliding_window or 0
        self.sliding = model.num_sliding_layers / max(1, attending)
        self.state = 2.0 * model.state_bytes / bandwidth

    def seconds(self, step: Step) -> float:
        """One fused step of prompts and decodes."""
        tokens = step.num_decodes
        pairs = context = step.decode_context if step.num_decodes else 0
        for _, start, chunk in step.chunks:
            tokens += chunk
            pairs += chunk * start + chunk * (chunk + 1) // 2
            context += start + chunk
        if not self.window and not self.state:
            return self._fused(tokens, pairs, context)
        window = self.window or FOREVER
        seen = reads = min(step.decode_context, step.num_decodes * window) if step.num_decodes else 0
        for _, start, chunk in step.chunks:
            growing = max(0, min(start + chunk, window) - start)  # tokens that see all before them
            seen += growing * start + growing * (growing + 1) // 2 + (chunk - growing) * window
            reads += min(start + chunk, window - 1 + chunk)
        states = self.state * (step.num_decodes + len(step.chunks))
        return self._fused(tokens, self._mixed(pairs, seen), self._mixed(context, reads), states)

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        """One token for each sequence."""
        if not self.window and not self.state:
            return self._fused(num_decodes, context, context)
        mixed = self._mixed(context, min(context, num_decodes * (self.window or FOREVER)))
        return self._fused(num_decodes, mixed, mixed, self.state * num_decodes)

    def _mixed(self, full: int, windowed: int) -> float:
        """The mean over layers of what full and sliding ones look at."""
        return full - self.sliding * (full - windowed)

    def _fused(self, tokens: int, pairs: float, context: float, states: float = 0.0) -> float:
        linear = max(self.linear_per_token * tokens, min(self.weights, self.active_weights * tokens))
        computing = self.pair * pairs + self.dequantize_token * (context + tokens)
        attention = max(computing, self.kv_token * context + states)
        return self.overhead + linear + attention + self.reduced_token * tokens

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """Nothing is dequantised where nothing is quantised."""
        if not config.get("kv_cache_dtype"):
            for field in ("dequantize_ops", "vector_share"):
                yield f"timing.{field}", "has no meaning where the cache is not quantised (kv_cache_dtype)"
