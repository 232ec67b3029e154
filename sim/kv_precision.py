"""Precisions of quantised K and V: their bytes with scales, and the operations that (de)quantising takes."""

from __future__ import annotations

from typing import Literal

Precision = Literal["int8", "fp8", "int4"]

BITS = {"int8": 8, "fp8": 8, "int4": 4}
SCALE_BYTES = 4
"""A float32 scale for each token and head, of K and of V (`kv_cache_dtype` int8_per_token_head of vLLM)."""
OPERATIONS = {"int8": 2, "fp8": 2, "int4": 4}
"""Instructions of the vector units for each value: convert, multiply by the scale; int4 is shifted and masked before.

QServe (arXiv 2405.04532, section 5.3, remembered) counts five for an asymmetric int4, whose zero point is subtracted
too, and finds that they and no longer the bytes bound attention on an A100.
"""


def quantized_bytes(values: int, head_dim: int, precision: Precision) -> int:
    """Bytes of so many K and V values: their codes, and a scale for every `head_dim` of them."""
    return values * BITS[precision] // 8 + SCALE_BYTES * values // head_dim
