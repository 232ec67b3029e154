"""The free queue against a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.pools.free_queue import FreeQueue


@given(
    size=st.integers(0, 12),
    moves=st.lists(
        st.tuples(st.sampled_from(["take", "first", "last", "remove"]), st.integers(0, 11)), max_size=60
    ),
)
def test_it_is_a_list_that_is_cut_at_its_head(size, moves):
    queue, plain = FreeQueue(range(size)), list(range(size))
    held: list[int] = []
    first: set[int] = set()  # put at the head, where nothing is removed
    for move, amount in moves:
        if move == "take":
            count = min(amount, len(plain))
            taken = queue.take(count)
            assert taken == plain[:count]
            del plain[:count]
            held += taken
            first -= set(taken)
        elif move == "remove":
            there = [block for block in plain if block not in first]
            if there:
                block = there[amount % len(there)]
                queue.remove(block)
                plain.remove(block)
                held.append(block)
        else:
            put, held = held[:amount], held[amount:]
            if move == "first":
                queue.put_first(put)
                plain = put + plain
                first |= set(put)
            else:
                queue.put_last(put)
                plain += put
        assert (len(queue), list(queue)) == (len(plain), plain)


def test_places_that_do_not_count_are_cleared_away():
    """A full house whose blocks are found again and again, and never handed out."""
    queue = FreeQueue(range(10))
    for _ in range(1000):
        queue.remove(3)
        queue.put_last((3,))
    assert list(queue) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 3]
    assert len(queue._queue) < 200
