"""Named streams: what they depend on, and what not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads import Streams


def first(streams: Streams, name: str) -> int:
    return int(streams(name).bit_generator.random_raw())


def test_a_name_begins_the_same_stream_whoever_asks_and_in_whatever_order() -> None:
    one, other = Streams(3), Streams(3)
    assert [first(one, "arrivals"), first(one, "lengths"), first(one, "arrivals")] == [
        first(other, "arrivals"),
        first(other, "lengths"),
        first(other, "arrivals"),
    ]


def test_streams_are_the_same_numbers_on_every_machine() -> None:
    assert first(Streams(0), "arrivals") == 15065961336660894620
    assert first(Streams(0, 1), "arrivals") == 3823814651090387194


@given(st.integers(0, 2**64), st.integers(0, 1000))
def test_names_replications_and_seeds_all_make_a_difference(seed: int, replication: int) -> None:
    streams = [
        Streams(seed, replication)("arrivals"),
        Streams(seed, replication)("lengths"),
        Streams(seed, replication + 1)("arrivals"),
        Streams(seed + 1, replication)("arrivals"),
    ]
    assert len({int(stream.bit_generator.random_raw()) for stream in streams}) == 4


@pytest.mark.parametrize(("seed", "replication", "name"), [(-1, 0, "seed"), (0, -2, "replication")])
def test_negative_numbers_are_refused_by_name(seed: int, replication: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got {min(seed, replication)}"):
        Streams(seed, replication)
