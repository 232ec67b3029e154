"""Fitting: coefficients from 0 on that predict measured times with small relative errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TOLERANCE = 1e-10
ROBUST = 0.1
"""Relative errors above this count less and less: a few strange calls must not bend all others."""
ITERATIONS = 20


@dataclass(frozen=True, slots=True)
class Observation:
    """One measured call: `amounts` are the seconds that one unit of each coefficient adds to it."""

    amounts: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors |predicted - measured| / measured of some calls."""

    calls: int
    median: float
    largest: float

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float]) -> Errors:
        """Those of predictions. Raises ValueError for none."""
        if not len(measured) or len(predicted) != len(measured):
            raise ValueError(
                f"predicted: got {len(predicted)}, expected {len(measured)} as measured, at least 1"
            )
        errors = np.abs(np.array(predicted) / np.array(measured) - 1)
        return cls(len(measured), float(np.median(errors)), float(errors.max()))


def fit(
    observations: Sequence[Observation], prior: Mapping[str, float] | None = None, strength: float = 0.1
) -> dict[str, float]:
    """Coefficients, none below 0, that minimise relative errors: squared up to `ROBUST`, linearly beyond (Huber).

    With a `prior`, changing one of its coefficients by a share s costs as much as a relative error of
    strength * s, and a coefficient that it has at 0 stays there. Raises ValueError for no observations and for
    times that are not above 0.
    """
    if not observations:
        raise ValueError("observations: got none, expected at least one")
    names = list(observations[0].amounts)
    for number, observation in enumerate(observations):
        if not observation.seconds > 0:
            raise ValueError(
                f"observations[{number}].seconds: got {observation.seconds}, expected a time above 0"
            )
    rows = [
        [observation.amounts[name] / observation.seconds for name in names] for observation in observations
    ]
    wanted = [1.0] * len(rows)
    if prior is not None:
        for name in names:
            if prior[name] > 0:
                rows.append([strength / prior[name] if name == other else 0.0 for other in names])
                wanted.append(strength)
            else:  # so dear that it stays at 0
                for row in rows:
                    row[names.index(name)] = 0.0
    matrix, target = np.array(rows), np.array(wanted)
    weights = np.ones(len(rows))
    for _ in range(ITERATIONS):
        found = non_negative(matrix * weights[:, None], target * weights)
        errors = np.abs(matrix @ found - target)[: len(observations)]
        weights[: len(observations)] = np.sqrt(ROBUST / np.maximum(errors, ROBUST))
    return dict(zip(names, map(float, found), strict=True))


def predict(coefficients: Mapping[str, float], observations: Sequence[Observation]) -> list[float]:
    """Seconds of each call by its amounts."""
    return [
        sum(coefficients[name] * amount for name, amount in observation.amounts.items())
        for observation in observations
    ]


def non_negative(matrix: Floats, wanted: Floats) -> Floats:
    """The x >= 0 with the smallest |matrix x - wanted|, by active sets (Lawson and Hanson, 1974, chapter 23).

    matrix [rows, columns], wanted [rows]; columns of zeros get 0.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    columns = matrix / scale
    x = np.zeros(columns.shape[1])
    free = np.zeros(len(x), bool)

    def solved() -> Floats:
        trial = np.zeros(len(x))
        trial[free] = np.linalg.lstsq(columns[:, free], wanted, rcond=None)[0]
        return trial

    for _ in range(30 * len(x)):
        gradient = columns.T @ (wanted - columns @ x)
        gradient[free] = -np.inf
        if not len(x) or gradient.max() <= TOLERANCE * max(1.0, float(np.linalg.norm(wanted))):
            break
        free[int(gradient.argmax())] = True
        trial = solved()
        while free.any() and trial[free].min() <= 0:  # step back to where the first one becomes 0
            leaving = free & (trial <= 0)
            step = float((x[leaving] / np.maximum(x[leaving] - trial[leaving], 1e-300)).min())
            x = x + step * (trial - x)
            free &= x > TOLERANCE
            x[~free] = 0.0
            trial = solved()
        x = trial
    found: Floats = x / scale
    return found


def monotone(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The sequence that never falls nearest to `values` in weighted squares, by pooling adjacent violators."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, heavy, length = pools.pop()
            together = heavy + pool[1]
            pool = ((mean * heavy + pool[0] * pool[1]) / together, together, length + pool[2])
        pools.append(pool)
    return [mean for mean, _, length in pools for _ in range(length)]


def halves(
    observations: Sequence[Observation], fitted: Callable[[Sequence[Observation]], Mapping[str, float]]
) -> list[float]:
    """Predictions of each observation by a fit to those of the other parity, in order."""
    predictions = [0.0] * len(observations)
    for parity in (0, 1):
        coefficients = fitted(observations[1 - parity :: 2])
        predictions[parity::2] = predict(coefficients, observations[parity::2])
    return predictions
