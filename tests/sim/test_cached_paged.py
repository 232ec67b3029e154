"""Paged memory with V0's prefix caching: what is shared, what need not be computed, what is evicted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Capacity, Request, Sequence, Transfers, allocator
from sim.allocators.cached_paged import CachedPagedAllocator
from sim.allocators.paged import PagedAllocator
from sim.beams import fork
from sim.decode_set import DecodeSet
from sim.link import Link
from sim.pools.hashed_blocks import HashedPool
from tests.sim.story import Story, ask, memory, scheduled

A = (1, 2, 3, 4, 5, 6, 7, 8)


def cached(slots: int = 48, **fields) -> CachedPagedAllocator:
    return memory("paged", slots=slots, longest=200, prefix_caching=True, **fields)


class Noted(Sequence):
    """A sequence that tells what its admission found cached."""


def admit(over, name: int, prompt: int, output: int = 9, content=A, grain: int = 4) -> Noted:
    request = Request(name, 0, prompt, output, content=content, content_grain=grain)
    sequence = Noted(request, 0, 0, prompt + output - 1)
    request.sequences.append(sequence)
    sequence.cached = over.admit(sequence, prompt)
    return sequence


def step(over, *sequences: Sequence) -> int:
    """The sequences gain a token each; the number of blocks copied."""
    copies = sum(over.append(sequence) for sequence in sequences)
    for sequence in sequences:
        sequence.origin += 1
        over.num_tokens += 1
    over.num_ticks += 1
    over.check_integrity()
    return copies


def test_the_option_gives_another_class_and_leaves_the_plain_one_alone():
    assert type(memory("paged", slots=48)) is PagedAllocator
    assert type(memory("paged", slots=48, prefix_caching=False)) is PagedAllocator
    assert type(cached()) is CachedPagedAllocator


def test_equal_prompts_share_all_blocks_and_compute_all_in_the_same_step():
    over = cached()
    first, second = admit(over, 0, 12), admit(over, 1, 12)
    assert first.block_table == second.block_table == [0, 1, 2]
    assert (first.cached, second.cached) == (0, 0)
    usage = over.usage()
    assert (usage.token_states, usage.free, over.blocks_saved) == (12, 36, 3)


def test_the_last_full_block_counts_as_computed_when_the_one_behind_it_is_full():
    """Prompt 12, blocks of 4: two flags at once, the third when the sequence has 16 tokens."""
    over = cached()
    first = admit(over, 0, 12, 20)
    over.computed(first)
    longer = Request(9, 0, 16, 1, content=A, content_grain=4)
    assert over.cached_tokens(longer, 16) == 8
    for _ in range(4):
        assert over.cached_tokens(longer, 16) == 8
        step(over, first)
    assert over.cached_tokens(longer, 16) == 12


def test_the_last_block_of_a_table_is_always_computed():
    over = cached()
    over.computed(admit(over, 0, 16))
    assert admit(over, 1, 8).cached == 4
    assert admit(over, 2, 9).cached == 8


def test_what_was_computed_is_found_after_its_end():
    over = cached()
    first = admit(over, 0, 12, 1)
    over.computed(first)
    over.free(first)
    assert over.usage().free == 48
    second = admit(over, 1, 14)
    assert second.block_table[:3] == [0, 1, 2]
    assert second.cached == 8


def test_a_prompt_that_ends_inside_a_block_is_shared_and_parted_by_copies():
    """Prompt of 10: blocks 0, 1 and half of 2. The first to write copies, the last writes in place."""
    over = cached()
    first, second = admit(over, 0, 10), admit(over, 1, 10)
    assert first.block_table == second.block_table == [0, 1, 2]
    assert over.shares_tail(first)
    assert over.shares_tail(second)
    assert step(over, first, second) == 1
    assert first.block_table == [0, 1, 3]
    assert second.block_table == [0, 1, 2]
    assert over.usage().token_states == 8 + 3 + 3


def test_a_prompt_of_another_length_shares_full_blocks_only():
    over = cached()
    admit(over, 0, 10)
    assert admit(over, 1, 11).block_table == [0, 1, 3]


def test_who_wrote_on_in_a_shared_block_copies_when_another_joins():
    """The block is still known by the two tokens that the prompt has in it."""
    over = cached()
    first = admit(over, 0, 10)
    over.computed(first)
    decodes = DecodeSet()
    decodes.join(first)
    assert over.append(first) == 0
    decodes.advance()
    over.num_tokens += 1
    second = admit(over, 1, 10)
    assert second.block_table == [0, 1, 2]
    assert decodes.copy_pending == [first]
    assert over.append(first) == 1
    over.check_integrity()
    assert over.usage().token_states == 8 + 3 + 2


def test_a_block_filled_by_decoding_is_not_known_by_its_beginning():
    over = cached()
    first = admit(over, 0, 10)
    over.computed(first)
    step(over, first)
    step(over, first)  # 12 tokens: the third block is full
    assert admit(over, 1, 10).block_table == [0, 1, 3]


def test_a_preempted_request_finds_what_it_generated():
    """12 + 5 tokens without content of anybody else's: four full blocks, of which three count as computed."""
    over = cached()
    first = admit(over, 0, 12, 20, content=None)
    over.computed(first)
    for _ in range(5):
        step(over, first)
    over.free(first)
    first.request.preemptions += 1
    assert over.admit(first, 18) == 12
    assert first.block_table == [0, 1, 2, 3, 5]


