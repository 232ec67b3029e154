"""Blocks of several sizes: runs of pages, sizes that grow with a sequence, a size learned from lengths."""

from __future__ import annotations

import math

import pytest

from sim import Admission, Request, Sequence
from sim.beams import fork
from sim.errors import UserError
from sim.pools.block_pool import OutOfBlocks
from sim.pools.cached_runs import CachedRunPool
from sim.pools.run_pool import RunPool
from tests.sim.story import Story, ask, memory, scheduled


def admit(over, name: int, prompt: int, output: int = 40) -> Sequence:
    sequence = Sequence(Request(name, 0, prompt, output), 0, 0, prompt + output - 1)
    sequence.request.sequences.append(sequence)
    over.admit(sequence, prompt)
    return sequence


def step(over, *sequences: Sequence) -> int:
    """The sequences gain a token each; the number of pages copied."""
    copies = sum(over.append(sequence) for sequence in sequences)
    for sequence in sequences:
        sequence.origin += 1
        over.num_tokens += 1
    over.check_integrity()
    return copies


def sizes(over, sequence: Sequence, tokens: int) -> list[int]:
    """Slots that the sequence gains at each growth on its way to so many tokens."""
    gained = []
    while sequence.num_tokens < tokens:
        before = sequence.capacity
        step(over, sequence)
        if sequence.capacity > before:
            gained.append(sequence.capacity - before)
    return gained


def test_runs_are_aligned_and_merge_when_they_are_freed():
    pool = RunPool(16, 8)
    four, one, two = pool.take_run(4), pool.take_run(1), pool.take_run(2)
    assert [run[0] % len(run) for run in (four, one, two)] == [0, 0, 0]
    assert not {*four} & {*one, *two}
    assert len(pool.take_run(8)) == 8
    assert len(pool.take_run(8)) == 1, "only a page is free"
    with pytest.raises(OutOfBlocks, match="asked for a page, 0 of 16 are free"):
        pool.take_run(1)
    for run in (four, one, two):
        pool.release(run)
    assert pool.num_free == 7
    assert len(pool.take_run(4)) == 4


def test_a_run_is_shared_and_freed_by_the_page():
    pool = RunPool(8, 4)
    run = list(pool.take_run(4))
    pool.share(run[:2])
    pool.release(run)
    assert [pool.references[page] for page in run] == [1, 1, 0, 0]
    assert (pool.num_free, pool.extra_references) == (6, 0)
    with pytest.raises(ValueError, match=r"double free of page [26]"):
        pool.release(run[2:])
    pool.release(run[:2])
    assert len(pool.take_run(4)) == len(pool.take_run(4)) == 4
    with pytest.raises(OutOfBlocks, match="asked for 1 pages, 0 of 8 are free"):
        pool.take()


def test_a_number_of_pages_no_multiple_of_the_longest_run():
    pool = RunPool(13, 4)
    assert sorted(pool.unheld()) == list(range(13))
    assert sorted(pool.take(13)) == list(range(13))


def multi_size(slots: int = 512, **fields):
    fields = {"block_size": 4, "largest_block": 32, "watermark": 0.0, **fields}
    return memory("multi_size", slots=slots, longest=400, **fields)


def test_a_prompt_takes_the_largest_blocks_that_it_fills():
    """Eleven pages of four: a block of 32 slots, one of 8, one of 4."""
    over = multi_size()
    sequence = admit(over, 0, 42)
    assert sequence.capacity == 44
    assert over.num_entries == 3
    assert over.pool.num_used == 11


def test_blocks_grow_with_what_the_sequence_holds():
    """An eighth of it at most: 8 slots from 64 on, 16 from 128 on, 32 from 256 on."""
    over = multi_size(slots=1024)
    gained = sizes(over, admit(over, 0, 56, 400), 400)
    assert gained[:2] == [4, 4]
    assert gained[2:10] == [8] * 8
    assert gained[10:18] == [16] * 8
    assert set(gained[18:]) == {32}


