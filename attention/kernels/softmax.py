# ruff: noqa: N803 - constants of a kernel are written in capitals
# mypy: ignore-errors
"""Parts of kernels that weigh: scores in units of log2, and a softmax that takes its keys tile by tile.

The running maximum and sum are those of Milakov and Gimelshein (2018) as FlashAttention (Dao et al., 2022) uses them;
exponentials are base 2, since that is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """Hyperbolic tangent from exp2; PRECISE keeps the relative error near 0, where the quotient cancels."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # e ** (-2 |x|)
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0, -y, y)
    if PRECISE:
        s = x * x
        series = x * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488))))
        y = tl.where(s < 0.0625, series, y)
    return y


@triton.jit
def scores_of(q, k, scale, soft_cap, CAPPED: tl.constexpr, UPCAST: tl.constexpr):
    """Scores, float32 `[rows, TILE]`, of q `[rows, dims]` and k `[dims, TILE]`, for `absorb` to multiply by `unit_of`.

    With CAPPED scale is divided by the cap, soft_cap includes log2(e), and the unit is 1. Without, they are not
    scaled yet, and scale includes log2(e): the multiplication then falls together with a subtraction in `absorb`.
    """
    if UPCAST:  # the interpreter multiplies bit patterns of bfloat16
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee")
    if CAPPED:
        scores = soft_cap * tanh(scores * scale, q.dtype == tl.float32)
    return scores


@triton.jit
def unit_of(scale, CAPPED: tl.constexpr):
    """What scores are multiplied with to be in units of log2; above 0, so that the largest stays the largest."""
    if CAPPED:
        return 1.0
    else:
        return scale


@triton.jit
def narrowed(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 as DTYPE, to the nearest; the interpreter, where UPCAST, would cut bfloat16 off."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def absorb(scores, unit, v, acc, highest, mass, UPCAST: tl.constexpr):
    """Take a tile into (acc, highest, mass): weighted sum of V `[rows, dims]`, maximum and sum of weights `[rows]`.

    A row that has seen no key keeps a maximum of -inf; 0 stands in for it, since -inf - -inf is no number.
    """
    raised = tl.maximum(highest, tl.max(scores, 1) * unit)
    base = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores * unit - base[:, None])
    shrink = tl.exp2(highest - base)
    mass = mass * shrink + tl.sum(weights, 1)
    weights = narrowed(weights, v.dtype, UPCAST)
    if UPCAST:
        weights = weights.to(tl.float32)
        v = v.to(tl.float32)
    acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
    return acc, raised, mass


@triton.jit
def settle(acc, highest, mass):
    """(normalised sum, log2-sum-exp2) of what was taken in; 0 and -inf for rows without a key."""
    some = tl.where(mass > 0, mass, 1.0)
    return acc / some[:, None], tl.where(mass > 0, highest + tl.log2(some), float("-inf"))
