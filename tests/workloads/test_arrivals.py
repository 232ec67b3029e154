"""Arrival processes: rates, burstiness, and what never changes."""

from __future__ import annotations

import sys
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from workloads import ArrivalProcess, Streams, arrivals


def take(process: ArrivalProcess, count: int, seed: int = 0) -> NDArray[np.int64]:
    """The first arrivals, in ns."""
    chunks, total = [], 0
    for chunk in process.times(Streams(seed)("arrivals")):
        chunks.append(chunk)
        total += len(chunk)
        if total >= count:
            break
    return np.concatenate(chunks)[:count]


def gaps(process: ArrivalProcess, count: int = 200_000) -> NDArray[np.float64]:
    """Gaps in seconds, the one before the first arrival included."""
    return np.diff(take(process, count), prepend=0) / 1e9


@pytest.mark.parametrize(
    ("kind", "fields", "cv"),
    [
        ("poisson", {"rate": 2.0}, 1.0),
        ("gamma", {"rate": 2.0, "cv": 0.5}, 0.5),
        ("gamma", {"rate": 0.1, "cv": 3.0}, 3.0),
        ("constant", {"rate": 3.0}, 0.0),
        ("uniform", {"rate": 5.0, "spread": 1.0}, 1 / 3**0.5),
        ("uniform", {"rate": 5.0, "spread": 0.3}, 0.3 / 3**0.5),
        ("uniform", {"rate": 5.0, "spread": 0.0}, 0.0),
    ],
)
def test_independent_gaps_have_the_stated_rate_and_variation(
    kind: str, fields: dict[str, float], cv: float
) -> None:
    found = gaps(arrivals[kind](**fields))
    assert found.mean() == pytest.approx(1 / fields["rate"], rel=0.001 + 4 * cv / len(found) ** 0.5)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.03, abs=1e-6)


def test_gaps_follow_each_other_independently() -> None:
    for kind, fields in (
        ("poisson", {"rate": 1.0}),
        ("gamma", {"rate": 1.0, "cv": 2.0}),
        ("uniform", {"rate": 1.0}),
    ):
        found = gaps(arrivals[kind](**fields))
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.01


def test_poisson_gaps_are_exponential() -> None:
    found = gaps(arrivals["poisson"](rate=4.0))
    for quantile in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(found, quantile) == pytest.approx(-np.log(1 - quantile) / 4.0, rel=0.02)


def test_constant_arrivals_do_not_drift() -> None:
    times = take(arrivals["constant"](rate=3.0), 300_000)
    assert times[:4].tolist() == [333_333_333, 666_666_667, 1_000_000_000, 1_333_333_333]
    assert times[-1] == 100_000 * 10**9


def test_gamma_of_cv_1_and_uniform_without_spread_are_the_simple_processes() -> None:
    exponential = gaps(arrivals["gamma"](rate=1.0, cv=1.0))
    assert np.quantile(exponential, 0.9) == pytest.approx(-np.log(0.1), rel=0.02)
    assert (
        take(arrivals["uniform"](rate=4.0, spread=0.0), 5000).tolist()
        == take(arrivals["constant"](rate=4.0), 5000).tolist()
    )


def dispersion(times: NDArray[np.int64], window: float) -> float:
    """Variance over mean of the numbers of arrivals in windows of so many seconds."""
    whole = int(times[-1] / 1e9 / window)
    counts = np.bincount((times / 1e9 / window).astype(np.int64), minlength=whole)[:whole]
    return float(counts.var() / counts.mean())


@pytest.mark.parametrize(("low", "high"), [(0.0, 20.0), (2.0, 12.0)])
def test_mmpp_has_the_rate_and_the_dispersion_of_its_two_states(low: float, high: float) -> None:
    dwell_low, dwell_high = 6.0, 2.0
    process = arrivals["mmpp"](rate_low=low, rate_high=high, dwell_low_s=dwell_low, dwell_high_s=dwell_high)
    times = take(process, 600_000)
    share = dwell_high / (dwell_low + dwell_high)
    rate = low * (1 - share) + high * share
    assert process.mean_rate == pytest.approx(rate)
    assert len(times) / (times[-1] / 1e9) == pytest.approx(rate, rel=0.03)
    # Fischer and Meier-Hellstern (1993): variance of the counts over time.
    pace = 1 / dwell_low + 1 / dwell_high
    limit = 2 * share * (1 - share) * (high - low) ** 2 / (pace * rate)
    for window in (0.5, 5.0, 50.0):
        expected = 1 + limit * (1 - (1 - np.exp(-pace * window)) / (pace * window))
        assert dispersion(times, window) == pytest.approx(expected, rel=0.08)