def test_a_shorter_run_does_where_no_longer_one_is_free():
    """Sixteen pages: 8 for the first, 4 + 2 for the second, one for the third, and so one is left."""
    over = multi_size(64, slack=0.5)
    admit(over, 0, 32)
    second = admit(over, 1, 20)
    assert second.capacity == 24, "half of 16 slots more, though 4 would do"
    admit(over, 2, 4)
    assert sizes(over, second, 25) == [4], "eight were asked for"
    assert not over.can_append(second.request)


def test_waste_is_counted_by_the_slot():
    over = multi_size(slack=1.0)
    sequence = admit(over, 0, 16, 4)  # 19 tokens in the end
    assert over.usage().reserved == over.usage().internal == 0
    step(over, sequence)
    usage = over.usage()
    assert (usage.token_states, usage.reserved, usage.internal) == (17, 2, 13)


def test_a_fork_shares_pages_with_tokens_and_copies_the_page_it_writes():
    """18 tokens in 32 slots: five pages are shared, three stay with the parent, the fifth is copied."""
    over = multi_size(slack=1.0)
    parent = admit(over, 0, 16)
    step(over, parent)
    step(over, parent)
    assert parent.capacity == 32
    child = fork(over, parent)
    parent.request.sequences.append(child)
    assert child.block_table == parent.block_table[:5]
    assert over.blocks_saved == 5
    assert step(over, parent, child) == 1
    assert parent.block_table[:4] == child.block_table[:4]
    assert parent.block_table[4] != child.block_table[4]
    over.free(parent)
    over.check_integrity()
    assert over.pool.num_used == 5


def test_no_branch_takes_the_last_pages_of_its_siblings():
    """Four branches, six free pages: the first may have two of them, and each of the others still finds one."""
    over = multi_size(64, slack=0.25)
    parent = admit(over, 0, 40)
    branches = [parent, *(fork(over, parent) for _ in range(3))]
    parent.request.sequences[:] = branches
    assert over.pool.num_free == 6
    assert over.can_append(parent.request)
    for branch in branches:
        step(over, branch)
    assert [branch.capacity - 40 for branch in branches] == [8, 4, 4, 4]


def test_swapping_keeps_sharing_and_counts_runs_anew():
    over = multi_size()
    sequence = admit(over, 0, 42)
    assert over.swap_out(sequence.request) == 11
    assert over.num_entries == 0
    over.check_integrity()
    over.swap_in(sequence.request)
    over.check_integrity()
    assert 1 <= over.num_entries <= 3


def test_the_last_pages_are_given_though_they_are_no_longest_run():
    """Sixteen pages, blocks of eight at most: with three pages free a prompt may still have them."""
    over = multi_size(64, slack=0.0)
    admit(over, 0, 40)
    second = admit(over, 1, 12)
    assert (over.headroom, over.pool.num_free) == (0, 3)
    assert over.demand(second, 12) <= over.headroom < over.demand(second, 13)
    assert over.demand(second, 0) == 0


def test_sizes_that_are_no_doubles_are_refused():
    with pytest.raises(UserError, match="largest_block: got 24, expected block_size 4 times a power of two"):
        multi_size(largest_block=24)
    with pytest.raises(UserError, match="largest_block: got 2, expected block_size 4 times a power of two"):
        multi_size(largest_block=2)


def adaptive(slots: int = 4096, **fields):
    return memory("adaptive", slots=slots, longest=2000, **{"watermark": 0.0, **fields})


def finish(over, length: int, times: int) -> None:
    for _ in range(times):
        over.free(admit(over, 0, length, 1))


@pytest.mark.parametrize(
    ("length", "size"),
    [
        (100, 8),  # 8: 13 x 9 = 117, 16: 7 x 17 = 119, 32: 4 x 33 = 132, 64: 2 x 65 = 130, 128: 129
        (96, 32),  # 108, 102, 99, 130, 129
        (300, 16),  # 342, 323, 330, 325, 387
        (1000, 128),  # 1125, 1071, 1056, 1040, 1032
    ],
)
def test_the_size_with_the_least_waste_and_table_is_picked(length, size):
    """Slots in whole blocks, and one more for each entry of the table."""
    assert adaptive().best([length]) == size


