"""Hit rates of block caches: against a cache that sorts all its blocks, the optimum, and a published trace."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import Capacity, Request, UserError, allocator
from sim.prefixes.eviction import eviction
from sim.prefixes.foresight import NEVER_AGAIN
from sim.prefixes.hit_rate import BlockCache, hit_rate, infinite_hit_rate, next_uses
from tests.sim.story import Asked, Story, scheduled

SIZES = (1_000, 5_000, 10_000, 20_000, 30_000, 50_000, 100_000)
MOONCAKE = {
    "lru": ".0445 .1118 .2116 .2878 .3257 .3546 .3637",
    "fifo": ".0445 .1064 .1820 .2585 .2950 .3336 .3563",
    "lfu": ".0481 .0924 .1322 .2104 .2761 .3438 .3631",
}

prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=12)


def chained(names: list[list[int]]) -> list[list[int]]:
    """Blocks that stand for all before them, too."""
    return [[hash(tuple(each[: end + 1])) for end in range(len(each))] for each in names]


def sorted_cache(requests, capacity: int, kind: str) -> int:
    """Hits of a cache that looks at all blocks for every eviction."""
    there: dict[int, dict[str, int]] = {}
    hits = clock = 0
    for blocks in requests:
        hits += next((index for index, block in enumerate(blocks) if block not in there), len(blocks))
        for block in reversed(blocks):
            clock += 1
            if block not in there:
                if len(there) == capacity:
                    key = {
                        "lru": lambda name: there[name]["used"],
                        "fifo": lambda name: there[name]["created"],
                        "filo": lambda name: -there[name]["created"],
                        "mru": lambda name: -there[name]["used"],
                        "lfu": lambda name: (there[name]["uses"], there[name]["used"]),
                    }[kind]
                    del there[min(there, key=key)]
                there[block] = {"created": clock, "uses": 0}
            there[block]["used"] = clock
            there[block]["uses"] += 1
    return hits


@pytest.mark.parametrize("kind", ["lru", "fifo", "filo", "lfu", "mru"])
@given(names=prompts, capacity=st.integers(1, 8))
def test_against_a_cache_that_sorts(kind, names, capacity):
    requests = chained(names)
    total = sum(map(len, requests))
    expected = sorted_cache(requests, capacity, kind) / total if total else 0.0
    assert hit_rate(requests, capacity, eviction[kind]) == expected
    assert expected <= infinite_hit_rate(requests)


def optimum(requests, capacity: int) -> int:
    """The most hits that any choice of victims gives."""
    states = {frozenset(): 0}
    for blocks in requests:
        after: dict[frozenset, int] = {}
        for there, hits in states.items():
            hits += next((index for index, block in enumerate(blocks) if block not in there), len(blocks))
            reached = {there}
            for block in reversed(blocks):
                reached = {
                    (each - {gone}) | {block}
                    for each in reached
                    for gone in (each if block not in each and len(each) == capacity else [None])
                }
            for each in reached:
                after[each] = max(hits, after.get(each, 0))
        states = after
    return max(states.values())


@given(
    names=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), max_size=7),
    capacity=st.integers(1, 4),
)
def test_belady_is_the_bound(names, capacity):
    requests = chained(names)
    best = optimum(requests, capacity) / max(1, sum(map(len, requests)))
    assert hit_rate(requests, capacity, eviction["belady"]) == best
    for kind in ("lru", "fifo", "lfu", "mru", "filo"):
        assert hit_rate(requests, capacity, eviction[kind]) <= best


def test_the_beginning_of_a_prompt_outlives_its_end():
    cache = BlockCache(3, eviction["lru"])
    cache.put([1, 2, 3])
    cache.put([9])
    assert cache.leading([1, 2, 3]) == 2
    assert next_uses([[1, 2], [1], [2]]) == [[1, 2], [NEVER_AGAIN], [NEVER_AGAIN]]
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        BlockCache(0, eviction["lru"])


def served(names, pages, kind, output=1):
    """Prompt tokens that a server of one request at a time finds in a radix tree of so many pages."""
    over = allocator["radix"](Capacity(pages, 64), eviction=eviction[kind])
    requests = [
        Request(number, number, len(content), output, content=tuple(content), content_grain=1)
        for number, content in enumerate(names)
    ]
    return Story(scheduled("orca", over, max_num_seqs=1), requests).summary["prefix_hit_tokens"]


@given(
    names=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12),
    pages=st.integers(6, 12),
)
def test_no_server_finds_more_than_one_that_knows_the_future(names, pages):
    most = served(names, pages, "belady")
    for kind in ("lru", "fifo", "lfu", "mru", "filo"):
        assert served(names, pages, kind) <= most


def test_what_is_asked_for_last_goes_first_page_by_page():
    """Six pages: the second prompt takes three, and of the first what the third asks for stays."""
    names = [[1, 2, 3, 4, 5], [6, 7, 8], [1, 2, 3, 9]]
    assert served(names, 6, "lru") == 0
    assert served(names, 6, "belady") == 3


def test_what_depends_on_answers_cannot_be_foreseen():
    over = allocator["radix"](Capacity(64, 64), eviction=eviction["belady"])
    with pytest.raises(UserError, match="clients of a closed loop send what nobody can foresee"):
        Story(scheduled("orca", over), Asked([], clients=1))


@pytest.fixture(scope="module")
def conversations(shared):
    path = shared / "traces" / "mooncake_conversation_trace.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


@pytest.mark.parametrize("kind", MOONCAKE)
def test_the_hit_rates_of_mooncakes_conversations(kind, conversations):
    found = [hit_rate(conversations, size, eviction[kind]) for size in SIZES]
    assert [f"{rate:.4f}"[1:] for rate in found] == MOONCAKE[kind].split()


def test_an_infinite_cache_and_the_bound(conversations):
    assert f"{infinite_hit_rate(conversations):.4f}" == "0.3664"
    assert f"{hit_rate(conversations, 1000, eviction['belady']):.4f}" == "0.1907"
