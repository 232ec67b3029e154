"""Where chunks go: the buddy system by its splits and merges, first and best fit against a bitmap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import IntegrityError
from sim.pools.placement import PLACEMENTS, BestFit, Buddy, FirstFit

PAPER = [
    (0, 8192),
    (8192, 4096),
    (12288, 2048),
    (14336, 1024),
    (15360, 256),
    (15616, 64),
    (15680, 32),
    (15712, 16),
]


def test_a_range_starts_as_the_powers_of_its_binary_form():
    assert Buddy(15_728).chunks() == PAPER
    assert Buddy(15_728).num_free == sum(size for _, size in PAPER) == 15_728
    assert Buddy(64).chunks() == [(0, 64)]
    assert Buddy(1).chunks() == [(0, 1)]


def test_buddy_halves_until_the_chunk_fits():
    memory = Buddy(64)
    assert memory.take(5) == 0  # takes 8
    assert memory.chunks() == [(8, 8), (16, 16), (32, 32)]
    assert memory.num_free == 56
    assert memory.take(9) == 16
    assert memory.take(32) == 32
    assert memory.chunks() == [(8, 8)]
    assert (memory.largest(), memory.too_small(8), memory.too_small(9)) == (8, 0, 8)


def test_buddy_takes_the_smallest_chunk_that_fits():
    memory = Buddy(15_728)
    assert memory.take(1000) == 14_336
    assert memory.take(17) == 15_680
    assert memory.take(16) == 15_712
    assert memory.take(16) == 15_616  # half of the 64
    assert memory.take(600) == 12_288  # half of the 2048


def test_buddies_merge_only_with_their_buddy():
    memory = Buddy(64)
    bases = [memory.take(16) for _ in range(4)]
    assert sorted(bases) == [0, 16, 32, 48]
    memory.give(16, 16)
    memory.give(32, 16)  # neighbours, and no buddies
    assert memory.chunks() == [(16, 16), (32, 16)]
    assert (memory.largest(), memory.num_free) == (16, 32)
    with pytest.raises(IntegrityError, match="no free chunk of 17 slots"):
        memory.take(17)
    memory.give(0, 16)
    assert memory.chunks() == [(0, 32), (32, 16)]
    memory.give(48, 16)
    assert memory.chunks() == [(0, 64)]


@pytest.mark.parametrize(
    ("size", "rounded"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (1025, 2048), (2048, 2048)]
)
def test_only_the_buddy_system_rounds(size, rounded):
    assert Buddy.rounded(size) == rounded
    assert FirstFit.rounded(size) == BestFit.rounded(size) == size


def test_first_fit_takes_the_lowest_and_best_fit_the_tightest():
    for placement, chosen in ((FirstFit, 0), (BestFit, 30)):
        memory = placement(100)
        assert [memory.take(size) for size in (20, 10, 8, 50)] == [0, 20, 30, 38]
        memory.give(0, 20)
        memory.give(30, 8)
        assert memory.chunks() == [(0, 20), (30, 8), (88, 12)]
        assert memory.too_small(13) == 20
        assert memory.take(7) == chosen


def test_a_chunk_given_back_merges_on_both_sides():
    memory = FirstFit(30)
    for base in (0, 10, 20):
        assert memory.take(10) == base
    assert memory.chunks() == []
    assert memory.largest() == 0
    memory.give(0, 10)
    memory.give(20, 10)
    memory.give(10, 10)
    assert memory.chunks() == [(0, 30)]


class Bitmap:
    """Slots one by one: what any placement must agree with."""

    def __init__(self, num_slots: int) -> None:
        self.taken = [False] * num_slots

    def gaps(self) -> list[tuple[int, int]]:
        found, base = [], None
        for slot, taken in enumerate([*self.taken, True]):
            if taken and base is not None:
                found.append((base, slot - base))
                base = None
            elif not taken and base is None:
                base = slot
        return found

    def mark(self, base: int, size: int, taken: bool) -> None:
        assert all(each is not taken for each in self.taken[base : base + size])
        self.taken[base : base + size] = [taken] * size


actions = st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 99)), max_size=60)


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        ("first_fit", lambda gaps: min(gaps, default=None)),
        ("best_fit", lambda gaps: min(gaps, key=lambda gap: (gap[1], gap[0]), default=None)),
    ],
)
@given(num_slots=st.integers(1, 120), actions=actions)
def test_fits_against_a_bitmap(kind, chosen, num_slots, actions):
    memory, bitmap = PLACEMENTS[kind](num_slots), Bitmap(num_slots)
    held = []
    for give, size, which in actions:
        if give and held:
            base, size = held.pop(which % len(held))
            memory.give(base, size)
            bitmap.mark(base, size, False)
        else:
            gap = chosen([gap for gap in bitmap.gaps() if gap[1] >= size])
            if gap is None:
                assert memory.largest() < size
                continue
            assert memory.take(size) == gap[0]
            held.append((gap[0], size))
            bitmap.mark(gap[0], size, True)
        assert memory.chunks() == bitmap.gaps()
        assert memory.num_free == bitmap.taken.count(False)
        assert memory.largest() == max([size for _, size in bitmap.gaps()], default=0)
        assert memory.too_small(9) == sum(size for _, size in bitmap.gaps() if size < 9)


@given(num_slots=st.integers(1, 300), actions=actions)
def test_buddy_against_its_definition(num_slots, actions):
    """Free chunks are aligned powers of two, merged as far as possible, and tile what nobody holds."""
    memory, bitmap = Buddy(num_slots), Bitmap(num_slots)
    whole = memory.chunks()
    held = []
    for give, size, which in actions:
        if give and held:
            base, size = held.pop(which % len(held))
            memory.give(base, size)
            bitmap.mark(base, memory.rounded(size), False)
        elif memory.rounded(size) > memory.largest():
            with pytest.raises(IntegrityError):
                memory.take(size)
        else:
            fitting = [free for _, free in memory.chunks() if free >= memory.rounded(size)]
            smallest = min(fitting)
            before = {base: free for base, free in memory.chunks() if free == smallest}
            base = memory.take(size)
            assert base in before
            held.append((base, size))
            bitmap.mark(base, memory.rounded(size), True)
        free = memory.chunks()
        assert memory.num_free == sum(size for _, size in free) == bitmap.taken.count(False)
        for base, size in free:
            assert size & (size - 1) == 0
            assert base % size == 0
            assert not any(bitmap.taken[base : base + size])
            assert (base ^ size, size) not in free, "two buddies that did not merge"
        assert memory.largest() == max([size for _, size in free], default=0)
        assert memory.too_small(9) == sum(size for _, size in free if size < 16)
    for base, size in held:
        memory.give(base, size)
    assert memory.chunks() == whole