def test_a_table_that_costs_nothing_takes_the_smallest_blocks_and_one_that_costs_much_the_largest():
    lengths = [20, 700, 333, 150]
    assert adaptive(entry_cost=0.0).best(lengths) == 8
    assert adaptive(entry_cost=500.0).best(lengths) == 128


def test_only_new_sequences_have_the_new_size():
    over = adaptive()
    old = admit(over, 1, 20, 300)
    finish(over, 1000, 15)
    assert over.size == 16
    finish(over, 1000, 1)
    assert over.size == 128
    assert over.figures == {"last_block_size": 128}
    new = admit(over, 2, 20, 300)
    assert (old.capacity, new.capacity) == (32, 128)
    assert sizes(over, old, 60) == [16, 16]
    assert sizes(over, new, 140) == [128]


def test_lengths_beyond_the_window_are_forgotten():
    over = adaptive(window=16)
    finish(over, 1000, 16)
    finish(over, 100, 15)
    assert over.size == 128
    finish(over, 100, 1)
    assert over.size == 8


def test_a_preempted_sequence_teaches_nothing():
    over = adaptive()
    for _ in range(40):
        sequence = admit(over, 0, 1000, 300)
        over.free(sequence)
    assert over.size == 16


def test_admission_asks_for_whole_blocks():
    over = adaptive(64)
    finish(over, 60, 16)
    assert over.size == 64
    admit(over, 0, 1, 1)
    assert over.usage().free == 0
    asked = Request(9, 0, 65, 1)
    assert over.admission(asked, 64) is Admission.LATER
    assert over.admission(asked, 65) is Admission.NEVER
    assert "65 tokens need 16 pages of 8 slots, the pool has 8" in over.refusal(asked, 65)


def table_length(kind: str, prompt: int, **fields) -> float:
    """Of a request with 10 ms for its prompt and four decode steps of 1 ms."""
    story = Story(scheduled("vllm_v0", memory(kind, slots=64, **fields)), ask((0, prompt, 5)))
    return story.summary["mean_table_length"] * 14


def test_the_length_of_tables_is_a_mean_over_time():
    assert table_length("paged", 4) == pytest.approx(1 * 10 + 2 * 4)
    assert table_length("token", 4) == pytest.approx(4 * 10 + 5 + 6 + 7 + 8)
    fields = {"block_size": 4, "largest_block": 8, "watermark": 0.0, "slack": 1.0}
    assert table_length("multi_size", 8, **fields) == pytest.approx(1 * 10 + 2 * 4)
    assert table_length("multi_size", 6, **fields) == pytest.approx(1 * 10 + 1 * 2 + 2 * 2)
    assert math.isnan(table_length("contiguous", 4))


def test_the_length_of_tables_does_not_depend_on_stretches():
    """Tables summed up step by step, with the engine looking one step ahead only, and as far as it can."""
    rows = [(number * 3.5, 5 + number % 40, 20 + number * 7 % 90) for number in range(60)]
    figures = []
    for stretches in (False, True):
        over = memory("multi_size", slots=2000, longest=200, block_size=4, largest_block=32, slack=0.5)
        story = Story(scheduled("vllm_v0", over), ask(*rows), stretches=stretches)
        figures.append(story.summary["mean_table_length"])
    assert figures[0] == figures[1] > 2


# Prefix caching over them


def test_freed_pages_that_hold_something_come_back_as_the_runs_that_they_were():
    """Eight of sixteen pages are known; a run of eight empties the oldest four, and they merge with empty ones."""
    pool = CachedRunPool(16, 4)
    old, new = pool.take(4), pool.take(4)
    for first, table in ((0, old), (4, new)):
        pool.register_table(table, range(first, first + 4))
        pool.leave_table(table, 4)
    assert (pool.num_free, pool.runs.num_free) == (16, 8)
    assert [len(pool.take_run(4)) for _ in range(2)] == [4, 4]
    assert pool.find_leading(range(8)) == [*old, *new], "there were empty runs"
    assert [*pool.take_run(4)] == old
    assert pool.find(3) is None
    assert pool.find(4) == new[0]


