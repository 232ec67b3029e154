"""The fit: what was put in comes out, against a search through all sets of coefficients."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.calibration.fitting import Errors, Observation, fit, halves, monotone, non_negative, predict


def smallest_by_search(matrix, wanted):
    """Every set of columns by ordinary least squares; the best of those without a negative."""
    best = float(np.linalg.norm(wanted))
    for size in range(1, matrix.shape[1] + 1):
        for columns in combinations(range(matrix.shape[1]), size):
            x = np.linalg.lstsq(matrix[:, columns], wanted, rcond=None)[0]
            if x.min() >= 0:
                best = min(best, float(np.linalg.norm(matrix[:, columns] @ x - wanted)))
    return best


@given(rows=st.integers(1, 9), columns=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_no_coefficients_from_0_on_are_nearer(rows, columns, seed):
    random = np.random.default_rng(seed)
    matrix, wanted = random.normal(size=(rows, columns)), random.normal(size=rows)
    x = non_negative(matrix, wanted)
    assert (x >= 0).all()
    assert np.linalg.norm(matrix @ x - wanted) <= smallest_by_search(matrix, wanted) + 1e-9


def test_columns_that_say_nothing_or_the_same_are_no_problem():
    matrix = np.array([[0.0, 1.0, 1.0], [0.0, 2.0, 2.0], [0.0, 1.0, 1.0]])
    x = non_negative(matrix, np.array([3.0, 6.0, 3.0]))
    assert x[0] == 0
    assert x[1] + x[2] == pytest.approx(3)


TRUE = {"base": 5.0, "each": 0.5, "gb": 200.0, "nothing": 0.0}


def calls(number: int, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    """Calls that cost what TRUE says, up to a relative noise."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        amounts = {"base": 1e-6, "each": 1e-6 * random.integers(1, 64), "gb": 1e-6 * random.random(), "nothing":
                   1e-6 * random.random()}  # fmt: skip
        seconds = sum(TRUE[name] * amount for name, amount in amounts.items())
        made.append(Observation(amounts, seconds * (1 + noise * random.normal())))
    return made


def test_known_coefficients_are_recovered():
    assert fit(calls(20)) == pytest.approx(TRUE, abs=1e-6)


def test_a_few_strange_calls_do_not_bend_the_others(monkeypatch):
    made = calls(40)
    strange = [
        Observation(made[0].amounts, 20 * made[0].seconds),
        Observation(made[1].amounts, made[1].seconds / 9),
    ]
    measured = [one.seconds for one in made]
    assert Errors.of(predict(fit([*made, *strange]), made), measured).median < 0.03
    monkeypatch.setattr("attention.calibration.fitting.ROBUST", 100.0)  # plain squares
    assert Errors.of(predict(fit([*made, *strange]), made), measured).median > 0.1


def test_held_back_errors_are_those_of_the_noise():
    found = fit(calls(200, noise=0.05))
    unseen = calls(200, noise=0.05, seed=1)
    errors = Errors.of(predict(found, unseen), [one.seconds for one in unseen])
    assert errors.calls == 200
    assert 0.02 < errors.median < 0.05  # the median of |N(0, 0.05)| is 0.034


def test_errors_by_hand():
    assert Errors.of([1.1, 1.0, 5.0], [1.0, 2.0, 5.0]) == Errors(3, pytest.approx(0.1), 0.5)
    with pytest.raises(ValueError, match="predicted: got 0"):
        Errors.of([], [])


def test_a_prior_holds_what_the_calls_say_nothing_of():
    prior = {"base": 7.0, "each": 0.4, "gb": 100.0, "nothing": 0.0}
    one = Observation({"base": 0.0, "each": 0.0, "gb": 1e-6, "nothing": 1e-6}, 200e-6)
    found = fit([one] * 50, prior)
    assert found["base"] == pytest.approx(7.0)
    assert found["each"] == pytest.approx(0.4)
    assert found["gb"] == pytest.approx(200, rel=0.01)
    assert found["nothing"] == 0
    assert fit(calls(400), {"base": 5.5, "each": 0.45, "gb": 210.0, "nothing": 0.0}) == pytest.approx(
        TRUE, rel=0.02
    )


def test_each_half_is_predicted_by_the_other():
    even = [Observation({"base": 1.0}, 2.0)] * 3
    odd = [Observation({"base": 1.0}, 3.0)] * 3
    mixed = [one for pair in zip(even, odd, strict=True) for one in pair]
    assert halves(mixed, fit) == pytest.approx([3, 2, 3, 2, 3, 2])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_the_monotone_sequence_is_the_nearest(values):
    found = monotone(values)
    assert all(low <= high + 1e-9 for low, high in pairwise(found))
    # Nearest, by the formula of isotonic regression: the largest of means from below, over smallest from above.
    for place, value in enumerate(found):
        means = [
            min(float(np.mean(values[first : last + 1])) for last in range(place, len(values)))
            for first in range(place + 1)
        ]
        assert value == pytest.approx(max(means), abs=1e-9)


def test_bad_observations_are_named():
    with pytest.raises(ValueError, match="observations: got none"):
        fit([])
    with pytest.raises(ValueError, match=r"observations\[1\]\.seconds: got 0"):
        fit([Observation({"base": 1.0}, 1.0), Observation({"base": 1.0}, 0)])
