"""Time for moving blocks: swaps over the host link, copies on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from sim.errors import UserError
from sim.hardware import Device, Model
from sim.kv_precision import Precision, quantized_bytes
from sim.registry import InFile, NonNegativeFloat, PositiveFloat, PositiveInt
from sim.step import Step
from sim.timing.profile import S_PER_BYTE, US, MoveCost, Profile


class Transfers:
    """Seconds for the blocks that a step moves: copies times latency, plus bytes over bandwidth.

    A block is moved in pieces, K and V of every layer by themselves, and a small copy costs a few
    microseconds whatever its size, which is why swapping small blocks is slow (Kwon et al., SOSP 2023,
    section 7.3); tiers pay as much for each of their copies (`sim/tiers/storage_tier.py`). The engine waits for
    swaps, as vLLM V0 does, unless they are asynchronous: then they take their time on a link of their own (`Link`), a
    block that leaves is free when it is copied, and a step waits only for blocks that it needs before. Without a model
    blocks have no bytes, and a move costs its copies alone.

    Fields:
        host_bandwidth_gb_per_s: Bandwidth of the host link, each direction; by default 0.75 of the
            datasheet's, which is what large copies reach on PCIe.
        copy_latency_us: Fixed cost of one copy between device and host.
        copies_per_block: Copies that moving one block takes; by default two per layer, 1 where all of a block lies
            in one piece.
        asynchronous: Whether swaps go on beside the computation.
        prefetch: Whether asynchronous swap-ins run ahead, their sequences join when all is there; otherwise the next
            step waits for them.
        layer_wise: Whether a step that waits for copies computes the layers that are there meanwhile.
        quantization: Precision of swapped blocks, with a scale for each token and head; by default that of the cache.
        profile: What copies and swaps took on a measured device, in place of all of the above: the name of a
            shipped profile, or a file of kvsim calibrate.
    """

    def __init__(
        self,
        model: Model | None,
        device: Device | None,
        block_size: int,
        *,
        host_bandwidth_gb_per_s: PositiveFloat | None = None,
        copy_latency_us: NonNegativeFloat = 8.0,
        copies_per_block: PositiveInt | None = None,
        asynchronous: bool = False,
        prefetch: bool = True,
        layer_wise: bool = False,
        quantization: Precision | None = None,
        profile: Annotated[Profile, InFile("profiles")] | None = None,
    ) -> None:
        self.asynchronous = asynchronous
        self.prefetch = prefetch
        self.overlapping_layers = 1
        if layer_wise:
            if model is None:
                raise UserError("transfers.layer_wise needs a model: name one, for example opt-13b")
            self.overlapping_layers = model.num_layers
        bytes_per_block = model.kv_bytes_per_token * block_size if model is not None else 0
        self.quantization = quantization
        self.swapped_bytes = _quantized(quantization, model, block_size) if quantization else bytes_per_block
        if copies_per_block is None:
            copies_per_block = 2 * model.num_layers if model is not None else 1
        if host_bandwidth_gb_per_s is not None:
            host_bandwidth = host_bandwidth_gb_per_s * 1e9
        else:
            host_bandwidth = 0.75 * device.host_bytes_per_s * device.count if device is not None else 25e9
        self.copies_per_block = copies_per_block
        self.copy_out = self.copy_in = copy_latency_us / 1e6
        self.swap_block = copies_per_block * self.copy_out + self.swapped_bytes / host_bandwidth
        # Read and written once on the device.
        device_bandwidth = device.memory_bytes_per_s * device.count if device is not None else 1e12
        self.copy_block = 2 * bytes_per_block / device_bandwidth
        # Quantising reads a block and writes its codes, and the other way round; the device does it in a step.
        self.quantize_block = (
            (bytes_per_block + self.swapped_bytes) / device_bandwidth if quantization else 0.0
        )
        self._measured: list[tuple[float, float]] | None = None  # per step and per block
        if profile is not None:
            if model is None:
                raise UserError("transfers.profile needs a model: name one, for example opt-13b")
            count = device.count if device is not None else 1
            moved = self.swapped_bytes / count
            self._measured = [
                _of_blocks(profile.swap_out, model.num_layers, moved),
                _of_blocks(profile.swap_in, model.num_layers, moved),
                _of_blocks(profile.copy, model.num_layers, bytes_per_block / count),
            ]
            self.copy_out, self.copy_in = (
                model.num_layers * (way.us_per_block * US) / copies_per_block
                for way in (profile.swap_out, profile.swap_in)
            )

    def seconds(self, step: Step) -> float:
        """Seconds that a step spends on moving blocks; asynchronous swaps take none of it but to quantise."""
        out, back = step.swapped_out_blocks, step.swapped_in_blocks
        quantizing = self.quantize_block * (out + back)
        if self.asynchronous:
            out = back = 0
        if self._measured is not None:
            pairs = zip(self._measured, (out, back, step.copied_blocks), strict=True)
            return quantizing + sum(
                [base + per_block * blocks for (base, per_block), blocks in pairs if blocks]
            )
        return self.swap_block * (out + back) + self.copy_block * step.copied_blocks + quantizing

    def swap_seconds(self, out_blocks: int, in_blocks: int) -> float:
        """Seconds to move so many blocks to the host in one go, and so many back."""
        if self._measured is None:
            return self.swap_block * (out_blocks + in_blocks)
        pairs = zip(self._measured, (out_blocks, in_blocks), strict=False)
        return sum([base + per_block * blocks for (base, per_block), blocks in pairs if blocks])

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(dotted path, complaint) for options of a whole experiment that contradict each other."""
        transfers = config.get("transfers") or {}
        if transfers.get("quantization") and config.get("kv_cache_dtype"):
            kept = f"kv_cache_dtype: {config['kv_cache_dtype']}"
            yield (
                "transfers.quantization",
                f"swapped blocks have the precision of the cache ({kept}), and keep it",
            )
        if transfers.get("profile") is not None:
            for field in ("copy_latency_us", "host_bandwidth_gb_per_s"):
                yield f"transfers.{field}", "the measured profile says what a move takes"
        if config.get("model") is None:
            yield (
                "transfers.host_bandwidth_gb_per_s",
                "has no meaning without a model: blocks have no bytes then",
            )
        if not transfers.get("asynchronous"):
            for field in ("prefetch", "layer_wise"):
                if field in transfers:
                    yield f"transfers.{field}", "has no meaning where swaps are not asynchronous"
        elif config["allocator"].get("num_host_blocks") == 0:
            yield "transfers.asynchronous", "nothing can be swapped without a host pool (num_host_blocks: 0)"


def _quantized(precision: Precision, model: Model | None, block_size: int) -> int:
    """Bytes of a swapped block: codes, and a scale of four bytes for each token and head, K and V."""
    if model is None:
        raise UserError("transfers.quantization needs a model: name one, for example opt-13b")
    swapped = quantized_bytes(model.kv_values, model.head_dim, precision)
    if swapped >= model.full_kv_bytes_per_token:
        raise UserError(
            f"transfers.quantization: {precision} takes {swapped:,} bytes a token, expected less than the "
            f"{model.full_kv_bytes_per_token:,} of the cache"
        )
    return swapped * block_size


def _of_blocks(cost: MoveCost, num_layers: int, bytes_per_block: float) -> tuple[float, float]:
    """Seconds of a move of blocks, and of each block in it."""
    base = cost.base_us * US + num_layers * (cost.us_per_layer * US)
    return base, num_layers * (cost.us_per_block * US) + cost.ms_per_gb * S_PER_BYTE * bytes_per_block
