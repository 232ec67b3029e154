"""A timing profile: what a device's operators cost, as `kvsim calibrate` has measured and fitted it.

A cost is a sum of coefficients times amounts; the unit of a coefficient stands in its name. `amounts` turns the
shape of a call into seconds per unit of each coefficient, for the fit and for whoever predicts.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from sim.errors import UserError
from sim.registry import NonNegativeFloat, PositiveFloat

US, NS = 1e-6, 1e-9
S_PER_BYTE = 1e-3 / 1e9
"""Of a millisecond per GB."""
S_PER_FLOP = 1e-3 / 1e12
"""Of a millisecond per TFLOP."""
S_PER_WEIGHT = 1e-3 / 1e9
"""Of a millisecond per billion weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCost:
    """Attention of one layer for decodes.

    Fields:
        base_us: Per call.
        us_per_sequence: Per sequence.
        ns_per_block: Per block that is read.
        ms_per_kv_gb: Per 1e9 bytes of K and V that are read; 1000 over the bandwidth in GB/s.
        ms_per_tflop: Per 1e12 FLOPs, 4 per query head, head dimension and token of context.
    """

    base_us: NonNegativeFloat = 0.0
    us_per_sequence: NonNegativeFloat = 0.0
    ns_per_block: NonNegativeFloat = 0.0
    ms_per_kv_gb: NonNegativeFloat = 0.0
    ms_per_tflop: NonNegativeFloat = 0.0

    @staticmethod
    def amounts(sequences: float, blocks: float, kv_bytes: float, flops: float) -> dict[str, float]:
        """Seconds per unit of each coefficient."""
        return {
            "base_us": US,
            "us_per_sequence": US * sequences,
            "ns_per_block": NS * blocks,
            "ms_per_kv_gb": S_PER_BYTE * kv_bytes,
            "ms_per_tflop": S_PER_FLOP * flops,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCost:
    """Attention of one layer for prompt tokens.

    Fields:
        base_us: Per call.
        us_per_sequence: Per sequence.
        ms_per_query_gb: Per 1e9 bytes of queries read and of outputs written.
        ms_per_kv_gb: Per 1e9 bytes of K and V.
        ms_per_tflop: Per 1e12 FLOPs, 4 per query head, head dimension and (query, visible key) pair.
    """

    base_us: NonNegativeFloat = 0.0
    us_per_sequence: NonNegativeFloat = 0.0
    ms_per_query_gb: NonNegativeFloat = 0.0
    ms_per_kv_gb: NonNegativeFloat = 0.0
    ms_per_tflop: NonNegativeFloat = 0.0

    @staticmethod
    def amounts(sequences: float, query_bytes: float, kv_bytes: float, flops: float) -> dict[str, float]:
        """Seconds per unit of each coefficient."""
        return {
            "base_us": US,
            "us_per_sequence": US * sequences,
            "ms_per_query_gb": S_PER_BYTE * query_bytes,
            "ms_per_kv_gb": S_PER_BYTE * kv_bytes,
            "ms_per_tflop": S_PER_FLOP * flops,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseCost:
    """The linear layers of one transformer layer: a base, and a curve over tokens in proportion to the weights.

    The curve is linear between its points, constant before the first, in proportion to the tokens past the last.

    Fields:
        base_us: Per layer.
        ms_per_billion_weights: By number of tokens, which do not cost less where they are more.
    """

    base_us: NonNegativeFloat = 0.0
    ms_per_billion_weights: dict[str, NonNegativeFloat]

    def __post_init__(self) -> None:
        """Raises UserError for a curve without points, or one that is no curve."""
        told = "ms_per_billion_weights"
        if not self.ms_per_billion_weights:
            raise UserError(f"{told}: got no points, expected a time for each of some numbers of tokens")
        for key in self.ms_per_billion_weights:
            if not key.isdecimal() or not int(key):
                raise UserError(f"{told}: got {key!r} tokens, expected an integer >= 1")
        points = self.points()
        for (before, less), (tokens, more) in pairwise(points):
            if more < less:
                raise UserError(
                    f"{told}: got {more:g} for {tokens} tokens, expected at least {less:g} as for {before} tokens"
                )

    def points(self) -> list[tuple[int, float]]:
        """(tokens, milliseconds per billion weights) in ascending order."""
        return sorted((int(tokens), value) for tokens, value in self.ms_per_billion_weights.items())

    def curve(self) -> Curve:
        """Seconds per weight by number of tokens."""
        return Curve([(tokens, value * S_PER_WEIGHT) for tokens, value in self.points()])


class Curve:
    """A function of tokens through points (tokens, value)."""

    def __init__(self, points: list[tuple[int, float]]) -> None:
        self.keys = [tokens for tokens, _ in points]
        self.values = [value for _, value in points]

    def __call__(self, tokens: float) -> float:
        index = bisect_left(self.keys, tokens)
        if index == len(self.keys):
            return self.values[-1] * (tokens / self.keys[-1])
        if not index or self.keys[index] == tokens:
            return self.values[index]
        low, high = self.keys[index - 1], self.keys[index]
        return self.values[index - 1] + (self.values[index] - self.values[index - 1]) * (
            (tokens - low) / (high - low)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """Blocks moved in one call, of as many layers as there are.

    Fields:
        base_us: Per call.
        us_per_layer: Per layer.
        us_per_block: Per block and layer.
        ms_per_gb: Per 1e9 bytes of K and V that are moved, counted once.
    """

    base_us: NonNegativeFloat = 0.0
    us_per_layer: NonNegativeFloat = 0.0
    us_per_block: NonNegativeFloat = 0.0
    ms_per_gb: NonNegativeFloat = 0.0

    @staticmethod
    def amounts(layers: float, blocks: float, num_bytes: float) -> dict[str, float]:
        """Seconds per unit of each coefficient; `blocks` counts a block once for every layer."""
        return {
            "base_us": US,
            "us_per_layer": US * layers,
            "us_per_block": US * blocks,
            "ms_per_gb": S_PER_BYTE * num_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one device takes, with what it was measured with and how well the fit holds.

    Fields:
        device: Name of the device.
        kind: Sort of device.
        date: Day of the measurement.
        dtype: Of weights, K and V.
        versions: Of what measured.
        copy_gb_per_s: Bytes that a large copy reads and writes per second.
        read_gb_per_s: Bytes that a large read reads per second.
        decode: Attention of decodes.
        prefill: Attention of prompts.
        dense: Linear layers.
        copy: Copies of blocks on the device.
        swap_out: Blocks moved from the device to the host.
        swap_in: Blocks moved from the host to the device.
        quantization: Largest errors of a transformer's quantised K and V and of attention over them, by format.
        fit: Errors of the fit by term.
        grid: What was measured.
        residuals: Every measured case by term, with what the fit says of it.
    """

    device: str
    kind: Literal["cpu", "cuda"]
    date: str
    dtype: str
    versions: dict[str, Any] | None = None
    copy_gb_per_s: PositiveFloat
    read_gb_per_s: PositiveFloat
    decode: DecodeCost
    prefill: PrefillCost
    dense: DenseCost
    copy: MoveCost
    swap_out: MoveCost
    swap_in: MoveCost
    quantization: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    grid: dict[str, Any] | None = None
    residuals: dict[str, Any] | None = None
