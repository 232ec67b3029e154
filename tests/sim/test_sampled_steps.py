"""Sampled steps: the first eight, then about as many as were asked for, whatever the run turns out to be."""

from __future__ import annotations

import itertools
import math

import pytest

from sim.audit import sampled_steps
from sim.audit.sampled_steps import SampledSteps


def sampled(steps: SampledSteps, length: int, over, cost=0.0) -> list[int]:
    """The steps sampled in a run of so many; `over(step)` requests have come and gone by a step."""
    found = []
    step = 0
    while step < length:
        found.append(step)
        following = steps.after(step, over(step), 0, cost, cost)
        assert following > step
        step = following
    return found


@pytest.mark.parametrize("length", [1_000, 37_000, 2_000_000])
@pytest.mark.parametrize("lag", [0.0, 0.02, 0.1])
def test_samples_spread_over_the_run(length, lag):
    """Requests leave evenly, the first after a part of the run."""
    steps = SampledSteps(64, num_requests=5_000)
    found = sampled(steps, length, lambda step: max(0, int(5_000 * (step / length - lag))))
    assert found[:8] == list(range(8))
    assert 40 <= len(found) <= 70
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert max(gaps) < length / 8
    assert length - found[-1] < length / 8


def test_a_burst_whose_requests_leave_at_the_end():
    found = sampled(SampledSteps(64, num_requests=100), 50_000, lambda step: 0 if step < 40_000 else 50)
    assert 8 < len(found) <= 72


@pytest.mark.parametrize(
    ("samples", "length"), [(64, 10_000), (64, 10_000_000), (16, 100_000), (200, 100_000)]
)
def test_samples_of_a_run_whose_requests_nobody_counted(samples, length):
    found = sampled(SampledSteps(samples), length, lambda step: step // 100)
    assert len(found) <= samples + 1
    assert len(found) > samples / 3
    assert found[:8] == list(range(8))


@pytest.mark.parametrize("samples", [1, 2, 5, 8, 12])
def test_few_samples(samples):
    found = sampled(SampledSteps(samples, num_requests=1_000), 100_000, lambda step: step // 100)
    assert found[0] == 0
    assert len(found) <= samples + 20  # one more whenever the run has doubled, as its end was not foreseen


def test_every_so_many_steps():
    found = sampled(SampledSteps(64, every=500, num_requests=10), 10_000, lambda step: 0)
    assert found == list(range(0, 10_000, 500))


@pytest.mark.parametrize("requests", [500, 5_000, 500_000])
@pytest.mark.parametrize("per_request", [4, 200])
def test_samples_take_their_share_and_no_more(requests, per_request):
    """A run's cost by the two figures that are assumed, samples of five milliseconds."""
    steps = SampledSteps(64, num_requests=requests, share=0.08)
    length = requests * per_request
    found = sampled(steps, length, lambda step: step // per_request, cost=0.005)
    cost = requests * sampled_steps.REQUEST_S + length * sampled_steps.STEP_S
    assert 8 <= len(found) <= 70
    doublings = math.log(
        length / 8, 4
    )  # a sample whenever the run is four times as long: nobody foresaw its end
    assert 0.005 * (len(found) - 8 - doublings - 1) <= 0.08 * cost + sampled_steps.START_S
    if requests == 500_000:
        assert len(found) > 40


def test_a_short_run_is_sampled_whole_at_first():
    assert sampled(SampledSteps(), 5, lambda step: 0) == [0, 1, 2, 3, 4]
