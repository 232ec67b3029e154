"""Shared prefixes, conversations, agents, trees: what is asked, whatever the time of the answers."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import UserError
from sim.request import Request
from workloads import (
    Agent,
    Conversation,
    FewShot,
    Sampling,
    Streams,
    Synthetic,
    SystemPrompts,
    Tree,
    arrivals,
    lengths,
)
from workloads.shared_prefixes import Leads


def workload(count: int = 200, seed: int = 0, longest: int = 4096, **parts: Any) -> Synthetic:
    short = lengths["lognormal"](prompt_median=30, prompt_sigma=0.5, output_median=40, output_sigma=0.5)
    parts.setdefault("lengths", short)
    parts.setdefault("arrivals", arrivals["poisson"](rate=1.0))
    return Synthetic(Streams(seed), longest, num_requests=count, **parts)


def served(source: Synthetic, order: int = 0, fails: float = 0.0) -> list[list[tuple[int, Request]]]:
    """The requests of each visit in the order sent, each with its delay, when answers come in any order."""
    draw = random.Random(order)
    visits: dict[Any, list[tuple[int, Request]]] = {}
    open_requests = list(source.requests())
    for request in open_requests:
        visits.setdefault(request.session, []).append((0, request))
    while open_requests:
        request = open_requests.pop(draw.randrange(len(open_requests)))
        request.status = "rejected" if draw.random() < fails else "finished"
        room = source.max_model_len - request.prompt_tokens  # the engine cuts what does not fit
        request.output_tokens = min(request.output_tokens, max(1, room))
        assert not request.session.over
        followers = request.session.answered(request)
        visits[request.session] += followers
        open_requests += [follower for _, follower in followers]
    assert all(visit.over for visit in visits)
    return list(visits.values())


def asked(visits: list[list[tuple[int, Request]]]) -> list[Any]:
    return [
        [
            (delay, each.prompt_tokens, each.output_tokens, each.content, each.content_ends)
            for delay, each in visit
        ]
        for visit in visits
    ]


KINDS = {
    "conversation": Conversation(turns=4),
    "agent": Agent(),
    "tree": Tree(branches=3, depth=3, keep=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_repeats_the_prompt_and_the_answer_that_it_goes_on_from(kind):
    for visit in served(workload(session=KINDS[kind], system_prompts=SystemPrompts(count=3))):
        requests = [request for _, request in visit]
        outputs = {request.output_content: request for request in requests}
        assert len(outputs) == len(requests)
        for request in requests:
            names, ends = request.content, request.content_ends
            assert len(names) == len(ends)
            assert list(ends) == sorted(ends)
            assert ends[-1] == request.prompt_tokens
            if len(names) > 2:  # system prompt, question, then answers and messages by turns
                before = outputs[names[-2]]
                assert names[:-2] == before.content
                assert ends[:-2] == before.content_ends
                assert ends[-2] == before.prompt_tokens + before.output_tokens
            else:
                assert (names[0], ends[0]) == (requests[0].content[0], 1024)
                assert names == requests[0].content


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(count=st.integers(1, 150), order=st.integers(0, 99), seed=st.integers(0, 9))
def test_what_is_asked_depends_on_nothing_but_the_seed(kind, count, order, seed):
    """Neither on the order of answers, nor on how many requests there are, but for the end."""
    visits = asked(served(workload(count, seed, session=KINDS[kind]), order))
    assert sum(map(len, visits)) == count
    more = asked(served(workload(200, seed, session=KINDS[kind]), order + 1))
    assert visits[:-1] == more[: len(visits) - 1]
    assert visits[-1] == more[len(visits) - 1][: len(visits[-1])]


def test_conversations_are_as_long_and_as_slow_as_published():
    visits = served(workload(20_000, longest=10**6, session=Conversation()))
    turns = [len(visit) for visit in visits]
    thinking = np.array([delay for visit in visits for delay, _ in visit[1:]]) / 1e9
    assert np.mean(turns) == pytest.approx(5.45, rel=0.05)
    assert thinking.mean() == pytest.approx(28.6, rel=0.02)
    assert thinking.std() == pytest.approx(15.6, rel=0.04)


def test_a_conversation_ends_where_no_answer_would_fit():
    visits = served(workload(2000, longest=300, session=Conversation(turns=50)))
    assert sum(map(len, visits)) == 2000
    for visit in visits:
        for place, (_, request) in enumerate(visit):
            assert place == 0 or request.prompt_tokens < 300
            assert request.prompt_tokens + request.output_tokens <= max(300, request.prompt_tokens + 1)
    assert max(map(len, visits)) < 20


def test_an_agent_calls_tools_and_then_answers():
    visits = served(workload(5000, longest=10**6, session=Agent(max_calls=4, result_tokens_sigma=0)))
    assert {len(visit) for visit in visits[:-1]} == {2, 3, 4, 5}
    for visit in visits:
        for (_, before), (delay, request) in pairwise(visit):
            assert request.prompt_tokens == before.prompt_tokens + before.output_tokens + 100
            assert 0 < delay < 3e9


def test_a_tree_goes_on_from_as_many_answers_as_are_kept():
    kind = Tree(branches=4, depth=3, keep=2, judging_time_s=2, step_tokens=7)
    *visits, _ = served(workload(1000, longest=10**6, session=kind))
    for visit in visits:
        assert [delay for delay, _ in visit] == [0] * 4 + [2 * 10**9] * 16
        levels = [visit[:4], visit[4:12], visit[12:]]
        assert len({request.content for _, request in levels[0]}) == 1
        for level in levels[1:]:
            parents = Counter(request.content[-2] for _, request in level)
            assert sorted(parents.values()) == [4, 4]
    kept = {tuple(sorted({each.content[-2] % 8 for _, each in visit[4:12]})) for visit in visits}
    assert len(kept) == 6  # any two of four


def test_a_rejected_request_leads_to_nothing():
    visits = served(workload(2000, session=Tree(branches=2, depth=4, keep=2)), fails=0.3)
    for visit in visits:
        rejected = {request.output_content for _, request in visit if request.status == "rejected"}
        assert not any(rejected & set(request.content) for _, request in visit)
    assert sum(map(len, visits)) < 2000


def test_the_first_of_several_samples_is_gone_on_from():
    for visit in served(workload(100, session=Conversation(), sampling=Sampling(n=2))):
        for (_, before), (_, after) in pairwise(visit):
            assert before.output_content in after.content


def test_what_beams_answer_is_not_found_again():
    for visit in served(workload(100, session=Conversation(), sampling=Sampling(beam_width=2))):
        assert {request.output_content for _, request in visit} == {None}
        assert all(len(request.content) == 2 * turn + 1 for turn, (_, request) in enumerate(visit))


def test_prompts_begin_with_shared_prefixes():
    source = workload(
        3000, system_prompts=SystemPrompts(count=50, tokens_sigma=0.5), few_shot=FewShot(tasks=2)
    )
    plain = workload(3000)
    requests = list(source.requests())
    by_name: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for request, bare in zip(requests, plain.requests(), strict=True):
        first, second = request.content_ends
        assert second - first == 15 + 5 * 65
        assert request.prompt_tokens == second + bare.prompt_tokens
        assert (request.arrival_time, request.output_tokens) == (bare.arrival_time, bare.output_tokens)
        by_name.setdefault(request.content, set()).add(request.content_ends)
    assert all(len(ends) == 1 for ends in by_name.values())
    assert len({ends for each in by_name.values() for ends in each}) > 20
    few = workload(3000, system_prompts=SystemPrompts(count=5, tokens_sigma=0.5))
    lengths_by_rank = [
        Leads(Streams(0), few.pools)._lengths[0],
        Leads(Streams(0), source.pools)._lengths[0][:5],
    ]
    assert lengths_by_rank[0].tolist() == lengths_by_rank[1].tolist()


def test_popularity_follows_zipf():
    requests = workload(40_000, system_prompts=SystemPrompts(count=10, zipf=2.0)).requests()
    found = Counter(request.content[0] for request in requests)
    total = sum(rank**-2 for rank in range(1, 11))
    for rank in (1, 2, 3, 10):
        assert found[-rank] / 40_000 == pytest.approx(rank**-2 / total, rel=0.1)


def test_prefixes_that_leave_no_room_are_refused():
    with pytest.raises(
        UserError, match=r"shared prefixes: got 1364 tokens at least .* less than the 1024 tokens"
    ):
        workload(longest=1024, system_prompts=SystemPrompts(), few_shot=FewShot())


def test_best_of_runs_more_samples_than_are_returned():
    requests = list(workload(10, sampling=Sampling(n=2, best_of=5)).requests())
    assert {(request.n, request.width) for request in requests} == {(5, 5)}
    assert Sampling(n=3).width == 3
    with pytest.raises(UserError, match="best_of: got 2, expected at least n, the 3 samples"):
        Sampling(n=3, best_of=2)
    with pytest.raises(UserError, match="best_of and beam_width exclude each other: got 4 and 2"):
        Sampling(best_of=4, beam_width=2)


def test_turnover_of_beams_by_default_grows_with_their_number():
    turnovers = [Sampling(beam_width=width).beam_turnover for width in (2, 4, 8, 16)]
    at_eight = [turnover.young / 8**turnover.decay for turnover in turnovers]
    assert at_eight == sorted(at_eight)
    assert at_eight[-1] < 0.12
    assert Sampling(beam_width=4, beam_turnover=0.1).beam_turnover == 0.1
