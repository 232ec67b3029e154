"""Least squares of a function that only a simulation can tell: no derivatives, within bounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DAMPINGS = (0.0, 0.01, 0.1, 1.0, 10.0)


def least_squares(
    residuals: Callable[[Floats], Floats],
    start: Floats,
    steps: Floats,
    low: Floats,
    high: Floats,
    *,
    rounds: int = 20,
) -> Floats:
    """Where the squares of the residuals add up to the least, within bounds; the same in every run.

    Levenberg and Marquardt's method (SIAM Journal, 1963) with differences over `steps` for derivatives. These
    shrink where no step helps any more, since a schedule changes in jumps. Arrays have shape [parameters];
    `residuals` gives shape [n], or infinities where there is no answer.
    """
    point, here = start, residuals(start)
    for _ in range(rounds):
        slopes = np.stack(
            [_slope(residuals, point, here, axis, steps, high) for axis in range(len(point))], 1
        )
        normal, downhill = slopes.T @ slopes, -slopes.T @ here
        scale = np.diag(np.diag(normal) + 1e-12)
        tried = []
        for damping in DAMPINGS:
            there = np.clip(
                point + np.linalg.lstsq(normal + damping * scale, downhill, rcond=None)[0], low, high
            )
            tried.append((float(np.square(residuals(there)).sum()), tuple(there)))
        least, found = min(tried)
        loss = float(np.square(here).sum())
        if least < loss:
            point, here = np.array(found), residuals(np.array(found))
        if least > 0.99 * loss:
            steps = steps / 3
            if least >= loss and (steps < 1e-3 * np.abs(point) + 1e-9).all():
                break
    return point


def _slope(
    residuals: Callable[[Floats], Floats], point: Floats, here: Floats, axis: int, steps: Floats, high: Floats
) -> Floats:
    step = steps[axis] if point[axis] + steps[axis] <= high[axis] else -steps[axis]
    aside = point.copy()
    aside[axis] += step
    slope = (residuals(aside) - here) / step
    return np.where(np.isfinite(slope), slope, 0.0)


def spread(number: int, axes: int) -> Floats:
    """Points that fill the unit cube evenly, shape [number, axes]: multiples of powers of the golden ratio's kin."""
    ratio = 2.0
    for _ in range(32):  # the root of x ** (axes + 1) == x + 1
        ratio = (1 + ratio) ** (1 / (axes + 1))
    return np.outer(np.arange(1, number + 1), ratio ** -np.arange(1.0, axes + 1)) % 1.0
