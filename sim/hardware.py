"""Shapes of models and figures of devices: what turns tokens into bytes and steps into seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Shape of a decoder-only transformer.

    `num_params` counts all weights, `active_params` those that one token passes through (fewer in a mixture
    of experts); `kv_values_per_token` overrides the K and V values that one token leaves over all layers.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_params: float
    active_params: float
    max_model_len: int
    bytes_per_value: float = 2.0
    kv_bytes_per_value: float = 2.0
    kv_values_per_token: int | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V that one token holds over all layers."""
        values = self.kv_values_per_token or 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return int(values * self.kv_bytes_per_value)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        return self.num_params * self.bytes_per_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Datasheet figures of one accelerator; `count` of them serve the model in tensor parallel."""

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float
    host_bytes_per_s: float
    count: int = 1
