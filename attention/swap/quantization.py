"""Quantised K and V: int8, packed int4 and fp8, with a scale per token and head, each with a bound of its error.

A row is the `head_dim` channels of one token and head. Rows, or groups of their channels, are scaled on their own
(`kv_cache_dtype=int8_per_token_head` of vLLM, groups as in KIVI, arXiv 2402.02750), so a slot that was never
written, whatever it holds, cannot spoil the scale of a written token.

**The bound.** Let a be the largest magnitude of a group, g the largest magnitude of the grid of codes, u = 2^-24
(half the spacing of float32 at 1, in which codes and products are computed; 2^-53 for float64 caches), and
s = fl(a / g) the stored scale, at least the smallest normal number, so that it is never zero or subnormal. A
channel x has the ratio t = x / s, computed as t(1 + d) with |d| <= u. Its code c is the nearest point of the grid,
at a distance of at most e(t). What comes back is fl(c s), rounded once more if the cache is of a smaller type, whose
half spacing at 1 is w and whose half smallest subnormal is z:

    |x - c s|       <= s e(t) + u |x|         the grid, and the rounding of the ratio
    |c s - fl(c s)| <= u |c s|                the rounding of the product
    |error|         <= r + w (|x| + r) + z    with r = s e(t) + 3 u a, as |x| <= a and |c s| <= 1.08 a

Grids:

- int8: integers to g = 127. e = 1/2, so an element is off by at most a / 254, about 0.4 % of its row's largest.
- int4: integers to g = 7, two a byte. e = 1/2, so at most a / 14, about 7 %. -8 stays unused: a grid that is
  symmetric keeps 0 and the largest magnitude of either sign.
- fp8: e4m3fn (arXiv 2209.05433), g = 448, 3 bits of fraction. Between 2^k and 2^(k+1) points are 2^(k-3) apart, so
  e(t) = |t| / 16 at most, and 2^-10 below the smallest normal 2^-6. At most 16 / 448 = 1 / 28 of a (in the
  uppermost binade), but 1/16 of |x| for smaller elements: better than int4 everywhere, better than int8 for small x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.swap.grids import GRIDS, Grid


@dataclass(frozen=True, slots=True)
class Quantized:
    """Codes `[..., num_bytes]` (uint8, int8 or float8) and scales `[..., num_groups]` (float32 or float64)."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class QuantizationError:
    """Measured error against its bound, over `num_values` elements.

    `max_error` and `max_bound` are the largest of each, absolute; `share` is the largest share that an element's
    error has of its own bound, at most 1 if the derivation holds.
    """

    max_error: float
    max_bound: float
    share: float
    num_values: int

    @classmethod
    def worst(cls, errors: Sequence[QuantizationError]) -> QuantizationError | None:
        """Those of all parts together, None of no parts."""
        if not errors:
            return None
        return cls(
            max(error.max_error for error in errors),
            max(error.max_bound for error in errors),
            max(error.share for error in errors),
            sum(error.num_values for error in errors),
        )


