"""Content identities: equal for equal histories, different for all others."""

from __future__ import annotations

import numpy as np
import pytest

from sim import Request
from sim.identity import History, identities, identity


def chain(history: History, length: int) -> np.ndarray:
    return history.identities(0, length)[0]


def test_a_history_gives_the_same_identities_whenever_it_is_asked():
    request = Request(5, 0, 20, 30)
    whole = chain(History.of(request), 49)
    assert (whole >= 0).all(), "63 bits: below zero is for what is unwritten"
    assert len(set(whole.tolist())) == 49
    for length in (0, 1, 19, 20, 21, 48):
        np.testing.assert_array_equal(chain(History.of(request), length), whole[:length])


def test_the_array_and_the_single_token_agree():
    histories = [
        History.of(Request(0, 0, 7, 9)),
        History.of(Request(1, 0, 40, 9, content=(11, 12, 13), content_grain=16)),
        History.of(Request(2, 0, 50, 9, content=(11, 2**63 + 5), content_grain=16)),  # content of a part
        History.of(Request(3, 0, 7, 9)).fork(Request(3, 0, 7, 9), 2, 10),
    ]
    lengths = [15, 48, 0, 20]
    found, totals = identities(histories, lengths)
    expected = []
    for history, length, last in zip(histories, lengths, totals, strict=True):
        total = 0
        for position in range(length):
            total = history.total_after(position, total)
            expected.append(identity(total))
        assert total == last
        alone, end = history.identities(0, length)
        assert end == last
        assert alone.tolist() == expected[len(expected) - length :]
        for begin in range(0, length, 7):
            before = history.identities(0, begin)[1]
            rest, end = history.identities(begin, length, before)
            assert end == last
            assert rest.tolist() == expected[len(expected) - length + begin :]
    assert found.tolist() == expected


def test_requests_share_what_their_prompts_share():
    def prompt(name: int, tokens: int, *content: int) -> np.ndarray:
        request = Request(name, 0, tokens, 8, content=content, content_grain=16)
        return chain(History.of(request), tokens + 7)

    one, two, three = prompt(0, 40, 7, 8, 9), prompt(1, 36, 7, 8, 9), prompt(2, 40, 7, 5, 9)
    assert (one[:36] == two[:36]).all(), "the last chunk may be a part"
    assert not np.isin(two[36:], one).any()
    assert (one[:16] == three[:16]).all()
    assert not np.isin(three[16:], one).any(), "a chunk of the same content behind another history is another"
    alone = chain(History.of(Request(3, 0, 40, 8)), 47)
    assert not np.isin(alone, one).any()
    shifted = prompt(4, 40, 8, 9, 7)
    assert not np.isin(shifted, one).any()


def test_content_that_covers_a_part_of_the_prompt():
    one = chain(History.of(Request(0, 0, 40, 8, content=(7,), content_grain=16)), 40)
    two = chain(History.of(Request(1, 0, 40, 8, content=(7,), content_grain=16)), 40)
    assert (one[:16] == two[:16]).all()
    assert not np.isin(one[16:], two).any()


def test_a_fork_keeps_what_was_and_goes_its_own_way():
    request = Request(0, 0, 10, 50)
    parent = History.of(request)
    child = parent.fork(request, 1, 30)
    grandchild = child.fork(request, 2, 35)
    brother = child.fork(request, 3, 35)
    chains = [chain(history, 50) for history in (parent, child, grandchild, brother)]
    for (one, two), shared in {(0, 1): 30, (1, 2): 35, (1, 3): 35, (2, 3): 35, (0, 3): 30}.items():
        assert (chains[one][:shared] == chains[two][:shared]).all()
        assert not np.isin(chains[one][shared:], chains[two]).any()


def test_a_fork_before_anything_is_generated_shares_the_prompt_alone():
    request = Request(0, 0, 10, 50)
    parent, child = History.of(request), History.of(request).fork(request, 1, 10)
    assert (chain(parent, 30) == chain(child, 30)).sum() == 10


@pytest.mark.parametrize("number", [1, 1000])
def test_no_two_tokens_of_many_requests_are_equal(number):
    histories = [History.of(Request(name, 0, 100, 100)) for name in range(number)]
    found, _ = identities(histories, [150] * number)
    assert len(np.unique(found)) == 150 * number
