"""Paged memory by vLLM V0's rules: the numbers that are known."""

from __future__ import annotations

import pytest

from sim import Admission, Capacity, MemoryUsage, Request, Sequence, allocator
from sim.beams import fork


def build(blocks: int, size: int = 4, watermark: float = 0.0, host: int | None = None):
    capacity = Capacity(num_slots=blocks * size, max_model_len=1 << 20)
    return allocator["paged"](capacity, block_size=size, watermark=watermark, num_host_blocks=host)


def hold(memory, prompt: int, output: int = 1000) -> Request:
    """Admit a request with its prompt."""
    request = Request(len(memory.sequences), 0, prompt, output)
    assert memory.admission(request, prompt) is Admission.OK
    sequence = Sequence(request, 0, 0, prompt + output - 1)
    request.sequences.append(sequence)
    memory.admit(sequence, prompt)
    return request


def split(memory, request: Request, branches: int) -> None:
    """Fork a request up to so many branches."""
    request.sequences += [fork(memory, request.sequences[0]) for _ in range(1, branches)]


def token(memory, request: Request) -> int:
    """Give every branch a token; the number of blocks copied."""
    copies = sum([memory.append(sequence) for sequence in request.sequences])
    for sequence in request.sequences:
        sequence.origin += 1
        memory.num_tokens += 1
    memory.check_integrity()
    return copies


def ask(memory, blocks: int) -> Admission:
    return memory.admission(Request(99, 0, blocks * 4, 1), blocks * 4)


def test_never_is_decided_before_later():
    memory = build(100, watermark=0.05)
    assert memory.watermark_blocks == 5
    assert [ask(memory, blocks) for blocks in (95, 96)] == [Admission.OK, Admission.NEVER]
    hold(memory, 4 * 95)
    assert [ask(memory, blocks) for blocks in (1, 95, 96)] == [
        Admission.LATER, Admission.LATER, Admission.NEVER,
    ]  # fmt: skip


def test_three_of_four_blocks_beside_a_watermark_of_a_quarter():
    memory = build(4, watermark=0.25)
    for _ in range(3):
        hold(memory, 4)
    assert ask(memory, 1) is Admission.LATER


@pytest.mark.parametrize(("watermark", "blocks", "kept"), [(0.01, 99, 0), (0.01, 100, 1), (0.01, 983, 9)])
def test_the_watermark_is_rounded_down(watermark, blocks, kept):
    assert build(blocks, watermark=watermark).watermark_blocks == kept


def test_blocks_are_a_stack():
    memory = build(8)
    first, second = hold(memory, 8), hold(memory, 4)
    assert [request.sequences[0].block_table for request in (first, second)] == [[7, 6], [5]]
    memory.free(first.sequences[0])
    assert hold(memory, 12).sequences[0].block_table == [6, 7, 4]


def test_a_token_is_refused_without_a_free_block_even_where_none_is_needed():
    memory = build(4)
    request = hold(memory, 13)
    assert memory.pool.num_free == 0
    assert not memory.can_append(request)
    memory = build(5)
    assert memory.can_append(hold(memory, 13))


def test_an_exact_multiple_forks_without_a_copy():
    memory = build(32)
    request = hold(memory, 8)
    split(memory, request, 3)
    assert memory.pool.num_used == 2
    assert memory.blocks_saved == 4
    assert token(memory, request) == 0
    assert memory.pool.num_used == 2 + 3


def test_the_last_sharer_writes_in_place():
    memory = build(32)
    request = hold(memory, 10)
    split(memory, request, 4)
    assert token(memory, request) == 3
    assert memory.pool.num_used == 3 + 3
    tables = [sequence.block_table for sequence in request.sequences]
    assert all(table[:2] == tables[0][:2] for table in tables)
    assert len({table[2] for table in tables}) == 4
    assert token(memory, request) == 0
    assert memory.usage() == MemoryUsage(8 + 4 * 4, reserved=0, internal=0, external=0, free=128 - 24)


