"""The token allocator: one slot a token, in LightLLM's order."""

from __future__ import annotations

import pytest

from sim import Admission, Capacity, Request, Sequence, allocator
from sim.beams import fork
from sim.errors import IntegrityError
from sim.pools.block_pool import OutOfBlocks
from sim.pools.token_pool import TokenPool
from tests.sim.story import Story, ask, memory, scheduled


def admit(over, name: int, prompt: int, output: int) -> Sequence:
    sequence = Sequence(Request(name, 0, prompt, output), 0, 0, prompt + output - 1)
    sequence.request.sequences.append(sequence)
    over.admit(sequence, prompt)
    return sequence


def test_slots_come_in_order_and_come_again_in_the_order_they_were_freed():
    """What LightLLM's array with a mark does: [0 1 2 | 3 4 5 6 7], free 1, 0: [2 | 1 0 3 ...]."""
    pool = TokenPool(8)
    assert pool.take(3) == [0, 1, 2]
    pool.release([1, 0])
    assert pool.take(3) == [1, 0, 3]
    pool.release([3])
    pool.release([2, 1])
    assert pool.take(4) == [2, 1, 3, 4]


def test_who_shares_a_slot_keeps_it():
    pool = TokenPool(4)
    pool.take(3)
    pool.share([0, 2])
    pool.share([2])
    assert pool.references == [2, 1, 3, 0]
    assert pool.extra_references == 3
    pool.release([0, 1, 2])
    assert pool.references == [1, 0, 2, 0]
    assert pool.take(1) == [1]
    pool.release([2, 0])
    pool.release([2])
    assert pool.num_free == 3
    assert pool.extra_references == 0


def test_too_many_slots_are_refused_and_a_double_free_shows():
    pool = TokenPool(3)
    (slot,) = pool.take(1)
    with pytest.raises(OutOfBlocks, match="asked for 3 blocks, 2 of 3 are free"):
        pool.take(3)
    assert pool.num_free == 2
    pool.release([slot])
    pool.release([slot])
    with pytest.raises(IntegrityError, match=r"distinct free\(3\) != free\(4\)"):
        pool.check_integrity([])


def test_nothing_is_wasted():
    over = memory("token", slots=30)
    sequence = admit(over, 0, 7, 5)
    assert over.slots(sequence).tolist() == list(range(7))
    usage = over.usage()
    assert (usage.token_states, usage.reserved, usage.internal, usage.external, usage.free) == (
        7,
        0,
        0,
        0,
        23,
    )


def test_all_slots_may_be_filled_and_the_next_token_is_refused():
    over = memory("token", slots=12)
    asked = Request(9, 0, 12, 2)
    assert over.admission(asked, 12) is Admission.OK
    assert over.admission(asked, 13) is Admission.NEVER
    assert "13 tokens need 13 blocks of 1 slots, the pool has 12" in over.refusal(asked, 13)
    sequence = admit(over, 0, 12, 2)
    assert over.admission(asked, 1) is Admission.LATER
    assert not over.can_append(sequence.request)


def test_a_fork_shares_all_slots_and_copies_none():
    over = memory("token", slots=20)
    parent = admit(over, 0, 5, 9)
    child = fork(over, parent)
    parent.request.sequences.append(child)
    assert over.blocks_saved == 5
    for sequence in (parent, child):
        assert over.append(sequence) == 0
        sequence.origin += 1
        over.num_tokens += 1
    assert over.slots(parent).tolist() == [0, 1, 2, 3, 4, 5]
    assert over.slots(child).tolist() == [0, 1, 2, 3, 4, 6]
    over.check_integrity()


def test_given_blocks_are_slots():
    assert allocator["token"](Capacity(1600, 64, num_blocks=100)).num_slots == 100


def test_a_run_grows_token_by_token_and_swaps_when_slots_run_out():
    """Two requests of 6 + 5 tokens in 16 slots: at 8 tokens each the pool is full, and the later one leaves."""
    story = Story(
        scheduled("vllm_v0", memory("token", slots=16), preemption="swap"), ask((0, 6, 5), (0, 6, 5))
    )
    assert story.summary["preemptions"] == 1
    assert story.summary["swapped_out_blocks"] == story.summary["swapped_in_blocks"] == 8
    assert story.summary["internal_share"] == story.summary["reserved_share"] == 0
    assert story.summary["requests_finished"] == 2
