"""The recorder and its tallies: exact sums, the loaded period by its definition, columns in chunks."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Recorder, Request, timing
from sim.recorder import REQUEST_COLUMNS
from sim.summary import PARTS, LatencyTally, MemoryTally, exact_dot
from tests.sim.story import Asked, Story, ask, memory, scheduled


@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.one_of(st.integers(0, 100), st.integers(0, 2**62 - 1))),
        max_size=50,
    )
)
def test_exact_dot_is_what_python_says(pairs):
    values = np.array([value for value, _ in pairs], np.int64)
    weights = np.array([weight for _, weight in pairs], np.int64)
    assert exact_dot(values, weights) == sum(value * weight for value, weight in pairs)


def test_exact_dot_of_many_large_products():
    values = np.full(100_000, 2**32 - 1, np.int64)
    weights = np.full(100_000, 2**62 - 1, np.int64)
    assert exact_dot(values, weights) == 100_000 * (2**32 - 1) * (2**62 - 1)


# The loaded period

ROW = st.tuples(
    st.integers(1, 50), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 3),
    st.sampled_from([0, 0, 0, 1, 2]),
)  # fmt: skip


def loaded_period(rows, last_arrival):
    """(begin, end) straight from the definition; rows are (start, duration, parts, running, waiting)."""
    refused = [(start, start + duration) for start, duration, _, _, waiting in rows if waiting]
    if refused:
        return refused[0][0], refused[-1][1]
    busy = [start for start, _, _, running, _ in rows if running]
    if not busy:
        return 0, 0
    end = rows[-1][0] + rows[-1][1]
    return (busy[0], last_arrival) if last_arrival > busy[0] else (busy[0], end)


@settings(max_examples=300)
@given(
    drawn=st.lists(ROW, min_size=1, max_size=12), queues=st.booleans(), cuts=st.sets(st.integers(1, 11)),
    arrivals=st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0, 0, 1])), max_size=3), late=st.booleans(),
)  # fmt: skip
def test_the_loaded_period_by_its_definition(drawn, queues, cuts, arrivals, late):
    rows, at = [], 0
    for duration, token_states, reserved, internal, running, waiting in drawn:
        parts = (token_states, reserved, internal, 7, 50 - token_states - reserved - internal - 7)
        rows.append((at, duration, parts, running, waiting if queues else 0))
        at += duration
    instants = [row[0] for row in rows] + [at]
    arrivals = [0, *(min(at, instants[index % len(instants)] + offset) for index, offset in arrivals)]
    tally = MemoryTally()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    for first, after in pairwise(bounds):
        chunk = rows[first:after]
        end = chunk[-1][0] + chunk[-1][1]
        # An arrival at the very end of a chunk may be known by then, or not yet.
        known = max(each for each in arrivals if each < end or (each == end and not late) or each == 0)
        tally.add(
            np.array([row[0] for row in chunk]),
            np.array([row[1] for row in chunk]),
            {name: np.array([row[2][index] for row in chunk]) for index, name in enumerate(PARTS)},
            np.array([row[3] for row in chunk]),
            np.array([row[4] for row in chunk]),
            np.zeros(len(chunk), np.int64),
            np.zeros(len(chunk), np.int64),
            np.array([sum(row[2][:3]) for row in chunk]),
            known,
        )
    # The engine closes every run with a row without length.
    nothing = np.zeros(1, np.int64)
    tally.add(
        np.array([at]), nothing, {**dict.fromkeys(PARTS, nothing), "free": nothing + 50}, nothing, nothing, nothing,
        nothing, nothing, max(arrivals),
    )  # fmt: skip
    averages = tally.averages()
    begin, end = loaded_period(rows, max(arrivals))
    inside = [max(0, min(end, start + duration) - max(begin, start)) for start, duration, *_ in rows]
    assert averages["loaded_s"] == (end - begin) / 1e9
    if end == begin:
        assert all(math.isnan(averages[f"{name}_share"]) for name in PARTS)
        return
    for index, name in enumerate(PARTS):
        total = sum(row[2][index] * length for row, length in zip(rows, inside, strict=True))
        assert averages[f"{name}_share"] == float(Fraction(total, 50 * (end - begin)))
    running = sum(row[3] * length for row, length in zip(rows, inside, strict=True))
    assert averages["mean_running"] == float(Fraction(running, end - begin))
    assert math.isclose(sum(averages[f"{name}_share"] for name in PARTS), 1)
    assert averages["max_running"] == max(row[3] for row in rows)
    assert averages["max_waiting"] == max(row[4] for row in rows)
    assert tally.end == at


def test_the_loaded_period_of_a_story():
    """Two of three fit at a time: 2 waits from 0 until 12, when it is admitted."""
    story = Story(
        scheduled("orca", memory("contiguous", slots=64, longest=32)), ask((0, 8, 3), (0, 8, 5), (0, 8, 2))
    )
    assert story.log[0] == "0: prompt 0(8) 1(8)"
    assert story.column("steps", "waiting") == [1, 1, 1, 0, 0]
    assert story.summary["loaded_s"] == 0.012
    assert story.summary["mean_running"] == 2
    # 16 tokens for 10 ms, 18 for one, 20 for one, of 64 slots.
    assert story.summary["token_states_share"] == (16 * 10 + 18 + 20) / 12 / 64
    # Requests end with 10, 12 and 9 of their 32 slots.
    assert story.summary["internal_share"] == (32 - 10 + 32 - 12) / 64
    assert story.summary["external_share"] == story.summary["free_share"] == 0
    parts = ("token_states", "reserved", "internal")
    assert sum(story.summary[f"allocated_{name}_share"] for name in parts) == pytest.approx(1)


# Latencies


def test_latencies_by_hand():
    tally = LatencyTally()
    second = 1_000_000_000
    times = {
        "arrival_time": np.array([0, second, 2 * second, 0]),
        "first_scheduled_time": np.array([0, second, 4 * second, -1]),
        "first_token_time": np.array([second, 3 * second, 5 * second, -1]),
        "finish_time": np.array([3 * second, 3 * second, 12 * second, -1]),
    }
    outputs, widths = np.array([5, 1, 8, 9]), np.array([1, 1, 3, 1])
    prompts, cached, prefills = np.array([10, 20, 30, 40]), np.array([4, 0, 0, 0]), np.array([1, 3, 4, 0])
    tally.add(times, outputs, widths, prompts, cached, prefills)
    assert (tally.finished, tally.rejected) == (3, 1)
    assert tally.output_tokens == 5 + 1 + 8 * 3
    assert (tally.hit_tokens, tally.admitted_prompt_tokens, tally.first_admission) == (4, 60, 0)
    assert (tally.thrashed, tally.most_prefills) == (2, 4)
    figures = tally.statistics()
    assert figures["ttft_mean_s"] == 2
    assert figures["ttft_p50_s"] == 2
    assert (
        figures["tpot_mean_s"] == (2 / 4 + 7 / 7) / 2
    )  # no time per token after the first where there is one
    assert figures["e2e_mean_s"] == pytest.approx((3 + 2 + 10) / 3)
    assert figures["e2e_p90_s"] == pytest.approx(3 + 0.8 * 7)
    assert figures["normalized_latency_mean_s"] == pytest.approx((3 / 5 + 2 / 1 + 10 / 8) / 3)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), st.integers(1, 7))
def test_percentiles_are_exact_and_do_not_depend_on_chunks(latencies, chunk):
    tally = LatencyTally()
    for begin in range(0, len(latencies), chunk):
        finish = np.array(latencies[begin : begin + chunk], np.int64)
        none = np.zeros_like(finish)
        times = {
            "arrival_time": none,
            "first_scheduled_time": none,
            "first_token_time": finish,
            "finish_time": finish,
        }
        tally.add(times, none + 1, none + 1, none, none, none + 1)
    figures = tally.statistics()
    ordered = sorted(value / 1e9 for value in latencies)
    for percent in (50, 90, 99):
        place = percent / 100 * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        expected = low + (place - math.floor(place)) * (high - low)
        assert figures[f"e2e_p{percent}_s"] == pytest.approx(expected, rel=1e-12)


def test_nothing_finished_is_not_a_number():
    assert all(math.isnan(value) for value in LatencyTally().statistics().values())


# Columns


def busy(**fields) -> Story:
    """Enough happens: preemptions, swaps, copies, pauses, a queue, a request that is refused."""
    requests = ask(
        (0, 10, 9), (0, 12, 13), (1, 6, 20), (3, 60, 4), (30, 9, 9), (300, 9, 9), (301, 5, 30), n=2
    )
    clock = timing["linear"](decode_base_ms=1.1, prefill_base_ms=3.3)
    return Story(
        scheduled("vllm_v0", memory(slots=56)), Asked(requests, **fields), clock=clock, stretches=True
    )


@pytest.mark.parametrize("clients", [None, 2])
@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_chunk_boundaries_do_not_matter(monkeypatch, chunk, clients):
    fields = {} if clients is None else {"clients": clients, "think_ms": 1.3}
    whole = busy(**fields)
    assert len(whole.chunks["steps"]) == len(whole.chunks["requests"]) == 1
    monkeypatch.setattr("sim.recorder.CHUNK", chunk)
    parts = busy(**fields)
    assert len(parts.chunks["steps"]) > 1
    assert parts.summary == whole.summary
    for table in ("requests", "steps", "memory"):
        for name in whole.chunks[table][0]:
            assert parts.column(table, name) == whole.column(table, name), (table, name)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_chunks_do_not_cut_the_loaded_period_of_a_closed_loop(monkeypatch, chunk):
    """The last arrival comes with the end of a step: no request ever waits, and the period ends there."""
    monkeypatch.setattr("sim.recorder.CHUNK", chunk)
    story = Story(
        scheduled("orca", memory(slots=64)), Asked(ask((0, 4, 3), (0, 4, 3)), clients=1), stretches=True
    )
    assert story.column("requests", "arrival_time") == [0, 12]
    assert story.summary["loaded_s"] == 0.012


def test_tables_are_as_promised():
    story = busy()
    requests, steps, slots = (story.chunks[table][0] for table in ("requests", "steps", "memory"))
    assert tuple(requests) == REQUEST_COLUMNS
    assert tuple(steps) == ("time", "duration", "prefill_tokens", "decode_seqs", "running", "waiting")
    assert tuple(slots) == ("time", *PARTS)
    assert len(steps["time"]) == story.summary["steps"]
    assert np.all(np.diff(slots["time"]) > 0)
    total = sum(slots[name] for name in PARTS)
    assert np.all(total == 56)
    assert np.all((steps["prefill_tokens"] > 0) | (steps["decode_seqs"] > 0))
    ends = steps["time"] + steps["duration"]
    assert np.all(steps["time"][1:] >= ends[:-1] - 1e-12)
    assert story.summary["duration_s"] == pytest.approx(ends[-1])
    assert set(requests["status"]) == {"finished", "rejected"}
    assert story.summary["output_token_throughput"] * story.summary["duration_s"] == pytest.approx(
        sum(requests["output_tokens"][requests["status"] == "finished"])
    )


def test_the_memory_does_not_depend_on_stretches():
    single = busy()
    requests = ask(
        (0, 10, 9), (0, 12, 13), (1, 6, 20), (3, 60, 4), (30, 9, 9), (300, 9, 9), (301, 5, 30), n=2
    )
    clock = timing["linear"](decode_base_ms=1.1, prefill_base_ms=3.3)
    stepped = Story(scheduled("vllm_v0", memory(slots=56)), requests, clock=clock, stretches=False)
    assert stepped.summary == single.summary
    assert stepped.column("memory", "reserved") == single.column("memory", "reserved")


def test_tables_that_are_switched_off_stay_off():
    seen = []
    recorder = Recorder(lambda table, columns: seen.append(table), steps=False, memory=False)
    recorder.request(Request(0, 0, 1, 1))
    recorder.usage.extend((0, 4, 0, 0))
    recorder.durations.append(5)
    recorder.num_slots = 8
    recorder.stretch(0, 1, 4, 0, 1, 0, 4, 0, 0)
    recorder.close()
    assert seen == ["requests"]
    assert recorder.num_steps == 1
    assert recorder.memory.held == 20


def test_who_sent_a_request_stands_beside_it():
    tables = {}
    recorder = Recorder(tables.setdefault)
    for tenant in (2, 0):
        recorder.request(Request(tenant, 0, 1, 1, tenant=tenant))
    recorder.close()
    assert list(tables["requests"]["tenant"]) == [2, 0]


def test_a_stretch_is_spread_over_its_steps():
    tables = {}
    recorder = Recorder(lambda table, columns: tables.setdefault(table, columns))
    recorder.num_slots = 100
    recorder.usage.extend((0, 20, 1, 3))
    recorder.durations.extend((5, 6, 7, 8))
    recorder.usage.extend((2, 24, 2, 3))  # from the third step on
    recorder.stretch(1000, 4, 0, 2, 2, 1, tokens=10, tokens_per_step=2, saved_blocks=0)
    recorder.close()
    assert tables["steps"]["time"].tolist() == [1000 / 1e9, 1005 / 1e9, 1011 / 1e9, 1018 / 1e9]
    assert tables["memory"]["token_states"].tolist() == [10, 12, 14, 16]
    assert tables["memory"]["internal"].tolist() == [1, 1, 2, 2]
    assert tables["memory"]["reserved"].tolist() == [9, 7, 8, 6]
    assert tables["memory"]["free"].tolist() == [77, 77, 73, 73]
    assert recorder.memory.end == 1026
