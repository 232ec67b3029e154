"""Length samplers: means, medians, limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sim.errors import UserError
from workloads import LengthSampler, Streams, lengths

SIZE = 200_000
Tokens = NDArray[np.int64]


def draw(kind: str, size: int = SIZE, max_total: int = 2048, **fields: object) -> tuple[Tokens, Tokens]:
    """Prompts and outputs."""
    return lengths[kind](**fields).sample(Streams(1)("lengths"), size, max_total)


def test_fixed_lengths_are_all_the_same() -> None:
    prompts, outputs = draw("fixed", 3, prompt=256, output=64)
    assert (prompts.tolist(), outputs.tolist()) == ([256] * 3, [64] * 3)
    prompts, outputs = draw("fixed", 2, prompt=256, output=64, max_prompt=100, max_output=80)
    assert (prompts.tolist(), outputs.tolist()) == ([100] * 2, [64] * 2)


def test_uniform_lengths_take_every_value_equally_often() -> None:
    prompts, outputs = draw("uniform", prompt_min=10, prompt_max=19, output_max=4)
    counts = np.bincount(prompts)[10:]
    assert len(counts) == 10
    assert counts == pytest.approx(np.full(10, SIZE / 10), rel=0.03)
    assert np.unique(outputs).tolist() == [1, 2, 3, 4]


def test_lognormal_lengths_have_the_stated_medians_and_spread() -> None:
    prompts, outputs = draw(
        "lognormal", prompt_median=150, prompt_sigma=1.0, output_median=200, output_sigma=0.8
    )
    for found, median, sigma in ((prompts, 150, 1.0), (outputs, 200, 0.8)):
        assert np.median(found) == pytest.approx(median, rel=0.01)
        assert found.mean() == pytest.approx(median * math.exp(sigma**2 / 2), rel=0.02)
        assert np.log(found).std() == pytest.approx(sigma, rel=0.01)
    assert abs(np.corrcoef(np.log(prompts), np.log(outputs))[0, 1]) < 0.01


def test_gamma_lengths_have_the_stated_means_and_shapes() -> None:
    prompts, outputs = draw("gamma", prompt_mean=300, prompt_shape=4.0, output_mean=343.2, output_shape=1.3)
    for found, mean, shape in ((prompts, 300, 4.0), (outputs, 343.2, 1.3)):
        assert found.mean() == pytest.approx(mean, rel=0.01)
        assert (found.mean() / found.std()) ** 2 == pytest.approx(shape, rel=0.02)


def test_weibull_lengths_have_the_stated_scales_and_shapes() -> None:
    prompts, outputs = draw(
        "weibull", prompt_scale=483, prompt_shape=1.556, output_scale=100, output_shape=0.8
    )
    for found, scale, shape in ((prompts, 483, 1.556), (outputs, 100, 0.8)):
        assert (found < scale).mean() == pytest.approx(1 - math.exp(-1), abs=0.005)
        assert found.mean() == pytest.approx(scale * math.gamma(1 + 1 / shape), rel=0.015)


def test_zipf_lengths_fall_with_the_power_of_their_rank() -> None:
    prompts, outputs = draw("zipf", prompt_exponent=1.0, output_exponent=2.0, prompt_min=4, max_prompt=64)
    counts = np.bincount(prompts, minlength=65)
    assert (prompts.min(), prompts.max()) == (4, 64)
    assert counts[4] / counts[8] == pytest.approx(2.0, rel=0.05)
    assert counts[4] / counts[32] == pytest.approx(8.0, rel=0.05)
    counts = np.bincount(outputs)
    assert counts[1] / counts[2] == pytest.approx(4.0, rel=0.03)
    assert outputs.max() <= 2048
    flat, _ = draw("zipf", prompt_exponent=0.0, output_exponent=0.0, max_prompt=4)
    assert np.bincount(flat)[1:] == pytest.approx(np.full(4, SIZE / 4), rel=0.03)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "uniform",
            {"prompt_min": 9, "prompt_max": 5, "output_max": 5},
            "prompt_max: got 5, expected at least prompt_min, 9",
        ),
        (
            "uniform",
            {"prompt_max": 5, "output_min": 7, "output_max": 5},
            "output_max: got 5, expected at least output_min, 7",
        ),
        (
            "zipf",
            {"prompt_exponent": 1, "output_exponent": 1, "prompt_min": 10, "max_prompt": 3},
            "max_prompt: got 3, expected at least prompt_min, 10",
        ),
    ],
)
def test_contradictions_are_told_by_name(kind: str, fields: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        lengths[kind](**fields)
    assert str(caught.value) == message


def test_zipf_refuses_a_range_that_is_empty_or_too_long() -> None:
    with pytest.raises(UserError, match="got lengths from 100 to 50, expected a range of 1 to 10,000,000"):
        draw("zipf", 1, 50, prompt_exponent=1, output_exponent=1, prompt_min=100)
    with pytest.raises(UserError, match="got lengths from 1 to 1000000000"):
        draw("zipf", 1, 10**9, prompt_exponent=1, output_exponent=1)


# Stand-ins for published data


def test_sharegpt_has_the_published_means_within_the_published_limit() -> None:
    prompts, outputs = draw("sharegpt", 400_000)
    assert prompts.mean() == pytest.approx(161.31, rel=0.01)
    assert outputs.mean() == pytest.approx(337.99, rel=0.01)
    assert (prompts + outputs).max() <= 2048


def test_alpaca_has_the_published_means_within_the_published_limit() -> None:
    prompts, outputs = draw("alpaca", 400_000)
    assert prompts.mean() == pytest.approx(19.31, rel=0.01)
    assert outputs.mean() == pytest.approx(58.45, rel=0.01)
    assert (prompts + outputs).max() <= 2048


@pytest.mark.parametrize("kind", ["sharegpt", "alpaca"])
def test_a_longer_context_does_not_lengthen_published_data(kind: str) -> None:
    short, long = draw(kind, 1000, 2048), draw(kind, 1000, 131_072)
    assert short[0].tolist() == long[0].tolist()
    assert short[1].tolist() == long[1].tolist()


def test_pairs_fit_a_short_context_or_it_is_refused() -> None:
    prompts, outputs = draw("sharegpt", 4096, 256)
    assert (prompts + outputs).max() <= 256
    with pytest.raises(UserError, match="no prompt and output that fit into 8 tokens together in 1000 draws"):
        draw("sharegpt", 4096, 8)
    prompts, outputs = draw("sharegpt", 4096, 8, max_prompt=4, max_output=4)
    assert (prompts + outputs).max() <= 8


# What holds for all

size = st.integers(1, 4000)
positive = st.floats(0.05, 1e5)
families: dict[str, dict[str, st.SearchStrategy[object]]] = {
    "fixed": {"prompt": size, "output": size},
    "uniform": {"prompt_max": size, "output_max": size},
    "lognormal": {
        "prompt_median": positive,
        "prompt_sigma": st.floats(0, 1e3),
        "output_median": positive,
        "output_sigma": st.floats(0, 5),
    },
    "gamma": dict.fromkeys(("prompt_mean", "prompt_shape", "output_mean", "output_shape"), positive),
    "weibull": dict.fromkeys(("prompt_scale", "prompt_shape", "output_scale", "output_shape"), positive),
    "zipf": {"prompt_exponent": st.floats(0, 20), "output_exponent": st.floats(0, 20)},
    "sharegpt": {},
    "alpaca": {},
}
limits = {"max_prompt": st.none() | size, "max_output": st.none() | size}
some_sampler = st.one_of(st.builds(lengths[kind], **fields, **limits) for kind, fields in families.items())


def test_every_kind_is_put_through_the_properties() -> None:
    assert set(families) | {"empirical"} == set(lengths.kinds)


@given(some_sampler, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_lengths_are_whole_and_at_least_one_and_come_again(sampler: LengthSampler, seed: int) -> None:
    prompts, outputs = sampler.sample(Streams(seed)("lengths"), 300, 2048)
    for tokens in (prompts, outputs):
        assert tokens.dtype == np.int64
        assert tokens.shape == (300,)
        assert tokens.min() >= 1
        assert tokens.max() <= 2**31
    again = sampler.sample(Streams(seed)("lengths"), 300, 2048)
    assert prompts.tolist() == again[0].tolist()
    assert outputs.tolist() == again[1].tolist()


@pytest.mark.parametrize("kind", families)
@given(data=st.data(), max_prompt=size, max_output=size)
@settings(max_examples=15, deadline=None)
def test_no_length_exceeds_its_limit(
    kind: str, data: st.DataObject, max_prompt: int, max_output: int
) -> None:
    fields = data.draw(st.fixed_dictionaries(families[kind]))
    sampler = lengths[kind](**fields, max_prompt=max_prompt, max_output=max_output)
    prompts, outputs = sampler.sample(Streams(0)("lengths"), 200, 2048)
    assert prompts.max() <= max_prompt
    assert outputs.max() <= max_output
