"""The block pool: a stack of free blocks, and reference counts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import IntegrityError
from sim.pools.block_pool import BlockPool, OutOfBlocks


def test_blocks_come_from_the_end_and_return_there():
    pool = BlockPool(6)
    assert pool.take(2) == [5, 4]
    assert pool.take() == [3]
    pool.release([5, 4])
    assert pool.take(3) == [4, 5, 2]
    assert (pool.num_free, pool.num_used) == (2, 4)


def test_an_empty_take_takes_nothing():
    pool = BlockPool(2)
    assert pool.take(0) == []
    assert pool.num_free == 2
    assert BlockPool(0).take(0) == []


def test_asking_for_too_much_takes_nothing():
    pool = BlockPool(4)
    pool.take(2)
    with pytest.raises(OutOfBlocks, match="asked for 3 blocks, 2 of 4 are free"):
        pool.take(3)
    assert pool.num_free == 2
    pool.take(2)
    with pytest.raises(OutOfBlocks, match="asked for 1 blocks, 0 of 4 are free"):
        pool.take()


def test_a_pool_has_no_fewer_than_no_blocks():
    with pytest.raises(ValueError, match="num_blocks must be at least 0, got -1"):
        BlockPool(-1)


def test_a_block_is_free_when_its_last_reference_goes():
    pool = BlockPool(4)
    table = pool.take(2)
    pool.share(table)
    pool.share(table[:1])
    assert pool.extra_references == 3
    pool.release(table)
    assert (pool.num_free, pool.extra_references) == (2, 1)
    pool.release(table[1:])
    assert pool.num_free == 3
    pool.release(table[:1])
    assert (pool.num_free, pool.extra_references) == (3, 0)
    pool.release(table[:1])
    assert pool.num_free == 4


@pytest.mark.parametrize("again", [[3], [2, 3], [3, 3]])
def test_a_double_free_is_an_error(again):
    pool = BlockPool(4)
    pool.take(2)
    pool.release([3])
    with pytest.raises(ValueError, match="double free of block 3"):
        pool.release(again)


def test_a_block_freed_twice_at_once_is_an_error():
    pool = BlockPool(4)
    pool.take(2)
    with pytest.raises(ValueError, match="double free of block 2"):
        pool.release([2, 2])


def test_a_free_block_cannot_be_shared():
    pool = BlockPool(4)
    pool.take(1)
    with pytest.raises(ValueError, match="block 0 is free and cannot be shared"):
        pool.share([3, 0])


def test_integrity_names_what_does_not_add_up():
    pool = BlockPool(4)
    table = pool.take(2)
    pool.check_integrity([table])
    pool.share(table[:1])
    pool.check_integrity([table, table[:1]])
    with pytest.raises(IntegrityError, match=r"device block 3: references\(2\) != tables holding it\(1\)"):
        pool.check_integrity([table])
    with pytest.raises(IntegrityError, match=r"references\(0\) != tables holding it\(1\)"):
        pool.check_integrity([table, table[:1], [0]])
    pool.extra_references = 0
    with pytest.raises(IntegrityError, match=r"references\(3\) - used\(2\) != extra\(0\)"):
        pool.check_integrity([table, table[:1]])


actions = st.lists(st.tuples(st.sampled_from("tsr"), st.integers(0, 5), st.integers(0, 99)), max_size=60)


@given(num_blocks=st.integers(0, 12), actions=actions)
def test_references_against_a_counter(num_blocks, actions):
    """Tables are taken, shared and released in any order; a counter knows how often each block is held."""
    pool = BlockPool(num_blocks, "host")
    tables: list[list[int]] = []
    for action, size, which in actions:
        if action == "t":
            if size > pool.num_free:
                with pytest.raises(OutOfBlocks):
                    pool.take(size)
                continue
            expected = pool.free[::-1][:size]
            tables.append(pool.take(size))
            assert tables[-1] == expected
        elif action == "s" and tables:
            table = tables[which % len(tables)]
            pool.share(table)
            tables.append(list(table))
        elif action == "r" and tables:
            pool.release(tables.pop(which % len(tables)))
        held = Counter(block for table in tables for block in table)
        assert pool.references == [held[block] for block in range(num_blocks)]
        assert sorted(pool.free) == [block for block in range(num_blocks) if not held[block]]
        assert pool.extra_references == sum(held.values()) - len(held)
        pool.check_integrity(tables)
