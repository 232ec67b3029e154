"""Arrival processes: when requests come in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sim.registry import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Registry
from sim.units import FOREVER, SECOND, to_ns

Instants = NDArray[np.int64]
"""Arrival instants in ns."""

CHUNK = 4096
"""Arrivals drawn at once; where a chunk ends makes no difference."""

_LAST = FOREVER / SECOND
"""Seconds that the clock can tell."""

arrivals: Registry[type[ArrivalProcess]] = Registry("arrival process")


class ArrivalProcess(ABC):
    """A point process on the time from 0; its keyword-only parameters are its YAML fields."""

    clients: int | None = None
    """Clients of a closed loop; None in an open one."""
    think_time: int = 0
    """Time (ns) between a client's answer and its next request."""

    @abstractmethod
    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """Endless chunks, of any size, of arrival instants in ns that never decrease."""


@arrivals("poisson")
class Poisson(ArrivalProcess):
    """Independent arrivals at a constant rate: exponential gaps, coefficient of variation 1.

    Fields:
        rate: Mean arrivals per second.
    """

    def __init__(self, *, rate: PositiveFloat) -> None:
        self.rate = rate

    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """Sums of exponential gaps."""
        return _sums(lambda: rng.standard_exponential(CHUNK) / self.rate)


@arrivals("gamma")
class Gamma(ArrivalProcess):
    """Independent gamma gaps of a chosen coefficient of variation: bursts (cv > 1) or regularity (cv < 1).

    The usual model of bursty serving traffic (BurstGPT, Wang et al., 2024; ServeGen, Xiang et al., 2025); cv
    1 is a Poisson process.

    Fields:
        rate: Mean arrivals per second.
        cv: Standard deviation of the gaps over their mean.
    """

    def __init__(self, *, rate: PositiveFloat, cv: PositiveFloat) -> None:
        self.rate = rate
        self.cv = cv

    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """Sums of gamma gaps of shape 1 / cv^2."""
        shape = self.cv**-2
        return _sums(lambda: rng.standard_gamma(shape, CHUNK) / (shape * self.rate))


@arrivals("constant")
class Constant(ArrivalProcess):
    """Arrivals at equal distances, the first one distance after the start.

    Fields:
        rate: Arrivals per second.
    """

    def __init__(self, *, rate: PositiveFloat) -> None:
        self.rate = rate

    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """Multiples of 1 / rate, each rounded on its own so that no error adds up."""
        number = 1
        while True:
            yield _instants(np.arange(number, number + CHUNK) / self.rate)
            number += CHUNK


@arrivals("uniform")
class Uniform(ArrivalProcess):
    """Independent gaps drawn evenly around their mean.

    Fields:
        rate: Mean arrivals per second.
        spread: Half width of the gaps' range over their mean: 0 gives equal gaps, 1 gaps from 0 to twice the
            mean.
    """

    def __init__(self, *, rate: PositiveFloat, spread: Fraction = 1.0) -> None:
        self.rate = rate
        self.spread = spread

    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """Sums of uniform gaps."""
        low, width = 1.0 - self.spread, 2.0 * self.spread
        return _sums(lambda: (low + width * rng.random(CHUNK)) / self.rate)


@arrivals("mmpp", "on_off")
class Mmpp(ArrivalProcess):
    """A Poisson process that switches between two rates: a two-state Markov-modulated one.

    Fischer and Meier-Hellstern, Performance Evaluation 1993. Stays in a state are exponential; the first
    state is drawn with the share of time spent in it. A low rate of 0 makes it an on-off process.

    Fields:
        rate_low: Mean arrivals per second in the quiet state.
        rate_high: Mean arrivals per second in the busy state.
        dwell_low_s: Mean stay in the quiet state.
        dwell_high_s: Mean stay in the busy state.
    """

    STAYS: ClassVar[int] = 512  # drawn at once

    def __init__(
        self,
        *,
        rate_low: NonNegativeFloat = 0.0,
        rate_high: PositiveFloat,
        dwell_low_s: PositiveFloat,
        dwell_high_s: PositiveFloat,
    ) -> None:
        self.rates = np.array([rate_low, rate_high])
        self.dwells = np.array([dwell_low_s, dwell_high_s])

    @property
    def mean_rate(self) -> float:
        """Mean arrivals per second over both states."""
        return float(self.rates @ self.dwells / self.dwells.sum())

    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """Arrivals of a unit rate, taken back through the integral of the rate over the stays."""
        stay_rng, gap_rng = rng.spawn(2)
        first = int(stay_rng.random() * self.dwells.sum() >= self.dwells[0])
        rates = np.resize(self.rates[[first, 1 - first]], self.STAYS)
        dwells = np.resize(self.dwells[[first, 1 - first]], self.STAYS)
        # Edges of stays: time (s), integral of the rate until then.
        edges, integrals = np.zeros(self.STAYS + 1), np.zeros(self.STAYS + 1)
        targets = np.empty(0)
        total, latest = 0.0, np.int64(0)
        while True:
            if not targets.size:
                targets = _cumulated(gap_rng.standard_exponential(CHUNK), total)
                total = float(targets[-1])
            reached = int(np.searchsorted(targets, integrals[-1]))
            if reached:
                # The last stay that begins at or before the target; one without arrivals is passed over.
                place = np.searchsorted(integrals, targets[:reached], side="right") - 1
                times = _instants(edges[place] + (targets[:reached] - integrals[place]) / rates[place])
                times = np.maximum.accumulate(np.maximum(times, latest))  # rounding at the end of a stay
                latest = times[-1]
                targets = targets[reached:]
                yield times
            elif edges[-1] > _LAST:
                yield from _repeated(FOREVER)
            else:
                stays = stay_rng.standard_exponential(self.STAYS) * dwells
                edges = np.append(edges[-1], _cumulated(stays.copy(), float(edges[-1])))
                integrals = np.append(integrals[-1], _cumulated(stays * rates, float(integrals[-1])))