def test_the_next_turn_of_a_conversation_finds_what_was_answered():
    """A prompt of 8 and an answer of 8 tokens, of which the last has no slot: blocks 0 to 2, two of them computed."""
    over = cached()
    first = Request(0, 0, 8, 8, content=(1,), content_ends=(8,), output_content=2)
    sequence = Sequence(first, 0, 0, 15)
    first.sequences.append(sequence)
    over.admit(sequence, 8)
    over.computed(sequence)
    for _ in range(7):
        step(over, sequence)
    over.free(sequence)
    turn = Request(1, 0, 20, 4, content=(1, 2, 3), content_ends=(8, 16, 20))
    assert over.cached_tokens(turn, 20) == 8
    following = Sequence(turn, 0, 0, 23)
    turn.sequences.append(following)
    assert over.admit(following, 20) == 8
    assert following.block_table == [0, 1, 2, 4, 5]


def test_forks_share_and_copy_beside_the_cache():
    over = cached()
    parent = admit(over, 0, 10)
    over.computed(parent)
    child = fork(over, parent)
    parent.request.sequences.append(child)
    stranger = admit(over, 1, 10)
    assert step(over, parent, child, stranger) == 2
    tables = [parent.block_table, child.block_table, stranger.block_table]
    assert tables == [[0, 1, 3], [0, 1, 4], [0, 1, 2]]


def test_swapped_blocks_are_found_again_on_either_side():
    """Two equal prompts: the host holds their full blocks once, and so does the device when both are back."""
    over = cached()
    first, second = admit(over, 0, 9), admit(over, 1, 9)
    over.computed(first)
    over.computed(second)
    assert over.swap_out(first.request) == over.swap_out(second.request) == 3
    over.check_integrity()
    assert first.block_table[:2] == second.block_table[:2]
    assert over.host_pool.num_used == 4
    assert over.usage().free == 48
    over.swap_in(first.request)
    over.swap_in(second.request)
    over.check_integrity()
    assert first.block_table[:2] == second.block_table[:2] == [0, 1]
    assert over.pool.num_used == 4


def test_who_ran_last_is_evicted_last():
    """Six blocks. Request 0 is admitted first and decodes on; 1 ends before it, so its blocks go first."""
    over = cached(24)
    first = admit(over, 0, 4, 9, content=(1,))
    second = admit(over, 1, 8, 1, content=(2, 3))
    for sequence in (first, second):
        over.computed(sequence)
    over.free(second)
    step(over, first)  # takes block 3, and uses block 0 once more
    over.free(first)
    # never handed out: 4, 5; then of request 1 the deeper block, and those of request 0 last
    assert admit(over, 2, 24, content=None).block_table == [4, 5, 2, 1, 3, 0]


def test_a_run_hits_and_frees_all():
    story = Story(
        scheduled("vllm_v0", cached(200)),
        ask((0, 20, 5), (50, 20, 5), (51, 20, 5), content=A, content_grain=4),
    )
    assert story.summary["requests_finished"] == 3
    assert story.summary["prefix_hit_tokens"] == 2 * 16


def test_fields_of_the_plain_one_are_kept():
    over = allocator["paged"](
        Capacity(1, 64, 50), block_size=8, watermark=0.1, num_host_blocks=7, prefix_caching=True
    )
    assert (over.num_slots, over.watermark_blocks, over.host_pool.num_blocks) == (400, 5, 7)


