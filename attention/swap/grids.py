"""Grids: the points that quantised values can take, and how their codes are stored.

A grid is symmetric around 0 and ends at `largest`. What is encoded are ratios within it, in float32 or float64.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


class Grid(Protocol):
    """The points of a quantised format."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""

    @property
    def largest(self) -> float:
        """The magnitude of the outermost points."""

    @property
    def worst(self) -> float:
        """The largest distance of a ratio from its point, as a share of `largest`."""

    def num_bytes(self, head_dim: int) -> int:
        """Bytes of the codes of `head_dim` channels."""

    def encode(self, ratios: Tensor) -> Tensor:
        """Codes `[..., num_bytes]` of the points nearest to ratios `[..., head_dim]`."""

    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        """The points `[..., head_dim]` of codes `[..., num_bytes]`."""

    def distance(self, ratios: Tensor) -> Tensor:
        """How far a ratio of this magnitude can be from its point."""


class Int8:
    """Whole numbers from -127 to 127, one a byte."""

    name = "int8"
    dtype = torch.int8
    largest = 127.0
    worst = 0.5 / 127

    def num_bytes(self, head_dim: int) -> int:
        """One for each channel."""
        return head_dim

    def encode(self, ratios: Tensor) -> Tensor:
        """int8."""
        return ratios.round().to(torch.int8)

    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        """The codes themselves."""
        return codes

    def distance(self, ratios: Tensor) -> Tensor:
        """Half a step."""
        return torch.full_like(ratios, 0.5)


class Int4:
    """Whole numbers from -7 to 7, two a byte: the even channel in the low half, the odd one in the high half.

    Of an odd number of channels the last byte's high half is empty.
    """

    name = "int4"
    dtype = torch.uint8
    largest = 7.0
    worst = 0.5 / 7

    def num_bytes(self, head_dim: int) -> int:
        """Half as many as channels, rounded up."""
        return (head_dim + 1) // 2

    def encode(self, ratios: Tensor) -> Tensor:
        """uint8; a half holds the whole number plus 8."""
        halves = (ratios.round() + 8).to(torch.uint8)
        halves = pad(halves, (0, ratios.shape[-1] % 2))
        return halves[..., 0::2] | (halves[..., 1::2] << 4)

    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        """int8."""
        halves = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        return halves[..., :head_dim].to(torch.int8) - 8

    def distance(self, ratios: Tensor) -> Tensor:
        """Half a step."""
        return torch.full_like(ratios, 0.5)


class Float8:
    """The numbers of float8 e4m3fn: 4 bits of exponent, 3 of fraction, up to 448, one a byte."""

    name = "fp8"
    dtype = getattr(torch, "float8_e4m3fn", torch.uint8)  # the latter is never used
    largest = 448.0
    worst = 16 / 448

    def num_bytes(self, head_dim: int) -> int:
        """One for each channel."""
        return head_dim

    def encode(self, ratios: Tensor) -> Tensor:
        """float8_e4m3fn."""
        return ratios.float().to(torch.float8_e4m3fn)

    def decode(self, codes: Tensor, head_dim: int) -> Tensor:
        """float32, which holds them all."""
        return codes.float()

    def distance(self, ratios: Tensor) -> Tensor:
        """Half of the spacing around the ratio, at least that of subnormal numbers."""
        return (ratios.abs() / 16).clamp(min=2.0**-10)


GRIDS: dict[str, Grid] = {"int8": Int8(), "int4": Int4(), "fp8": Float8()}