def test_one_copy_for_two_sharers():
    memory = build(8)
    request = hold(memory, 3)
    split(memory, request, 2)
    assert memory.pool.num_free == 7
    assert memory.append(request.sequences[0]) == 1
    assert memory.pool.num_free == 6
    assert memory.append(request.sequences[1]) == 0


def test_a_shared_block_goes_with_its_last_holder():
    memory = build(8)
    request = hold(memory, 6)
    split(memory, request, 3)
    for left in (2, 1, 0):
        memory.free(request.sequences.pop(0))
        memory.check_integrity()
        assert memory.pool.num_used == (2 if left else 0)
        assert memory.usage().token_states == (6 if left else 0)


def test_a_shared_block_is_swapped_once_and_stays_shared():
    memory = build(10, host=10)
    request = hold(memory, 10)
    split(memory, request, 3)
    token(memory, request)  # 2 shared blocks, 3 of their own
    assert memory.can_swap_out(request)
    assert memory.swap_out(request) == 5
    assert (memory.pool.num_free, memory.host_pool.num_free) == (10, 5)
    assert memory.usage() == MemoryUsage(0, 0, 0, 0, free=40)
    assert sorted(memory.host_pool.references, reverse=True)[:6] == [3, 3, 1, 1, 1, 0]
    assert memory.swap_in(request) == 5
    assert (memory.pool.num_free, memory.host_pool.num_free) == (5, 10)
    assert sorted(memory.pool.references, reverse=True)[:6] == [3, 3, 1, 1, 1, 0]
    memory.check_integrity()
    assert token(memory, request) == 0


def test_swapping_in_needs_a_fresh_block_for_every_branch():
    memory = build(12, host=12)
    request = hold(memory, 10)
    split(memory, request, 3)
    token(memory, request)
    memory.swap_out(request)
    other = hold(memory, 20)  # 7 free: 5 distinct blocks and 3 branches are 8
    assert memory.swap_in_admission(request) is Admission.LATER
    memory.free(other.sequences[0])
    hold(memory, 16)
    assert memory.swap_in_admission(request) is Admission.OK
    tight = build(7, host=12)
    request = hold(tight, 10)
    split(tight, request, 3)
    token(tight, request)
    tight.swap_out(request)
    assert tight.swap_in_admission(request) is Admission.NEVER


def test_swapping_out_needs_host_room_for_the_distinct_blocks():
    for host, fits in ((4, False), (5, True)):
        memory = build(12, host=host)
        request = hold(memory, 10)
        split(memory, request, 3)
        token(memory, request)
        assert memory.can_swap_out(request) is fits


def test_a_swapped_request_can_be_dropped():
    memory = build(12, host=12)
    request = hold(memory, 10)
    split(memory, request, 2)
    memory.swap_out(request)
    for sequence in list(request.sequences):
        memory.free(sequence)
        request.sequences.remove(sequence)
        memory.check_integrity()
    assert (memory.pool.num_used, memory.host_pool.num_used) == (0, 0)


def test_waste_is_in_the_last_block_only():
    memory = build(8)
    request = hold(memory, 6, output=4)  # ends with 9 tokens in 3 blocks
    assert memory.usage() == MemoryUsage(6, reserved=2, internal=0, external=0, free=24)
    for expected in ((7, 1, 0, 24), (8, 0, 0, 24), (9, 0, 3, 20)):
        token(memory, request)
        usage = memory.usage()
        assert (usage.token_states, usage.reserved, usage.internal, usage.free) == expected


def test_slots_behind_the_last_whole_block_are_external():
    memory = allocator["paged"](Capacity(num_slots=43, max_model_len=64), block_size=4)
    assert memory.usage() == MemoryUsage(0, 0, 0, external=3, free=40)
    given = allocator["paged"](Capacity(num_slots=43, max_model_len=64, num_blocks=5), block_size=4)
    assert (given.num_slots, given.usage().external) == (20, 0)
