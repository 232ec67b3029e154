"""Workloads: requests made one after the other, and a trace's windows and scales."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import UserError
from sim.registry import Registry
from sim.request import Request
from workloads import (
    Mooncake,
    Sampling,
    Streams,
    Synthetic,
    Trace,
    Workload,
    arrivals,
    lengths,
    trace_format,
    workload,
)

Told = tuple[int, int, int, int]


def told(requests: Any) -> list[Told]:
    return [(each.id, each.arrival_time, each.prompt_tokens, each.output_tokens) for each in requests]


def synthetic(num_requests: int = 100, seed: int = 0, **fields: Any) -> Synthetic:
    fields.setdefault("arrivals", arrivals["poisson"](rate=2.0))
    fields.setdefault("lengths", lengths["sharegpt"]())
    return Synthetic(Streams(seed), 2048, num_requests=num_requests, **fields)


@pytest.fixture
def trace(tmp_path: Path) -> Callable[..., Trace]:
    """A trace of arrivals at the given seconds, prompts 1, 2, 3, ... tokens."""

    def trace(
        *seconds: float, header: str = "arrival_time_s,prompt_tokens,output_tokens", **fields: Any
    ) -> Trace:
        path = tmp_path / "trace.csv"
        rows = [f"{second},{number},7" for number, second in enumerate(seconds, 1)]
        path.write_text("\n".join([header, *rows]))
        return Trace(Streams(0), 2048, path=path, **fields)

    return trace


def arrivals_of(source: Workload) -> list[tuple[int, int, float]]:
    """(id, prompt, seconds) of all requests."""
    return [(each.id, each.prompt_tokens, each.arrival_time / 1e9) for each in source.requests()]


# Synthetic


def test_requests_come_in_order_with_ids_from_0() -> None:
    source = synthetic(10_000)
    requests = list(source.requests())
    assert source.num_requests == 10_000
    assert [request.id for request in requests] == list(range(10_000))
    times = [request.arrival_time for request in requests]
    assert times == sorted(times)
    assert all(type(value) is int for row in told(requests[:10]) for value in row)
    assert requests[0].content is None
    assert (requests[0].n, requests[0].beam_width, requests[0].status) == (1, 1, "waiting")
    assert requests[-1].arrival_time / 1e9 == pytest.approx(5000, rel=0.05)


def test_asking_again_gives_the_same_requests() -> None:
    source = synthetic(500)
    assert told(source.requests()) == told(source.requests())
    assert told(source.requests()) != told(synthetic(500, seed=1).requests())


some_arrivals = st.sampled_from(
    [
        arrivals["poisson"](rate=2.0),
        arrivals["mmpp"](rate_low=0.1, rate_high=50.0, dwell_low_s=3.0, dwell_high_s=3.0),
        arrivals["diurnal"](rate=5.0, amplitude=1.0, period_s=60.0),
        arrivals["closed_loop"](clients=4),
    ]
)
some_lengths = st.sampled_from(
    [lengths["sharegpt"](), lengths["alpaca"](), lengths["zipf"](prompt_exponent=1.2, output_exponent=1.2)]
)


@given(some_arrivals, some_lengths, st.integers(1, 9000), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_the_first_requests_are_the_same_however_many_are_asked_for(
    process: Any, sampler: Any, few: int, seed: int
) -> None:
    some = told(synthetic(few, seed, arrivals=process, lengths=sampler).requests())
    many = synthetic(10**6, seed, arrivals=process, lengths=sampler)
    assert some == told(islice(many.requests(), few))


def test_lengths_do_not_depend_on_arrivals_nor_arrivals_on_lengths() -> None:
    usual = told(synthetic(5000).requests())
    faster = told(synthetic(5000, arrivals=arrivals["diurnal"](rate=40.0)).requests())
    shorter = told(synthetic(5000, lengths=lengths["alpaca"]()).requests())
    assert [row[2:] for row in usual] == [row[2:] for row in faster]
    assert [row[1] for row in usual] == [row[1] for row in shorter]


def test_a_closed_loop_leaves_arrivals_to_the_simulator() -> None:
    source = synthetic(50, arrivals=arrivals["closed_loop"](clients=3, think_time_s=0.5))
    assert (source.clients, source.think_time) == (3, 500_000_000)
    assert {request.arrival_time for request in source.requests()} == {0}
    assert synthetic().clients is None


def test_parallel_samples_and_beams_are_told_to_every_request() -> None:
    source = synthetic(20, sampling=Sampling(n=4))
    assert {(request.n, request.beam_width, request.width) for request in source.requests()} == {(4, 1, 4)}
    assert source.beams is None
    source = synthetic(20, sampling=Sampling(beam_width=6, beam_turnover=0.3))
    assert {(request.n, request.beam_width, request.width) for request in source.requests()} == {(1, 6, 6)}
    assert source.beams is not None
    assert source.beams[0] == 0.3
    assert source.beams == synthetic(5, sampling=Sampling(beam_width=2, beam_turnover=0.3)).beams
    assert source.beams != synthetic(20, seed=1, sampling=source.sampling).beams
    with pytest.raises(
        UserError, match="n and beam_width exclude each other: got 2 and 4, expected one to be 1"
    ):
        Sampling(n=2, beam_width=4)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("poisson", {"rate": 1e-12}),
        ("gamma", {"rate": 1e-300, "cv": 1.0}),
        ("constant", {"rate": 1e-300}),
        ("uniform", {"rate": 1e-12}),
        ("mmpp", {"rate_high": 1e-300, "dwell_low_s": 1e9, "dwell_high_s": 1e9}),
        ("diurnal", {"rate": 1e-12, "amplitude": 1.0}),
    ],
)
def test_arrivals_beyond_the_clock_are_refused_and_not_wrapped(kind: str, fields: dict[str, float]) -> None:
    source = synthetic(100, arrivals=arrivals[kind](**fields))
    with pytest.raises(UserError, match="got request 0 after more than 146 years, expected a higher rate"):
        list(source.requests())


def test_arrivals_within_the_clock_do_not_mind_what_comes_later() -> None:
    rare = arrivals["constant"](rate=1e-9)
    assert len(list(synthetic(4, arrivals=rare).requests())) == 4
    with pytest.raises(UserError, match="got request 4 after more than 146 years"):
        list(synthetic(5, arrivals=rare).requests())


# Traces


def test_a_trace_keeps_its_own_times(trace: Callable[..., Trace]) -> None:
    source = trace(0.5, 0.5, 2.25)
    assert arrivals_of(source) == [(0, 1, 0.5), (1, 2, 0.5), (2, 3, 2.25)]
    assert arrivals_of(source) == arrivals_of(source)
    assert source.num_requests is None


def test_a_window_counts_from_its_start(trace: Callable[..., Trace]) -> None:
    seconds = (0, 1, 2, 3, 4, 5)
    assert arrivals_of(trace(*seconds, start_s=1.5)) == [(0, 3, 0.5), (1, 4, 1.5), (2, 5, 2.5), (3, 6, 3.5)]
    assert arrivals_of(trace(*seconds, window_s=2)) == [(0, 1, 0), (1, 2, 1)]
    assert arrivals_of(trace(*seconds, start_s=2, window_s=2.5)) == [(0, 3, 0), (1, 4, 1), (2, 5, 2)]
    assert arrivals_of(trace(*seconds, start_s=3, window_s=99, num_requests=2)) == [(0, 4, 0), (1, 5, 1)]
    assert arrivals_of(trace(*seconds, num_requests=99)) == arrivals_of(trace(*seconds))


def test_times_are_multiplied(trace: Callable[..., Trace]) -> None:
    assert arrivals_of(trace(1, 2, 3.5, time_scale=2)) == [(0, 1, 2), (1, 2, 4), (2, 3, 7)]
    assert arrivals_of(trace(1, 2, 3.5, time_scale=0.1, start_s=1)) == [(0, 1, 0), (1, 2, 0.1), (2, 3, 0.25)]
    assert arrivals_of(trace(1, 2, 9, time_scale=0.5, window_s=3)) == [(0, 1, 0.5), (1, 2, 1)]


def test_a_trace_is_scaled_to_a_rate(trace: Callable[..., Trace]) -> None:
    source = trace(1, 2, 2, 6, rate=3.0)
    assert source.num_requests == 4
    times = [second for _, _, second in arrivals_of(source)]
    assert times == pytest.approx([0.2, 0.4, 0.4, 1.2])
    source = trace(1, 2, 2, 6, rate=2.0, start_s=2, num_requests=3)
    assert arrivals_of(source) == [(0, 2, 0), (1, 3, 0), (2, 4, 1)]
    with pytest.raises(
        UserError, match=r"got 2 requests of .*trace\.csv at one instant, expected some time between them"
    ):
        trace(2, 2, rate=1.0)
    with pytest.raises(UserError, match=r"^rate and time_scale exclude each other: got 2 and 0\.5$"):
        trace(1, 2, rate=2.0, time_scale=0.5)


def test_an_empty_window_is_told_with_what_there_is(trace: Callable[..., Trace]) -> None:
    with pytest.raises(UserError) as caught:
        list(trace(0, 1, 2, start_s=10).requests())
    assert str(caught.value).endswith(
        "trace.csv: got no request from 10 s on, expected start_s and window_s to hold some; the last one "
        "looked at arrives at 2 s"
    )
    with pytest.raises(UserError, match=r"got no request from 1\.2 s on and before 1\.7 s, .* at 2 s"):
        list(trace(0, 1, 2, start_s=1.2, window_s=0.5).requests())


def test_a_clock_that_shows_a_date_starts_at_the_first_request(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    stamps = ("18:17:03.5", "18:17:04.0", "18:17:13.5")
    lines = [f"2023-11-16 {stamp},{number},7" for number, stamp in enumerate(stamps, 1)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    assert arrivals_of(Trace(Streams(0), 9, path=path, format="azure")) == [
        (0, 1, 0),
        (1, 2, 0.5),
        (2, 3, 10),
    ]
    late = Trace(Streams(0), 9, path=path, format=trace_format["azure"](), start_s=0.25, time_scale=2)
    assert arrivals_of(late) == [(0, 2, 0.5), (1, 3, 19.5)]


def test_content_goes_to_the_requests(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    row = '{{"timestamp": {}, "input_length": 20, "output_length": 5, "hash_ids": [{}, 1]}}\n'
    path.write_text(row.format(0, 4) + row.format(3000, 5))
    source = Trace(Streams(0), 9, path=path, format=Mooncake(block_size=16), sampling=Sampling(n=2))
    requests = list(source.requests())
    assert [request.content for request in requests] == [(4, 1), (5, 1)]
    assert {(request.content_grain, request.n) for request in requests} == {(16, 2)}
    assert told(requests) == [(0, 0, 20, 5), (1, 3 * 10**9, 20, 5)]


def test_a_trace_that_cannot_be_read_is_told_before_anything_runs(
    trace: Callable[..., Trace], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: no such file"):
        Trace(Streams(0), 2048, path=tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match=r"trace\.csv:1: no column for the arrival time: got when, "):
        trace(1, header="when,prompt_tokens,output_tokens")
    with pytest.raises(UserError, match=r"trace\.csv:3: prompt_tokens: got '2x'"):
        trace(1, "3,2x,4\n5")  # type: ignore[arg-type]


def test_reading_stops_behind_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workloads.files.BLOCK", 50)
    path = tmp_path / "trace.csv"
    rows = [f"{second},1,1" for second in range(100)]
    path.write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *rows, "broken"]))
    assert len(arrivals_of(Trace(Streams(0), 9, path=path, window_s=50))) == 50
    assert len(arrivals_of(Trace(Streams(0), 9, path=path, num_requests=10))) == 10
    with pytest.raises(UserError, match=r"trace\.csv:102: wrong number of fields: got 1, expected 3"):
        arrivals_of(Trace(Streams(0), 9, path=path))


@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=80).map(sorted),
    st.integers(0, 10**12),
    st.none() | st.integers(1, 10**12),
    st.none() | st.integers(1, 80),
    st.integers(1, 400),
)
@settings(max_examples=100, deadline=None)
def test_a_window_holds_exactly_what_arrives_in_it(
    tmp_path_factory: pytest.TempPathFactory,
    times: list[int],
    start: int,
    window: int | None,
    limit: int | None,
    block: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "window.csv"
    lines = [f"{instant},{number},1" for number, instant in enumerate(times, 1)]
    path.write_text("\n".join(["arrival_time_ns,prompt_tokens,output_tokens", *lines]))
    source = Trace(
        Streams(0),
        2048,
        path=path,
        start_s=start / 1e9,
        window_s=None if window is None else window / 1e9,
        num_requests=limit,
    )
    end = start + (2**62 if window is None else window)
    rows = [(number, instant - start) for number, instant in enumerate(times, 1) if start <= instant < end]
    expected = [(id_, time, number, 1) for id_, (number, time) in enumerate(rows[:limit])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workloads.files.BLOCK", block)
        if expected:
            assert told(source.requests()) == expected
        else:
            with pytest.raises(UserError, match="got no request from"):
                list(source.requests())


# What configurations are told


def test_beam_turnover_without_beams_has_no_meaning() -> None:
    complaints = dict(Workload.check({"workload": {"sampling": {"n": 2, "beam_turnover": 0.5}}}))
    assert list(complaints) == ["workload.sampling.beam_turnover"]
    assert dict(Workload.check({"workload": {"sampling": {"beam_width": 2, "beam_turnover": 0.5}}})) == {}
    assert list(dict(Workload.check({"workload": {}}))) == ["workload.sampling.beam_turnover"]


@pytest.mark.parametrize("registry", [arrivals, lengths, trace_format, workload], ids=lambda each: each.what)
def test_every_policy_and_field_is_described(registry: Registry[Any]) -> None:
    for kind in registry.kinds:
        assert registry.summary(kind)
        for field in registry.fields(kind):
            assert field.description.endswith("."), f"{kind}.{field.name}"


def test_the_kinds_that_users_rely_on() -> None:
    assert arrivals.kinds == [
        "poisson", "gamma", "constant", "uniform", "mmpp", "diurnal", "burst", "closed_loop"
    ]  # fmt: skip
    assert set(lengths.kinds) == {
        "fixed", "uniform", "lognormal", "gamma", "weibull", "zipf", "empirical", "sharegpt", "alpaca"
    }  # fmt: skip
    assert set(trace_format.kinds) == {"csv", "azure", "burstgpt", "mooncake", "bailian", "vidur", "jsonl"}
    assert workload.kinds == ["synthetic", "trace"]


# Cost


def test_requests_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    instants = np.cumsum(np.full(100_000, 250_000)).tolist()
    path.write_text(
        "arrival_time_us,prompt_tokens,output_tokens\n"
        + "".join(f"{instant},150,200\n" for instant in instants)
    )
    for source in (synthetic(100_000), Trace(Streams(0), 2048, path=path)):
        tracemalloc.start()
        seen: Request | None = None
        for seen in islice(source.requests(), 50_000):  # noqa: B007
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seen is not None
        assert seen.id == 49_999
        assert peak < 8 * 2**20


# Tenants


def test_requests_are_of_tenants_by_their_shares():
    alone = list(synthetic(4000).requests())
    shared = list(synthetic(4000, tenants=[6, 3.0, 1]).requests())
    assert {request.tenant for request in alone} == {0}
    counts = np.bincount([request.tenant for request in shared])
    np.testing.assert_allclose(counts / 4000, [0.6, 0.3, 0.1], atol=0.03)
    assert told(shared) == told(alone)  # nothing else is drawn differently
    fewer = synthetic(50, tenants=[6, 3.0, 1]).requests()
    assert [request.tenant for request in fewer] == [request.tenant for request in shared[:50]]
    with pytest.raises(UserError, match="tenants: got no share"):
        synthetic(tenants=[])


def test_requests_have_priorities_by_their_shares_and_a_session_has_one():
    alone = list(synthetic(4000).requests())
    ranked = list(synthetic(4000, priorities=[1, 3], tenants=[1, 1]).requests())
    assert {request.priority for request in alone} == {0}
    counts = np.bincount([2 * request.priority + request.tenant for request in ranked])
    np.testing.assert_allclose(counts / 4000, [1 / 8, 1 / 8, 3 / 8, 3 / 8], atol=0.03)
    assert told(ranked) == told(alone)
    with pytest.raises(UserError, match="priorities: got no share"):
        synthetic(priorities=[])


def test_a_trace_may_be_of_several_tenants(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"{at},5,5\n" for at in range(200))
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)
    replay = workload["trace"](Streams(1), 64, path=path, tenants=[1, 1])
    first = [request.tenant for request in replay.requests()]
    assert 60 < sum(first) < 140
    assert [request.tenant for request in replay.requests()] == first
