"""Sampled steps: which steps of a run are looked at, in a run whose length nobody knows."""

from __future__ import annotations

import math

from sim.units import FOREVER

FIRST = 8
"""Steps at the start of a run that are all looked at, where at least twice as many samples are wanted."""


REQUEST_S, STEP_S = 30e-6, 1.5e-6
"""CPU seconds that a request and a step of a run cost, roughly, on a core on which `Audit.cost` holds too."""
START_S = 0.01
"""CPU seconds that samples may take however short the run is."""


class SampledSteps:
    """The first steps of a run and at most about `samples` in all, spread over it; or every so many steps.

    Samples are to take no more than `share` of the run's CPU time. Both are estimated, from what can be counted,
    so that the same run is sampled at the same steps on every machine; short runs get fewer samples.

    How many steps a run will have is estimated after each sample: as many per request as it took for those
    that are over. What is left of the samples is spread evenly over what is left of the steps. The next gap is
    never longer than half of the run so far, as the first requests that are over say little. Where the number
    of requests is not known, gaps grow geometrically, so that `samples` last for a hundred million steps. All
    this depends on the run alone, so that the same run is sampled at the same steps.
    """

    def __init__(
        self,
        samples: int = 64,
        every: int | None = None,
        num_requests: int | None = None,
        share: float = 1.0,
    ) -> None:
        self.samples = samples
        self.every = every
        self.num_requests = num_requests
        self.share = share
        self.taken = 0
        self.spent_s = 0.0
        self._first = min(FIRST, (samples + 1) // 2)
        self._growth = (1e8 / FIRST) ** (1 / max(1, samples - self._first)) - 1

    def after(
        self, step: int, requests_over: int, live: int = 0, cost_s: float = 0.0, next_cost_s: float = 0.0
    ) -> int:
        """The step to sample next, after the one that was; `requests_over` have come and gone by now.

        `live` requests are on their way, and count as half done; `cost_s` and `next_cost_s` are the CPU seconds
        that this sample and the next are thought to take.
        """
        self.taken += 1
        self.spent_s += cost_s
        if self.every is not None:
            return step + self.every
        if self.taken < self._first:
            return step + 1
        afforded = self._afforded(step, requests_over + live / 2, next_cost_s)
        return max(self._spread(step, requests_over), min(afforded, 4 * step))

    def _afforded(self, step: int, requests: float, cost_s: float) -> int:
        """The step by which the run has cost so much that the next sample is within its share."""
        cost_of_step = STEP_S + REQUEST_S * requests / max(1, step)
        missing = self.spent_s + cost_s - START_S - self.share * cost_of_step * step
        return step + math.ceil(max(0.0, missing) / (self.share * cost_of_step))

    def _spread(self, step: int, requests_over: int) -> int:
        if self.num_requests is None:
            return step + 1 + int(step * self._growth)
        left = self.samples - self.taken
        if left <= 0:  # the estimates were too low
            return 2 * step + 1
        steps_left = FOREVER
        if requests_over > 0:
            steps_left = step * max(0, self.num_requests - requests_over) // requests_over
        return step + max(1, min(step // 2, steps_left // left))
