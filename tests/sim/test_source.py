"""Sources of requests: open and closed loops, and what happens at the very instant of an arrival."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import Request
from tests.sim.story import MS, Asked, Story, ask, memory, scheduled


def v0(slots: int = 400, **fields):
    return scheduled("vllm_v0", memory(slots=slots), **fields)


# Open loop


@pytest.mark.parametrize("stretches", [False, True])
def test_an_arrival_at_the_end_of_a_step_is_seen_by_the_next_plan(stretches):
    story = Story(v0(), ask((0, 4, 6), (12, 4, 1)), stretches=stretches)
    assert "12: prompt 1(4)" in story.log
    assert story.column("requests", "first_scheduled_time") == [0, 12]
    later = Story(v0(), ask((0, 4, 6), (12.000001, 4, 1)), stretches=stretches)
    assert "13: prompt 1(4)" in later.log
    assert later.column("requests", "arrival_time") == [0, 12.000001]


def test_an_arrival_cuts_a_stretch_at_the_next_step():
    story = Story(v0(), ask((0, 4, 30), (15.5, 4, 1)), stretches=True)
    assert story.log == ["0: prompt 0(4)", "10: decode 0", "16: prompt 1(4)", "26: decode 0"]


def test_an_arrival_that_cannot_be_admitted_cuts_nothing():
    """Behind a head that waits nobody is looked at; the queue is recorded all the same."""
    story = Story(v0(slots=32), ask((0, 17, 12), (3, 20, 1), (15.5, 4, 1), (15.5, 4, 1)), stretches=True)
    assert story.log[:3] == ["0: prompt 0(17)", "10: decode 0", "21: prompt 1(20) 2(4) 3(4)"]
    # Steps start at 0, 10, 11, ...: from the one at 16 on three wait.
    assert story.column("steps", "waiting")[:12] == [0, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3]


def test_requests_that_arrive_together_are_planned_together():
    story = Story(v0(), ask((5, 4, 1), (5, 4, 1), (5, 4, 1)))
    assert story.log == ["5: prompt 0(4) 1(4) 2(4)"]


def test_the_engine_sleeps_while_there_is_nothing_to_do():
    story = Story(v0(), ask((3, 4, 2), (100, 4, 2)), stretches=True)
    assert story.log == ["3: prompt 0(4)", "13: decode 0", "100: prompt 1(4)", "110: decode 1"]
    assert story.column("memory", "time") == [0, 3, 13, 14, 100, 110, 111]
    assert story.column("memory", "token_states") == [0, 4, 5, 0, 4, 5, 0]
    assert story.summary["steps"] == 4
    assert story.summary["duration_s"] == 0.111


def test_no_requests_at_all():
    story = Story(v0(), [])
    assert story.summary["duration_s"] == story.summary["steps"] == story.summary["requests_finished"] == 0


# Closed loop


def test_one_client_without_thinking():
    story = Story(v0(), Asked(ask((0, 4, 3), (0, 4, 1), (0, 4, 2)), clients=1))
    assert story.log == [
        "0: prompt 0(4)", "10: decode 0", "11: decode 0",
        "12: prompt 1(4)",
        "22: prompt 2(4)", "32: decode 2",
    ]  # fmt: skip
    assert story.column("requests", "arrival_time") == [0, 12, 22]
    assert story.column("requests", "finish_time") == [12, 22, 33]
    assert story.summary["e2e_mean_s"] == pytest.approx((12 + 10 + 11) / 3e3)
    assert story.summary["max_waiting"] == 0


def test_two_clients_that_think():
    """Client A: 0 until 11, thinks 5, sends 2 at 16. Client B: 1 until 13, sends 3 at 18."""
    requests = ask((0, 4, 2), (0, 4, 4), (0, 4, 2), (0, 4, 1))
    story = Story(v0(), Asked(requests, clients=2, think_ms=5))
    assert story.log == [
        "0: prompt 0(4) 1(4)",
        "10: decode 0 1",
        "11: decode 1",
        "12: decode 1",
        "16: prompt 2(4)",
        "26: prompt 3(4)",  # arrived at 18, in the step before
        "36: decode 2",
    ]
    assert story.column("requests", "arrival_time") == [0, 0, 16, 18]
    assert story.column("requests", "finish_time") == [11, 13, 37, 36]


def test_a_client_that_is_refused_at_once_thinks_before_it_tries_again():
    """Prompts of 65 tokens exceed the model; request 0 keeps the engine in one long step meanwhile."""
    requests = ask((0, 4, 2), (0, 65, 1), (0, 65, 1), (0, 4, 2))
    story = Story(v0(), Asked(requests, clients=2, think_ms=4), prefill_ms=30)
    assert story.column("requests", "arrival_time") == [0, 0, 4, 8]
    assert story.column("requests", "status") == ["finished", "rejected", "rejected", "finished"]
    assert story.column("requests", "first_scheduled_time") == [0, None, None, 30]


def test_refused_clients_in_a_row_without_thinking():
    """The scheduler gives up requests 0 to 5 in one plan after the other; the next arrive at that instant."""
    requests = ask(*[(0, 60, 1)] * 6, (0, 4, 3), (0, 4, 2))
    story = Story(v0(slots=32), Asked(requests, clients=1))
    assert story.log[-5:] == [
        "0: prompt 6(4)", "10: decode 6", "11: decode 6", "12: prompt 7(4)", "22: decode 7",
    ]  # fmt: skip
    assert story.summary["requests_rejected"] == 6
    assert story.column("steps", "waiting") == [0] * 5
    assert story.column("requests", "arrival_time") == [0] * 7 + [12]


rows = st.lists(
    st.tuples(st.sampled_from([1, 4, 9, 17, 45, 60, 65]), st.integers(1, 20)), min_size=1, max_size=25
)


@given(
    rows=rows, clients=st.integers(1, 4), think=st.sampled_from([0, 0, 0.5, 3, 40]), slots=st.sampled_from([40, 400]),
    kind=st.sampled_from(["vllm_v0", "orca", "static"]),
)  # fmt: skip
def test_clients_wait_for_their_answers(rows, clients, think, slots, kind):
    """Never more than `clients` in flight, and each request after the first is sent when an answer is thought over."""
    requests = [Request(number, 0, *row) for number, row in enumerate(rows)]
    story = Story(
        scheduled(kind, memory(slots=slots)),
        Asked(requests, clients=clients, think_ms=think),
        stretches=True,
    )
    arrivals = [request.arrival_time for request in requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[:clients] == [0] * min(clients, len(rows))
    if story.summary["steps"]:
        queues = zip(story.column("steps", "waiting"), story.column("steps", "running"), strict=True)
        assert all(
            waiting >= 0 and running > 0 and waiting + running <= clients for waiting, running in queues
        )
    refused = [request for request in requests if request.prompt_tokens > 64]
    done = [request for request in requests if request.status == "finished"]
    if len(refused) + len(done) < len(rows):
        return  # the instant at which a scheduler gives up is not recorded
    answers = sorted(
        [request.arrival_time for request in refused] + [request.finish_time for request in done]
    )
    sent = [instant + round(think * MS) for instant in answers]
    assert arrivals[clients:] == sent[: max(0, len(rows) - clients)]
    for at in answers:
        in_flight = [request for request in done if request.arrival_time <= at < request.finish_time]
        assert len(in_flight) <= clients


@given(
    rows=rows, clients=st.integers(1, 4), think=st.sampled_from([0, 0.5, 3, 40]), slots=st.sampled_from([40, 400]),
    kind=st.sampled_from(["vllm_v0", "orca", "static"]),
)  # fmt: skip
def test_stretches_change_nothing_in_a_closed_loop(rows, clients, think, slots, kind):
    def run(stretches: bool) -> Story:
        requests = [Request(number, 0, *row) for number, row in enumerate(rows)]
        workload = Asked(requests, clients=clients, think_ms=think)
        return Story(scheduled(kind, memory(slots=slots)), workload, stretches=stretches)

    one, other = run(True), run(False)
    assert repr(one.summary) == repr(other.summary)
    for table, chunks in one.chunks.items():
        for name in chunks[0] if chunks else ():
            assert one.column(table, name) == other.column(table, name), (table, name)