def test_an_on_off_process_is_silent_between_bursts() -> None:
    found = gaps(arrivals["on_off"](rate_high=100.0, dwell_low_s=50.0, dwell_high_s=1.0))
    silences = found[found > 1.0]
    # A burst of 1 s at 100/s holds 100 arrivals on average, and one in 101 has none.
    assert len(silences) == pytest.approx(len(found) / 101, rel=0.1)
    assert silences.mean() == pytest.approx(50.0, rel=0.1)


def test_mmpp_begins_in_either_state_with_its_share_of_time() -> None:
    process = arrivals["mmpp"](rate_low=0.0, rate_high=1000.0, dwell_low_s=30.0, dwell_high_s=10.0)
    early = [take(process, 1, seed)[0] < 10**8 for seed in range(400)]
    assert np.mean(early) == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize("amplitude", [0.4, 1.0])
def test_diurnal_arrivals_swing_with_the_stated_rate(amplitude: float) -> None:
    period = 200.0
    times = take(arrivals["diurnal"](rate=50.0, amplitude=amplitude, period_s=period), 300_000) / 1e9
    whole = int(times[-1] / period)
    phases = times[times < whole * period] % period / period
    counts = np.histogram(phases, 20, (0, 1))[0]
    edges = np.arange(21) / 20
    integral = edges - amplitude * np.cos(2 * np.pi * edges) / (2 * np.pi)
    expected = 50.0 * period * whole * np.diff(integral)
    assert (abs(counts - expected) < 5 * np.sqrt(expected) + 5).all()


def test_a_burst_is_all_at_once() -> None:
    assert set(take(arrivals["burst"](at_s=1.5), 10_000).tolist()) == {1_500_000_000}
    assert set(take(arrivals["burst"](), 10).tolist()) == {0}


def test_a_closed_loop_names_its_clients_and_leaves_the_times_to_the_simulator() -> None:
    process = arrivals["closed_loop"](clients=8, think_time_s=0.25)
    assert (process.clients, process.think_time) == (8, 250_000_000)
    assert set(take(process, 100).tolist()) == {0}
    assert arrivals["poisson"](rate=1.0).clients is None


some_rate = st.floats(1e-3, 1e6)
some_process = st.one_of(
    st.builds(arrivals["poisson"], rate=some_rate),
    st.builds(arrivals["gamma"], rate=some_rate, cv=st.floats(0.01, 20)),
    st.builds(arrivals["constant"], rate=some_rate),
    st.builds(arrivals["uniform"], rate=some_rate, spread=st.floats(0, 1)),
    st.builds(
        arrivals["mmpp"],
        rate_low=st.just(0.0) | st.floats(1e-3, 1e3),
        rate_high=st.floats(0.1, 1e3),
        dwell_low_s=st.floats(0.1, 1e3),
        dwell_high_s=st.floats(0.1, 1e3),
    ),
    st.builds(arrivals["diurnal"], rate=some_rate, amplitude=st.floats(0, 1), period_s=st.floats(1e-2, 1e5)),
    st.builds(arrivals["burst"], at_s=st.floats(0, 1e6)),
)


@given(some_process, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_times_are_whole_never_fall_and_come_again(process: ArrivalProcess, seed: int) -> None:
    times = take(process, 10_000, seed)
    assert times.dtype == np.int64
    assert times[0] >= 0
    assert (np.diff(times) >= 0).all()
    assert times.tolist() == take(process, 10_000, seed).tolist()


@given(some_process, st.integers(1, 700))
@settings(max_examples=40, deadline=None)
def test_where_a_chunk_ends_makes_no_difference(process: ArrivalProcess, size: int) -> None:
    usual = take(process, 1500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["workloads.arrivals"], "CHUNK", size)
        patch.setattr(arrivals["mmpp"], "STAYS", 2 * size)
        assert len(next(process.times(Streams(0)("arrivals")))) <= size
        assert take(process, 1500).tolist() == usual.tolist()


def test_memory_stays_bounded_however_rare_or_dense_the_bursts() -> None:
    for dwell in (1e-3, 1e5):
        process = arrivals["mmpp"](rate_high=50.0, dwell_low_s=dwell, dwell_high_s=dwell)
        assert all(len(chunk) <= 4096 for chunk in islice(process.times(Streams(0)("arrivals")), 50))