class Reference:
    """V0's evictor by a walk over all free blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.unmade = list(range(num_blocks))
        self.freed: dict[int, tuple[int, int]] = {}  # block to (last use, depth), in order of release

    def take(self) -> int:
        if self.unmade:
            return self.unmade.pop(0)
        block = next(iter(self.freed))
        for each, (used, depth) in self.freed.items():
            if self.freed[block][0] < used:
                break
            if self.freed[block][1] < depth:
                block = each
        del self.freed[block]
        return block


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 6)), max_size=60))
def test_eviction_is_that_of_a_walk_over_all_free_blocks(events):
    pool, reference = HashedPool(9), Reference(9)
    tables: list[list[int]] = []
    now = 0
    for what, index, number in events:
        if what < 2 and number <= pool.num_free:
            table = pool.take(number)
            assert table == [reference.take() for _ in range(number)]
            tables.append(table)
        elif what == 2 and tables:
            table = tables.pop(index % len(tables))
            now = max(0, now + number - 3)  # a block may be freed long after it was used
            pool.release(table, now=now)
            reference.freed |= {block: (now, depth) for depth, block in enumerate(table)}
        elif what == 3 and reference.freed:
            block = sorted(reference.freed)[index % len(reference.freed)]
            used, depth = reference.freed.pop(block)
            pool.hold(block)
            pool.release((block,), depth, used)  # found, and let go without a use
            reference.freed[block] = used, depth
    pool.check_integrity(tables)


@pytest.mark.parametrize(("held_again", "evicted"), [(False, 1), (True, 5)])
def test_the_evictor_looks_no_further_than_the_first_that_was_used_later(held_again, evicted):
    """Freed: 0 and 1, used at 9; 2, used at 12; 3 to 5, used at 5 and deeper, which 2 hides while it is free."""
    pool = HashedPool(6)
    pool.take(6)
    pool.release([0, 1], now=9)
    pool.release([2], now=12)
    pool.release([3, 4, 5], first=2, now=5)
    if held_again:
        pool.hold(2)
    assert pool.take() == [evicted]


def test_a_key_has_one_block_and_a_full_duplicate_gives_way():
    pool = HashedPool(4)
    one, two = pool.take(2)
    pool.rename(one, "a")
    with pytest.raises(ValueError, match="block 0 has the content 'a' already"):
        pool.rename(two, "a")
    assert pool.promote(two, "a", 0) == one
    assert pool.references[:2] == [2, 0]
    with pytest.raises(ValueError, match="double free of block 1"):
        pool.release((two,))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("vllm_v1", {}), ("aisimulate", {}), ("sarathi", {}), ("vllm_v0", {"chunked_prefill": True})],
)
@pytest.mark.parametrize("budget", [10, 16, 20])
def test_a_prompt_in_chunks_is_found_whole_and_within_the_budget(kind, fields, budget):
    """The second prompt equals the first, whose chunks end inside of blocks."""
    over = memory("paged", slots=400, longest=100, prefix_caching=True)
    said = {"content": (1, 2, 3, 4), "content_grain": 16}
    requests = [Request(number, number * 10**9, 64, 2, **said) for number in range(2)]
    story = Story(scheduled(kind, over, max_num_batched_tokens=budget, **fields), requests)
    assert story.column("requests", "cached_tokens") == [0, 60]
    spent = zip(story.column("steps", "prefill_tokens"), story.column("steps", "decode_seqs"), strict=True)
    assert max(prompt + decodes for prompt, decodes in spent) <= budget


def hosted(over, *sequences: Sequence) -> None:
    for sequence in sequences:
        over.swap_out(sequence.request)
        over.check_integrity()


def back(over, *sequences: Sequence) -> None:
    for sequence in sequences:
        over.swap_in(sequence.request)
        over.check_integrity()


def test_what_comes_back_less_precise_is_not_found_as_what_was_computed():
    """A prompt finds the blocks that never left; those that came back are for who was away as well."""
    over = cached(slots=200)
    over.quantization = "int8"
    first, second = admit(over, 0, 12), admit(over, 1, 12)
    for sequence in (first, second):
        over.computed(sequence)
    kept = first.block_table
    hosted(over, first, second)
    assert first.block_table == second.block_table  # once on the host
    third = admit(over, 2, 12)
    assert (third.block_table, third.cached) == (kept, 8)
    back(over, first, second)
    assert first.block_table == second.block_table
    assert not {*first.block_table} & {*third.block_table}
    fourth = admit(over, 3, 12)
    assert fourth.block_table == kept


def test_what_follows_from_less_precise_blocks_is_not_found():
    over = cached(slots=200)
    over.quantization = "int8"
    first = admit(over, 0, 8, content=A, output=20)
    first.request.output_content = 77
    over.computed(first)
    hosted(over, first)
    back(over, first)
    for _ in range(12):
        step(over, first)
    table = first.block_table
    over.free(first)
    for sequence in (admit(over, 1, 20), admit(over, 2, 24, content=(*A, 77))):
        assert not {*sequence.block_table} & {*table}


def in_flight(slots: int = 200) -> tuple[CachedPagedAllocator, Link]:
    """A block takes 10 ns either way."""
    over = cached(slots=slots)
    over.link = Link(Transfers(None, None, 1, copy_latency_us=0.01, asynchronous=True))
    return over, over.link


def test_a_block_in_flight_is_found_and_is_whose_who_found_it():
    over, link = in_flight()
    first = admit(over, 0, 12)
    over.computed(first)
    table = first.block_table
    hosted(over, first)
    assert (over.usage().internal, over.yielding) == (12, 3)
    second = admit(over, 1, 10)
    assert second.block_table[:2] == table[:2]
    assert (over.usage().token_states, over.usage().internal, over.yielding) == (10, 4, 1)
    link.now = 30
    over.land(30)
    assert (over.usage().token_states, over.usage().internal, over.yielding) == (10, 0, 0)
    over.check_integrity()


def test_who_writes_into_a_block_in_flight_copies_it_first():
    over, link = in_flight()
    first = admit(over, 0, 10)
    over.computed(first)
    hosted(over, first)
    second, third = admit(over, 1, 10), admit(over, 2, 10)
    over.computed(second)
    assert over.shares_tail(second)
    over.free(third)
    assert step(over, second) == 1
    link.now = 30
    over.land(30)
    assert step(over, second) == 0
    back(over, first)
    link.now = 60
    over.land(60)
    for sequence in (first, second):
        over.free(sequence)
    over.check_integrity()
    assert over.num_held == over.yielding == 0
