"""Keys of blocks and identities of tokens, against the token lists that they stand for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.identity import History
from sim.prefixes.keys import prefix_keys
from sim.request import Request


@st.composite
def requests(draw, number: int) -> Request:
    """Prompts of few names, so that beginnings are often equal, with or without an end of their own."""
    names = draw(st.lists(st.integers(0, 1), max_size=4))
    runs = draw(st.lists(st.sampled_from([0, 1, 3, 4, 8]), min_size=len(names), max_size=len(names)))
    ends = tuple(sum(runs[: place + 1]) for place in range(len(runs)))
    own = draw(st.sampled_from([0, 0, 1, 5]))
    prompt = (ends[-1] if ends else 0) + own
    named = bool(names) and ends[-1] > 0
    return Request(
        number, 0, max(1, prompt), 9,
        content=tuple(names) if named else None, content_ends=ends if named else (),
        output_content=draw(st.sampled_from([None, 5, 6])),
    )  # fmt: skip


def spelled(request: Request, length: int) -> list[tuple]:
    """The tokens of branch 0: (name, where its run begins, place), or (request, place) for what is its own."""
    tokens: list[tuple] = []
    start = 0
    for name, end in zip(request.content or (), request.content_ends, strict=True):
        tokens += [(name, start, place) for place in range(start, end)]
        start = end
    tokens += [("own", request.id, place) for place in range(start, request.prompt_tokens)]
    output = request.output_content
    said = ("generated", request.id) if output is None else (output, request.prompt_tokens)
    tokens += [(*said, place) for place in range(request.prompt_tokens, length)]
    return tokens[:length]


@given(one=requests(0), other=requests(1), size=st.sampled_from([1, 2, 4, 16]), extra=st.integers(0, 9))
def test_blocks_have_equal_keys_where_names_and_places_are_equal(one, other, size, extra):
    lengths = [request.prompt_tokens + extra for request in (one, other)]
    mine, theirs = (
        prefix_keys(request, length // size, size)
        for request, length in zip((one, other), lengths, strict=True)
    )
    assert len(mine) == lengths[0] // size
    for block, (key, their_key) in enumerate(zip(mine, theirs, strict=False)):
        end = (block + 1) * size
        equal = spelled(one, end) == spelled(other, end)
        if key == their_key:
            assert equal
        elif (
            equal
        ):  # found less: behind an empty run that the other has not, or where not all of a prompt is named
            runs = [
                [pair for pair in zip(each.content or (), each.content_ends, strict=True) if pair[1] < end]
                for each in (one, other)
            ]
            assert runs[0] != runs[1] or block >= min(each.prompt_tokens for each in (one, other)) // size
    for first in range(len(mine) + 1):
        assert prefix_keys(one, len(mine), size, first) == mine[first:]


@given(one=requests(0), other=requests(1), extra=st.integers(0, 9))
def test_tokens_have_equal_identities_where_all_before_is_equal(one, other, extra):
    lengths = [request.prompt_tokens + extra for request in (one, other)]
    chains = [
        History.of(request).identities(0, length)[0].tolist()
        for request, length in zip((one, other), lengths, strict=True)
    ]
    for place, (mine, theirs) in enumerate(zip(*chains, strict=False)):
        assert (mine == theirs) == (spelled(one, place + 1) == spelled(other, place + 1))


def test_an_answer_is_found_by_the_prompt_that_repeats_it():
    first = Request(0, 0, 10, 7, content=(1,), content_ends=(10,), output_content=2)
    again = Request(1, 0, 20, 4, content=(1, 2, 3), content_ends=(10, 17, 20), output_content=4)
    assert prefix_keys(first, 4, 4) == prefix_keys(again, 4, 4)
    assert prefix_keys(again, 5, 4)[4] not in prefix_keys(first, 5, 4)


def test_tokens_behind_the_prompt_may_have_names_of_their_own():
    """A grain of 1 names tokens one by one; a trace's last name ends with the prompt."""
    told = Request(0, 0, 4, 9, content=tuple(range(12)), content_grain=1)
    prompt = Request(1, 0, 12, 1, content=tuple(range(12)), content_grain=1)
    assert prefix_keys(told, 3, 4) == prefix_keys(prompt, 3, 4)
    assert prefix_keys(told, 4, 4)[3] not in prefix_keys(prompt, 4, 4)
    tokens = [History.of(each).identities(0, 12)[0].tolist() for each in (told, prompt)]
    assert tokens[0] == tokens[1]
    trace = Request(2, 0, 4, 9, content=(0, 1, 2), content_grain=4)
    assert [*prefix_keys(trace, 3, 4)[1:]] == [*prefix_keys(Request(2, 0, 4, 9), 3, 4)[1:]]