def test_a_page_is_found_and_kept_whatever_run_it_was_in():
    """Another takes three of four pages; when the first has left, the fourth is emptied and they stay."""
    pool = CachedRunPool(8, 4)
    run = pool.take(4)
    pool.register_table(run, range(4))
    pool.touch(run[:3])
    pool.leave_table(run, 4)
    assert [pool.references[page] for page in run] == [1, 1, 1, 0]
    rest = pool.take(5)
    assert run[3] in rest
    assert pool.find_leading(range(4)) == run[:3]
    with pytest.raises(OutOfBlocks, match="asked for a page, 0 of 8 are free"):
        pool.take_run(1)
    pool.check_integrity([run[:3], rest])


def test_pages_that_hold_nothing_are_empty_at_once():
    """A prompt fills two pages and a half, and six were taken: only the full ones are kept."""
    pool = CachedRunPool(8, 4)
    table = pool.take(6)
    pool.register_table(table, range(2))
    pool.leave_table(table, 2)
    assert (pool.num_free, pool.runs.num_free) == (8, 6)


def cached_sizes(slots: int, **fields):
    return multi_size(slots, prefix_caching=True, **fields)


def ask_alike(over, name: int, prompt: int, output: int = 40) -> tuple[Sequence, int]:
    """A request whose prompt begins as all others do, and what is cached of it."""
    request = Request(name, 0, prompt, output, content=(1, 2, 3, 4), content_grain=16)
    sequence = Sequence(request, 0, 0, prompt + output - 1)
    request.sequences.append(sequence)
    cached = over.admit(sequence, prompt)
    over.check_integrity()
    return sequence, cached


def test_the_grain_of_a_hit_is_the_smallest_block():
    """42 tokens lie in blocks of 32, 8 and 4 slots; of 31 that are the same seven pages are found."""
    over = cached_sizes(512)
    first, cached = ask_alike(over, 0, 42)
    assert (cached, over.num_entries) == (0, 3)
    second, cached = ask_alike(over, 1, 31)
    assert cached == 28
    assert second.block_table[:7] == first.block_table[:7]
    assert over.num_entries == 3 + 2, "a part of the block of 32, and a page"
    over.free(first)
    over.free(second)
    over.check_integrity()
    assert over.usage().free == 512


def test_what_is_found_behind_a_fork_and_its_copies_is_told_apart():
    """Samples share pages with tokens, copy the one that they write to, and what they leave is found again."""
    over = cached_sizes(256, slack=1.0)
    parent, _ = ask_alike(over, 0, 18)
    child = fork(over, parent)
    parent.request.sequences.append(child)
    assert over.blocks_saved == 5
    assert step(over, parent, child) == 1
    assert parent.block_table[:4] == child.block_table[:4]
    over.free(parent)
    over.check_integrity()
    over.free(child)
    over.check_integrity()
    _, cached = ask_alike(over, 1, 18)
    assert cached == 16


def test_the_size_is_learned_with_prefix_caching_too():
    over = adaptive(40_000, prefix_caching=True)
    finish(over, 1000, 16)
    assert over.figures == {"last_block_size": 128}
    first, _ = ask_alike(over, 1, 60)
    second, cached = ask_alike(over, 2, 60)
    assert (first.capacity, cached) == (128, 56)
    assert second.block_table[:7] == first.block_table[:7]
    asked = Request(9, 0, 39_990, 1)
    assert over.admission(asked, 39_900) is Admission.LATER, "whole blocks, beside those that are held"
    assert "39990 tokens need 5008 pages of 8 slots, the pool has 5000" in over.refusal(asked, 39_990)
