"""Capacity: the KV slots that a model on a device, or a YAML's own figures, come to."""

from __future__ import annotations

import math
from typing import Any

from experiments.experiment import Experiment
from experiments.mistakes import Mistake, Mistakes
from sim.allocators import Capacity
from sim.hardware import Device, Model

BLOCK_SIZE = 16
"""Slots of a block where the allocator knows no blocks."""


def make_capacity(experiment: Experiment, model: Model | None, device: Device | None) -> Capacity:
    """KV slots: num_blocks wins over kv_memory, kv_memory over memory_utilization. Raises Mistakes."""
    _check_precision(experiment, model)
    _check_heads(model)
    longest = experiment.max_model_len or (model.max_model_len if model is not None else None)
    if longest is None:
        raise wrong("missing", "max_model_len", expected="an integer >= 1, or a model to take it from")
    told = experiment.num_blocks is not None or experiment.kv_memory is not None
    if told and model is not None and device is not None:
        _check_fit(model, device, 1.0)
    block_size = experiment.allocator.get("block_size", BLOCK_SIZE)
    shape: dict[str, Any] = {"kv_cache_dtype": experiment.kv_cache_dtype}
    if model is not None:
        shape["num_layers"] = model.num_layers
        shape["layers"] = model.layer_kinds
        shape["token_bytes"] = model.kv_bytes_per_token / (2 * model.num_layers * experiment.tensor_parallel)
    if experiment.num_blocks is not None:
        slots = experiment.num_blocks * block_size
        return Capacity(slots, longest, experiment.num_blocks, **shape)
    if model is None:
        raise wrong("missing", "num_blocks", expected="an integer >= 1, or a model whose KV size is known")
    if experiment.kv_memory is not None:
        available, source = float(experiment.kv_memory), "kv_memory"
        if device is not None and available > device.memory_bytes * device.count - model.weight_bytes:
            left = device.memory_bytes * device.count - model.weight_bytes
            expected = f"at most {_told(left)}, what the weights leave of {device.count} x {device.name}"
            raise wrong("more than there is", source, _told(available), expected)
    elif device is not None:
        available, source = _left_for_kv(experiment, model, device), "device"
    else:
        raise wrong("missing", "kv_memory", expected="a size such as 12 GiB, or num_blocks, or a device")
    slots = int(available // model.kv_bytes_per_token)
    if slots < block_size:
        got = f"{_told(available)} for KV, {slots} slots of {model.kv_bytes_per_token:,} bytes"
        raise wrong("too little memory", source, got, f"room for a block of {block_size} slots")
    if model.layer_kinds:
        shape["kv_bytes"] = int(available)
    return Capacity(slots, longest, **shape)


def _check_precision(experiment: Experiment, model: Model | None) -> None:
    """Raises Mistakes if a quantised cache is of no model, or takes no fewer bytes."""
    precision = experiment.kv_cache_dtype
    if precision is None:
        return
    if model is None:
        raise wrong("a precision of nobody's K and V", "kv_cache_dtype", precision, "a model that has them")
    if model.kv_bytes_per_token >= model.full_kv_bytes_per_token:
        got = f"{precision}, which takes {model.kv_bytes_per_token:,} bytes a token with its scales"
        raise wrong(
            "saves nothing",
            "kv_cache_dtype",
            got,
            f"less than the {model.full_kv_bytes_per_token:,} of {model.name}",
        )


def _check_heads(model: Model | None) -> None:
    """Raises Mistakes if devices cannot share the model's heads evenly, which engines refuse."""
    if model is None:
        return
    able = [count for count in range(1, model.num_heads + 1) if model.shares_heads(count)]
    if model.tensor_parallel not in able:
        what = f"{model.name} has {model.num_heads} heads, {model.num_kv_heads} of keys and values"
        got = f"{model.tensor_parallel} devices, which cannot share them evenly"
        raise wrong(what, "tensor_parallel", got, f"one of {', '.join(map(str, able))}")


def _left_for_kv(experiment: Experiment, model: Model, device: Device) -> float:
    share = experiment.memory_utilization
    _check_fit(model, device, share)
    return device.memory_bytes * share * device.count - model.weight_bytes


def _check_fit(model: Model, device: Device, share: float) -> None:
    """Raises Mistakes if the weights leave no room for a token in this share of the devices' memory."""
    usable = device.memory_bytes * share * device.count
    if usable - model.weight_bytes < model.kv_bytes_per_token:
        devices = math.floor(model.weight_bytes / (device.memory_bytes * share)) + 1
        able = (count for count in range(devices, model.num_heads + 1) if model.shares_heads(count))
        devices = next(able, devices)
        raise wrong(
            f"{model.name} does not fit on {device.count} x {device.name}",
            "model",
            f"{_told(model.weight_bytes)} of weights for {_told(usable)}, "
            f"{share:g} of {device.count} x {_told(device.memory_bytes)}",
            f"a larger device, or tensor_parallel of at least {devices}",
        )


def wrong(what: str, section: str, got: str = "", expected: str = "") -> Mistakes:
    return Mistakes([Mistake(what, (section,), got, expected)])


def _told(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
