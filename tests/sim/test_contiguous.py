"""Contiguous reservations: what max, pow2 and oracle take, and what is wasted."""

from __future__ import annotations

import pytest

from sim import Admission, Capacity, MemoryUsage, Request, Sequence, allocator

SLOTS = 15_728  # OPT-13B in 12 GiB


def build(slots: int = SLOTS, longest: int = 2048, **fields):
    return allocator["contiguous"](Capacity(num_slots=slots, max_model_len=longest), **fields)


def admit(memory, number: int, prompt: int, output: int) -> Sequence:
    request = Request(number, 0, prompt, output)
    assert memory.admission(request, prompt) is Admission.OK
    sequence = Sequence(request, 0, 0, prompt + output - 1)
    request.sequences.append(sequence)
    memory.admit(sequence, prompt)
    memory.check_integrity()
    return sequence


@pytest.mark.parametrize(
    ("reserve", "prompt", "output", "reserved"),
    [
        ("max", 10, 25, 2048),
        ("max", 1, 1, 2048),
        ("pow2", 10, 25, 10 + 32),  # the paper's example: 25 reserves 32
        ("pow2", 10, 32, 10 + 32),
        ("pow2", 10, 1, 11),
        ("pow2", 1000, 1030, 2048),  # 1000 + 2048, and at most 2048 in all
        ("oracle", 10, 25, 35),
        ("oracle", 1000, 1030, 2030),
    ],
)
def test_reservations(reserve, prompt, output, reserved):
    memory = build(reserve=reserve, placement="first_fit")
    sequence = admit(memory, 0, prompt, output)
    assert sequence.capacity == memory.num_held == reserved
    # The last sampled token never gets a slot: prompt + output - 1 are used.
    unused = reserved - (prompt + output - 1)
    assert memory.usage() == MemoryUsage(
        token_states=prompt, reserved=output - 1, internal=unused, external=0,
        free=SLOTS - reserved,
    )  # fmt: skip


def test_max_holds_seven_and_the_rest_is_external():
    """1 - 7 x 2048 / 15,728 = 8.85 % (Kwon et al., SOSP 2023, figure 2: 8.9 %)."""
    memory = build()
    for number in range(7):
        admit(memory, number, 161, 338)
    refused = Request(7, 0, 161, 338)
    assert memory.admission(refused, 161) is Admission.LATER
    for head_refused in (False, True):
        usage = memory.usage(head_refused)
        assert usage == MemoryUsage(
            token_states=7 * 161, reserved=7 * 337, internal=7 * (2048 - 498), external=1392, free=0
        )
        assert round(usage.external / SLOTS, 4) == 0.0885


def test_leftovers_of_max_are_external_from_the_start():
    """No reservation ever fits into 1024 + 256 + 64 + 32 + 16 slots."""
    assert build().usage() == MemoryUsage(0, 0, 0, external=1392, free=SLOTS - 1392)
    assert build(placement="first_fit").usage() == MemoryUsage(0, 0, 0, external=0, free=SLOTS)
    assert build(reserve="oracle").usage() == MemoryUsage(0, 0, 0, external=0, free=SLOTS)


def test_the_rounding_of_a_chunk_is_external():
    memory = build(reserve="oracle")
    sequence = admit(memory, 0, 30, 10)  # 40 slots in a chunk of 64
    assert memory.slots(sequence).tolist() == list(range(15_616, 15_646))
    assert memory.usage() == MemoryUsage(
        token_states=30, reserved=9, internal=1, external=24, free=SLOTS - 64
    )
    memory.free(sequence)
    assert memory.usage() == build(reserve="oracle").usage()


def test_a_refused_head_makes_what_is_free_external():
    memory = build(slots=64, longest=64, reserve="oracle")
    admit(memory, 0, 10, 6)
    request = Request(1, 0, 40, 10)
    assert memory.admission(request, 40) is Admission.LATER
    assert memory.usage(head_refused=False) == MemoryUsage(10, 5, 1, external=0, free=48)
    assert memory.usage(head_refused=True) == MemoryUsage(10, 5, 1, external=48, free=0)


def test_a_reservation_larger_than_every_chunk_never_fits():
    memory = build(slots=100, longest=100, reserve="oracle")  # 64 + 32 + 4
    request = Request(0, 0, 50, 15)
    assert memory.admission(request, 50) is Admission.NEVER
    assert memory.refusal(request, 50) == (
        "a reservation of 65 slots takes a chunk of 128, the largest of 100 slots has 64"
    )
    assert build(slots=100, longest=100, reserve="oracle", placement="best_fit").admission(request, 50) is (
        Admission.OK
    )


def test_a_pool_smaller_than_the_longest_sequence_refuses_all_of_max():
    memory = build(slots=100, longest=128)
    assert memory.admission(Request(0, 0, 1, 1), 1) is Admission.NEVER
    assert memory.usage() == MemoryUsage(0, 0, 0, external=100, free=0)


def test_misplaced_chunks_refuse_what_they_could_hold_together():
    memory = build(slots=64, longest=64, reserve="oracle")
    held = [admit(memory, number, 10, 6) for number in range(4)]
    memory.free(held[1])
    memory.free(held[2])  # 32 slots, and no 32 in one piece
    assert memory.admission(Request(4, 0, 20, 12), 20) is Admission.LATER
    memory.free(held[0])
    assert memory.admission(Request(4, 0, 20, 12), 20) is Admission.OK


def test_nothing_grows_and_nothing_is_shared():
    memory = build()
    sequence = admit(memory, 0, 10, 20)
    assert not memory.can_fork
    assert not memory.can_swap
    assert memory.append(sequence) == 0
    assert memory.can_append(sequence.request)
    with pytest.raises(TypeError, match="ContiguousAllocator cannot share slots"):
        memory.fork(sequence, sequence)


def test_a_retired_request_is_all_internal():
    memory = build(reserve="oracle", placement="first_fit")
    sequence = admit(memory, 0, 10, 6)
    memory.retire(sequence.request)
    assert memory.usage() == MemoryUsage(0, 0, internal=16, external=0, free=SLOTS - 16)
    memory.check_integrity()
    memory.free(sequence)
    assert memory.usage() == MemoryUsage(0, 0, 0, 0, free=SLOTS)
    memory.check_integrity()