@dataclass(frozen=True, slots=True)
class Quantization:
    """A grid of codes, and how many channels share a scale (None: the whole row of a token and head)."""

    grid: Grid
    group_size: int | None = None

    @classmethod
    def named(cls, name: str, group_size: int | None = None) -> Quantization:
        """`int8`, `int4` or `fp8`. Raises ValueError for others, and for fp8 where torch has no such type."""
        if name not in GRIDS:
            raise ValueError(f"quantization: got {name!r}, expected one of {', '.join(GRIDS)}")
        if name == "fp8" and not hasattr(torch, "float8_e4m3fn"):
            raise ValueError(f"quantization: got 'fp8', but torch {torch.__version__} has no float8_e4m3fn")
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size: got {group_size}, expected at least 1, or None for the whole row")
        return cls(GRIDS[name], group_size)

    @property
    def name(self) -> str:
        """The grid's name."""
        return self.grid.name

    def num_groups(self, head_dim: int) -> int:
        """Scales of a row. Raises ValueError if groups do not divide it."""
        group = self.group_size or head_dim
        if head_dim % group:
            raise ValueError(f"group_size: got {group}, expected a divisor of head_dim {head_dim}")
        return head_dim // group

    def bytes_per_row(self, head_dim: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of one token and head, codes and scales, of a cache of `dtype`."""
        scale = _computed_in(dtype).itemsize
        return self.grid.num_bytes(head_dim) + self.num_groups(head_dim) * scale

    def bytes_per_block(
        self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
    ) -> int:
        """Bytes of the K and V of a block in one layer, scales included."""
        return 2 * block_size * num_kv_heads * self.bytes_per_row(head_dim, dtype)

    def quantize(self, x: Tensor) -> Quantized:
        """Codes and scales of rows `[..., head_dim]`.

        A row with an infinite channel or one that is not a number comes back as not a number; others are not
        touched by it. Raises ValueError for what is not floating point, and for groups that do not divide a row.
        """
        if not x.is_floating_point():
            raise ValueError(f"x: got {x.dtype}, expected a floating-point type")
        dtype = _computed_in(x.dtype)
        groups = _grouped(x.to(dtype), self.num_groups(x.shape[-1]))
        scales = groups.abs().amax(-1) / self.grid.largest
        scales = scales.clamp(min=torch.finfo(dtype).tiny)
        # inf / inf and nan / nan: the scale tells, the code must only be defined
        ratios = (groups / scales[..., None]).nan_to_num(0.0).clamp(-self.grid.largest, self.grid.largest)
        return Quantized(self.grid.encode(ratios.flatten(-2)), scales)

    def dequantize(self, quantized: Quantized, head_dim: int, dtype: torch.dtype) -> Tensor:
        """Rows `[..., head_dim]` in `dtype` from what `quantize` gave."""
        scales = quantized.scales
        values = self.grid.decode(quantized.codes, head_dim).to(scales.dtype)
        rows = _grouped(values, scales.shape[-1]) * scales[..., None]
        # 127 * fl(a / 127) may be one rounding above the largest finite number
        highest = torch.finfo(dtype).max
        finite = rows.clamp(-highest, highest).masked_fill(~scales[..., None].isfinite(), torch.nan)
        return finite.flatten(-2).to(dtype)

    def pack(self, quantized: Quantized) -> Tensor:
        """Records of bytes `[num_blocks, num_bytes]` of rows `[num_blocks, ..., head_dim]`: codes, then scales."""
        parts = (quantized.codes, quantized.scales)
        return torch.cat([part.contiguous().view(torch.uint8).flatten(1) for part in parts], dim=1)

    def unpack(self, records: Tensor, rows: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> Quantized:
        """What was packed: `rows` is the shape `[num_blocks, ...]` without the channels, `dtype` that of the cache."""
        widths = self.grid.num_bytes(head_dim), self.num_groups(head_dim)
        num_code_bytes = math.prod(rows[1:]) * widths[0]
        codes = records[:, :num_code_bytes].contiguous().view(self.grid.dtype).view(*rows, widths[0])
        scales = records[:, num_code_bytes:].contiguous().view(_computed_in(dtype)).view(*rows, widths[1])
        return Quantized(codes, scales)

    def bound(self, x: Tensor, quantized: Quantized) -> Tensor:
        """The largest error that each element of `x` can come back with, float64, shaped as `x`."""
        half_ulp = torch.finfo(quantized.scales.dtype).eps / 2
        groups = _grouped(x.double(), quantized.scales.shape[-1]).abs()
        scales = quantized.scales.double()[..., None]
        largest = groups.amax(-1, keepdim=True)
        bound = scales * self.grid.distance(groups / scales) + 3 * half_ulp * largest
        if x.dtype != quantized.scales.dtype:
            info = torch.finfo(x.dtype)
            bound = bound + info.eps / 2 * (groups + bound) + info.smallest_normal * info.eps / 2
        return bound.flatten(-2)

    def measure(self, x: Tensor, quantized: Quantized | None = None) -> QuantizationError:
        """Quantise `x` `[..., head_dim]` (or take what it became), and compare what comes back with the bound.

        Rows that are not finite do not count.
        """
        quantized = quantized or self.quantize(x)
        back = self.dequantize(quantized, x.shape[-1], x.dtype)
        counted = x.isfinite().all(-1)
        errors = (back.double() - x.double()).abs()[counted]
        if not errors.numel():
            return QuantizationError(0.0, 0.0, 0.0, 0)
        bounds = self.bound(x, quantized)[counted]
        shares = (errors / bounds).nan_to_num(torch.inf)
        return QuantizationError(
            float(errors.nan_to_num(torch.inf).max()),
            float(bounds.max()),
            float(shares.max()),
            errors.numel(),
        )


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type of scales and products: float32, but for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(rows: Tensor, num_groups: int) -> Tensor:
    """`[..., head_dim]` as `[..., num_groups, group_size]`."""
    return rows.reshape(*rows.shape[:-1], num_groups, rows.shape[-1] // num_groups)
