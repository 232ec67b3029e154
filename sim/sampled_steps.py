"""Sampled steps: which steps of a run are looked at, in a run whose length nobody knows."""

from __future__ import annotations

from sim.units import FOREVER

FIRST = 8
"""Steps at the start of a run that are all looked at, where at least twice as many samples are wanted."""


class SampledSteps:
    """The first steps of a run and about `samples` in all, spread over it; or every so many steps.

    How many steps a run will have is estimated after each sample: as many per request as it took for those
    that are over. What is left of the samples is spread evenly over what is left of the steps. The next gap is
    never longer than half of the run so far, as the first requests that are over say little. Where the number
    of requests is not known, gaps grow geometrically, so that `samples` last for a hundred million steps. All
    this depends on the run alone, so that the same run is sampled at the same steps.
    """

    def __init__(self, samples: int = 64, every: int | None = None, num_requests: int | None = None) -> None:
        self.samples = samples
        self.every = every
        self.num_requests = num_requests
        self.taken = 0
        self._first = min(FIRST, (samples + 1) // 2)
        self._growth = (1e8 / FIRST) ** (1 / max(1, samples - self._first)) - 1

    def after(self, step: int, requests_over: int) -> int:
        """The step to sample next, after the one that was; `requests_over` have come and gone by now."""
        self.taken += 1
        if self.every is not None:
            return step + self.every
        if self.taken < self._first:
            return step + 1
        if self.num_requests is None:
            return step + 1 + int(step * self._growth)
        left = self.samples - self.taken
        if left <= 0:  # the estimates were too low
            return 2 * step + 1
        steps_left = FOREVER
        if requests_over > 0:
            steps_left = step * max(0, self.num_requests - requests_over) // requests_over
        return step + max(1, min(step // 2, steps_left // left))
