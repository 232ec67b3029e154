"""Models and devices: registries of the shipped tables, whose rows are defaults that a YAML may override."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable
from importlib.resources import files
from typing import Any, get_type_hints

from experiments.sizes import Size, parse_size
from sim.hardware import Device, Model
from sim.registry import NonNegativeInt, PositiveFloat, PositiveInt, Registry

model: Registry[Callable[..., Model]] = Registry("model")
device: Registry[Callable[..., Device]] = Registry("device")


@model("custom")
def custom_model(
    *,
    name: str = "custom",
    num_layers: PositiveInt,
    hidden_size: PositiveInt,
    num_heads: PositiveInt,
    num_kv_heads: PositiveInt | None = None,
    head_dim: PositiveInt | None = None,
    num_params: PositiveFloat,
    active_params: PositiveFloat | None = None,
    max_model_len: PositiveInt,
    bytes_per_value: PositiveFloat = 2.0,
    kv_bytes_per_value: PositiveFloat = 2.0,
    kv_values_per_token: PositiveInt | None = None,
    num_sliding_layers: NonNegativeInt = 0,
    sliding_window: PositiveInt | None = None,
    num_state_layers: NonNegativeInt = 0,
    state_values_per_layer: NonNegativeInt = 0,
) -> Model:
    """A model by its shape.

    Fields:
        name: What to call it.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; by default as many as query heads.
        head_dim: Width of a head; by default hidden_size over num_heads.
        num_params: All weights, 13e9 for 13 billion.
        active_params: Weights that one token passes through; by default all.
        max_model_len: Longest sequence that it was made for.
        bytes_per_value: Bytes of a weight.
        kv_bytes_per_value: Bytes of a key or value in the cache.
        kv_values_per_token: Values that a token leaves in the cache over all layers, where it is not
            2 x num_layers x num_kv_heads x head_dim.
        num_sliding_layers: Layers that attend to a window of the last tokens.
        sliding_window: Tokens that these attend to, the newest included.
        num_state_layers: Layers without attention, which keep a state for every sequence (Mamba).
        state_values_per_layer: Values of such a state, of kv_bytes_per_value each.
    """
    return Model(
        name=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim or max(1, hidden_size // num_heads),
        num_params=num_params,
        active_params=active_params or num_params,
        max_model_len=max_model_len,
        bytes_per_value=bytes_per_value,
        kv_bytes_per_value=kv_bytes_per_value,
        kv_values_per_token=kv_values_per_token,
        num_sliding_layers=num_sliding_layers,
        sliding_window=sliding_window,
        num_state_layers=num_state_layers,
        state_values_per_layer=state_values_per_layer,
    )


@device("custom")
def custom_device(
    *,
    name: str = "custom",
    tflops: PositiveFloat,
    memory_gb_per_s: PositiveFloat,
    memory: Size,
    host_gb_per_s: PositiveFloat = 32.0,
) -> Device:
    """A device by its figures.

    Fields:
        name: What to call it.
        tflops: Dense 16-bit TFLOP/s.
        memory_gb_per_s: Memory bandwidth.
        memory: Memory.
        host_gb_per_s: Peak bandwidth to the host, each direction.
    """
    return Device(
        name=name,
        flops_per_s=tflops * 1e12,
        memory_bytes_per_s=memory_gb_per_s * 1e9,
        memory_bytes=memory,
        host_bytes_per_s=host_gb_per_s * 1e9,
    )


def _register_table(file: str, registry: Registry[Any], custom: Callable[..., Any]) -> None:
    """Register every row of a shipped table: `custom` with the row as its defaults."""
    hints = get_type_hints(custom, include_extras=True)
    with (files("experiments") / "tables" / file).open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            source, aliases = row.pop("source"), row.pop("aliases").split()
            figures = {key: _figure(value) for key, value in row.items() if key != "name" and value}
            registry(row["name"], *aliases)(
                _with_defaults(custom, hints, {"name": row["name"], **figures}, source)
            )


def _figure(text: str) -> Any:
    if text.isdigit():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return parse_size(text)


def _with_defaults(
    custom: Callable[..., Any], hints: dict[str, Any], defaults: dict[str, Any], source: str
) -> Callable[..., Any]:
    """`custom` with other defaults; its signature shows them, as a policy's signature is its schema."""

    def row(**overrides: Any) -> Any:
        return custom(**{**defaults, **overrides})

    parameters = inspect.signature(custom).parameters.values()
    row.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter.replace(default=defaults.get(parameter.name, parameter.default))
            for parameter in parameters
        ]
    )
    row.__annotations__ = hints
    row.__qualname__ = f"{custom.__qualname__}[{defaults['name']}]"
    fields = (inspect.getdoc(custom) or "").partition("\n")[2]
    row.__doc__ = f"{_figures(defaults)}. Source: {source}.\n{fields}"
    return row


def _figures(defaults: dict[str, Any]) -> str:
    if "tflops" in defaults:
        return (
            f"{defaults['tflops']:g} TFLOP/s, {defaults['memory_gb_per_s']:g} GB/s, "
            f"{defaults['memory'] / 2**30:g} GiB, host {defaults['host_gb_per_s']:g} GB/s"
        )
    return (
        f"{defaults['num_params'] / 1e9:g}e9 parameters, {defaults['num_layers']} layers, "
        f"{defaults['num_heads']} heads, {defaults['num_kv_heads']} of keys and values, "
        f"{defaults['max_model_len']:,} tokens"
    )


_register_table("models.csv", model, custom_model)
_register_table("devices.csv", device, custom_device)
