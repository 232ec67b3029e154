"""Shapes of models and figures of devices: what turns tokens into bytes and steps into seconds."""

from __future__ import annotations

from dataclasses import dataclass

from sim.errors import UserError
from sim.kv_precision import Precision, quantized_bytes
from sim.layer_groups import LayerKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Shape of a decoder-only transformer.

    `num_params` counts all weights, `active_params` those that one token passes through (fewer in a mixture
    of experts); `kv_values_per_token` overrides the K and V values that one token leaves over all layers.
    `num_sliding_layers` attend to the last `sliding_window` tokens only; `num_state_layers` have no attention,
    and keep a state of `state_values_per_layer` for every sequence (Mamba). With `kv_cache_dtype` the K and V of tokens
    are kept at that precision, each token and head with a scale of its own; states stay as they are. Where
    `tensor_parallel` devices outnumber the heads of K and V, each keeps a whole head, as vLLM's do: the latent values
    of MLA, which count as one head, are on all of them.
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
    num_sliding_layers: int = 0
    sliding_window: int | None = None
    num_state_layers: int = 0
    state_values_per_layer: int = 0
    kv_cache_dtype: Precision | None = None
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for count, name, size in (
            ("num_sliding_layers", "sliding_window", self.sliding_window),
            ("num_state_layers", "state_values_per_layer", self.state_values_per_layer),
        ):
            if bool(getattr(self, count)) != bool(size):
                raise UserError(f"{self.name}: {count} and {name} go together, one of them is not set")
        if self.num_full_layers < 0:
            others = f"{self.num_sliding_layers} sliding and {self.num_state_layers} state layers"
            raise UserError(f"{self.name}: {others} are more than its {self.num_layers} layers")

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to all tokens."""
        return self.num_layers - self.num_sliding_layers - self.num_state_layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V that one token holds over all layers, while it is in their windows; scales included."""
        if self.kv_cache_dtype is None:
            return self.full_kv_bytes_per_token
        return quantized_bytes(self.kv_values, self.head_dim, self.kv_cache_dtype)

    @property
    def full_kv_bytes_per_token(self) -> int:
        """What they would be without `kv_cache_dtype`."""
        return int(self.kv_values * self.kv_bytes_per_value)

    @property
    def kv_values(self) -> int:
        """Values of K and V that one token leaves over all layers and devices."""
        layers = self.num_layers - self.num_state_layers
        values = self.kv_values_per_token or 2 * layers * self.num_kv_heads * self.head_dim
        return values * max(self.tensor_parallel, self.num_kv_heads) // self.num_kv_heads

    def shares_heads(self, devices: int) -> bool:
        """Whether so many devices have as many heads each: of K and V whole ones, or copies (vLLM's rule)."""
        more, fewer = max(devices, self.num_kv_heads), min(devices, self.num_kv_heads)
        return self.num_heads % devices == 0 and more % fewer == 0

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers; none where all layers attend to all tokens."""
        if self.num_full_layers == self.num_layers:
            return ()
        token = self.kv_bytes_per_token / max(1, self.num_layers - self.num_state_layers)
        state = self.state_values_per_layer * self.kv_bytes_per_value
        kinds = (
            LayerKind(self.num_full_layers, token),
            LayerKind(self.num_sliding_layers, token, self.sliding_window),
            LayerKind(self.num_state_layers, state_bytes=state),
        )
        return tuple(kind for kind in kinds if kind.count)

    @property
    def state_bytes(self) -> int:
        """Bytes that a sequence holds whatever its length."""
        return int(self.num_state_layers * self.state_values_per_layer * self.kv_bytes_per_value)

    def kv_bytes(self, num_tokens: int) -> float:
        """Bytes that a sequence of so many tokens needs: full layers all, sliding ones their window, and states."""
        kinds = self.layer_kinds
        if not kinds:
            return self.kv_bytes_per_token * num_tokens
        return sum(
            kind.count * (kind.token_bytes * min(num_tokens, kind.window or num_tokens) + kind.state_bytes)
            for kind in kinds
        )

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