@arrivals("diurnal")
class Diurnal(ArrivalProcess):
    """A Poisson process whose rate swings like a day: rate x (1 + amplitude x sin(2 pi t / period)).

    Made by thinning a process at the peak rate (Lewis and Shedler, 1979).

    Fields:
        rate: Mean arrivals per second over a period.
        amplitude: Swing of the rate over its mean; 1 goes down to no arrivals at the lowest point.
        period_s: Length of the swing.
    """

    def __init__(
        self, *, rate: PositiveFloat, amplitude: Fraction = 0.5, period_s: PositiveFloat = 86_400.0
    ) -> None:
        self.rate = rate
        self.amplitude = amplitude
        self.period_s = period_s

    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """Arrivals at the peak rate, each kept with the chance of rate over peak at its instant."""
        gap_rng, thin_rng = rng.spawn(2)
        peak, now = 1.0 + self.amplitude, 0.0
        while now <= _LAST:
            times = _cumulated(gap_rng.standard_exponential(CHUNK) / (self.rate * peak), now)
            now = float(times[-1])
            rate = 1.0 + self.amplitude * np.sin(times * (2.0 * math.pi / self.period_s))
            yield _instants(times[thin_rng.random(CHUNK) * peak < rate])
        yield from _repeated(FOREVER)


@arrivals("burst")
class Burst(ArrivalProcess):
    """All requests at once: a batch job, or the limit of what memory can hold together.

    Fields:
        at_s: When they arrive.
    """

    def __init__(self, *, at_s: NonNegativeFloat = 0.0) -> None:
        self.at = to_ns(at_s)

    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """The same instant, again and again."""
        return _repeated(self.at)


@arrivals("closed_loop")
class ClosedLoop(ArrivalProcess):
    """A fixed number of clients that each wait for an answer, think, and ask again.

    Schroeder et al., NSDI 2006. Arrivals follow from the answers, so they cannot be known beforehand: the
    simulator sets them.

    Fields:
        clients: Clients that send requests, all from the start.
        think_time_s: Pause of a client between an answer and its next request.
    """

    def __init__(self, *, clients: PositiveInt, think_time_s: NonNegativeFloat = 0.0) -> None:
        self.clients = clients
        self.think_time = to_ns(think_time_s)

    def times(self, rng: np.random.Generator) -> Iterator[Instants]:
        """Zeros, in place of what only the simulator knows."""
        return _repeated(0)


def _sums(gaps: Callable[[], NDArray[np.float64]]) -> Iterator[Instants]:
    """Arrivals after gaps (s) that are drawn anew for every chunk.

    Gaps are rounded to ns first: sums of whole numbers are exact for the first 104 days.
    """
    now = 0.0
    while True:
        with np.errstate(over="ignore"):
            times = _cumulated(np.rint(gaps() * SECOND), now)
        now = float(times[-1])
        yield np.minimum(times, FOREVER).astype(np.int64)


def _cumulated(gaps: NDArray[np.float64], start: float) -> NDArray[np.float64]:
    """Running sums after `start`, added in one order however the gaps are cut into chunks."""
    gaps[0] += start
    return np.cumsum(gaps)


def _instants(seconds: NDArray[np.float64]) -> Instants:
    """Seconds as whole ns, `FOREVER` where they exceed it."""
    with np.errstate(over="ignore"):
        return np.minimum(np.rint(seconds * SECOND), FOREVER).astype(np.int64)


def _repeated(instant: int) -> Iterator[Instants]:
    while True:
        yield np.full(CHUNK, instant, dtype=np.int64)
