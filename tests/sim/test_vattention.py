"""vAttention: page groups in ranges of virtual memory, and what becomes of them when their holders leave."""

from __future__ import annotations

import pytest

from sim import Admission, Capacity, Request, Sequence, allocator
from sim.errors import UserError
from sim.pools.block_pool import OutOfBlocks
from sim.pools.group_pool import GroupPool
from tests.sim.story import Story, ask, memory, scheduled

LLAMA_3_8B = {"token_bytes": 8 * 128 * 2, "num_layers": 32}


def vattention(num_groups: int = 1000, **fields):
    return allocator["vattention"](Capacity(1, 8192, num_groups, **LLAMA_3_8B), **fields)


def admit(over, name: int, prompt: int, output: int) -> Sequence:
    sequence = Sequence(Request(name, 0, prompt, output), 0, 0, prompt + output - 1)
    sequence.request.sequences.append(sequence)
    over.admit(sequence, prompt)
    return sequence


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"page_size": "2 MiB"}, 1024),
        ({"page_size": "64 KiB"}, 32),
        ({"page_size": "128 KiB"}, 64),
        ({"page_size": "256 KiB"}, 128),
        ({"page_size": "2 MiB", "megacache": True}, 32),
        ({"page_size": "64 KiB", "megacache": True}, 1),
    ],
)
def test_tokens_of_a_page_of_llama_3_8b(fields, tokens):
    assert vattention(**fields).block_size == tokens


def test_what_a_page_cannot_hold_whole_is_lost():
    """OPT-13B, 10,240 bytes a token and layer: 6 tokens in 65,536 bytes. 1000 slots are 156 pages, for 936 tokens."""
    over = allocator["vattention"](
        Capacity(1000, 2048, token_bytes=10_240, num_layers=40), page_size="64 KiB", watermark=0.0
    )
    assert (over.block_size, over.pool.num_blocks) == (6, 156)
    assert over.usage().external == 64


def test_a_page_too_small_for_a_token_is_refused():
    with pytest.raises(UserError, match="a page of 64 KiB holds no token, which takes 409600 bytes of it"):
        allocator["vattention"](
            Capacity(1000, 2048, token_bytes=10_240, num_layers=40), page_size="64 KiB", megacache=True
        )


def test_the_watermark_stays_free_at_admission_and_serves_those_that_run():
    over = memory("vattention", slots=160, watermark=0.2)  # ten groups of 16, two of them watermark
    asked = Request(9, 0, 129, 1)
    assert over.admission(asked, 129) is Admission.NEVER
    assert "129 tokens need 9 page groups of 16 tokens, the pool has 10 and keeps 2" in over.refusal(
        asked, 129
    )
    first = admit(over, 0, 112, 40)  # seven groups
    assert over.admission(asked, 17) is Admission.LATER
    assert over.admission(asked, 16) is Admission.OK
    for _ in range(33):
        assert over.can_append(first.request)
        over.append(first)
        first.origin += 1
        over.num_tokens += 1
    assert len(first.block_table) == 10
    assert not over.can_append(first.request), "no group is free, though the last has room"


def test_waste_is_the_rest_of_the_last_group():
    over = memory("vattention", slots=160)
    admit(over, 0, 20, 6)  # 25 tokens in the end, in 32 slots
    usage = over.usage()
    assert (usage.token_states, usage.reserved, usage.internal, usage.free) == (20, 5, 7, 128)


def test_groups_stay_mapped_and_serve_the_next_one():
    over = memory("vattention", slots=160)
    first = admit(over, 0, 40, 2)
    groups = list(first.block_table)
    over.free(first)
    assert over.usage().free == 160, "what is overcommitted is free"
    second = admit(over, 1, 17, 2)
    assert second.block_table == groups[:2]
    assert over.figures == {"mapped_groups": 3, "mapped_groups_waited_for": 3, "unmapped_groups": 0}
    over.check_integrity()


def test_eager_reclamation_unmaps_at_once():
    over = memory("vattention", slots=160, reclamation="eager")
    over.free(admit(over, 0, 40, 2))
    admit(over, 1, 17, 2)
    assert over.figures == {"mapped_groups": 5, "mapped_groups_waited_for": 5, "unmapped_groups": 3}
    over.check_integrity()


def ranges(*sizes: int, num_blocks: int = 12) -> GroupPool:
    """A pool whose ranges 0, 1, ... have so many groups mapped and nobody in them."""
    pool = GroupPool(num_blocks)
    places = [pool.enter(size) for size in sizes]
    for place, size in zip(places, sizes, strict=True):
        pool.extend(place, size)
    for place in places:
        pool.leave(place)
    return pool


@pytest.mark.parametrize(
    ("sizes", "count", "chosen"),
    [
        ((5, 4, 2), 2, 2),  # the fewest that are enough
        ((5, 4, 2), 3, 1),
        ((5, 2, 5), 4, 0),  # of equals the first
        ((0, 4, 2), 2, 0),  # an empty first range always wins
        ((1, 4, 2), 2, 0),  # and so does one with too few, as those with enough have more
        ((5, 2), 6, 0),  # none has enough
    ],
)
def test_best_fit_starts_from_the_first_range(sizes, count, chosen):
    assert ranges(*sizes).enter(count) == chosen


def test_groups_are_unmapped_from_the_highest_range_down_and_only_beyond_what_is_needed():
    """Twelve groups in ranges of 4, 4, 4. Range 2 is taken for two groups; range 3 then asks for five."""
    pool = ranges(4, 4, 4)
    first, second, third = (list(groups) for groups in pool.mapped)
    taken = [pool.enter(4), pool.enter(4), pool.enter(4)]
    assert taken == [0, 1, 2]
    pool.extend(2, 2)
    pool.extend(0, 4)
    pool.leave(0)
    assert pool.num_free == 10
    newcomer = pool.enter(5)
    assert newcomer == 0
    # Range 0 has four; the fifth is the last of range 2, beyond the two that it needs.
    assert pool.extend(newcomer, 5) == [*first, third[3]]
    assert pool.extend(newcomer, 8) == [third[2], second[3], second[2]]
    assert pool.mapped[2] == third[:2]
    assert (pool.num_free, pool.num_unmapped) == (2, 4)
    with pytest.raises(OutOfBlocks, match="asked for 3 groups, 2 of 12 are free"):
        pool.extend(newcomer, 11)
    pool.check_integrity([pool.mapped[0], third[:2]])


def test_decoding_sequences_do_not_wait_for_what_is_mapped_ahead():
    """Prompts of 10 tokens and 40 outputs: one group at admission, three while decoding."""
    asked = ((0, 10, 40), (0, 10, 40))
    ahead = Story(scheduled("vllm_v0", memory("vattention", slots=320)), ask(*asked)).summary
    assert (ahead["mapped_groups"], ahead["mapped_groups_waited_for"]) == (8, 2)
    behind = Story(
        scheduled("vllm_v0", memory("vattention", slots=320, map_ahead=False)), ask(*asked)
    ).summary
    assert (behind["mapped_groups"], behind["mapped_groups_waited_for"]) == (8, 8)


def test_a_preempted_request_comes_back_to_its_range():
    """Three groups of 16; both grow into a second one at 17 tokens, and the later one gives way."""
    story = Story(scheduled("vllm_v0", memory("vattention", slots=48)), ask((0, 12, 12), (0, 12, 12)))
    assert story.summary["preemptions"] > 0
    assert story.summary["requests_finished"] == 2
