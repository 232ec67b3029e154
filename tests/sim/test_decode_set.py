"""The decode set: its calendar against a walk over the members."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Capacity, Request, Sequence, allocator
from sim.decode_set import DecodeSet
from sim.units import FOREVER


def admit(over, number: int, prompt: int, output: int) -> Sequence:
    request = Request(number, 0, prompt, output)
    sequence = Sequence(request, 0, 0, prompt + output - 1)
    request.sequences.append(sequence)
    over.admit(sequence, prompt)
    return sequence


def paged(blocks: int = 100, size: int = 4):
    return allocator["paged"](
        Capacity(num_slots=blocks * size, max_model_len=999), block_size=size, watermark=0.0
    )


def tick(decodes: DecodeSet, over) -> list[Sequence]:
    """One decode step; the sequences that are done with it."""
    if decodes.clock + 1 in decodes.growths:
        decodes.grow_next(over)
    decodes.advance()
    over.num_tokens += decodes.size
    return decodes.take_finished()


def test_a_member_s_length_follows_the_clock():
    over, decodes = paged(), DecodeSet()
    one = admit(over, 0, 5, 4)  # ends with 8 tokens
    decodes.join(one)
    assert (decodes.size, decodes.context, decodes.next_finish) == (1, 5, 3)
    assert tick(decodes, over) == []
    two = admit(over, 1, 9, 3)  # ends with 11
    decodes.join(two)
    assert (decodes.size, decodes.context, decodes.next_finish) == (2, 15, 3)
    assert tick(decodes, over) == []
    assert (one.num_tokens, two.num_tokens, decodes.context) == (7, 10, 17)
    assert tick(decodes, over) == [one, two]
    assert (one.num_tokens, two.num_tokens) == (8, 11)
    assert (one.decodes, decodes.size, decodes.context, decodes.next_finish) == (None, 0, 0, FOREVER)


def test_growth_stands_in_the_calendar():
    over, decodes = paged(), DecodeSet()
    one = admit(over, 0, 6, 9)  # 8 slots, ends with 14 tokens in 16
    decodes.join(one)
    assert decodes.growths == {3: [one]}
    for _ in range(3):
        assert one.capacity == 8
        tick(decodes, over)
    assert (one.capacity, decodes.growths) == (12, {7: [one]})
    for _ in range(4):
        tick(decodes, over)
    assert (one.capacity, decodes.growths) == (16, {})  # it needs no more
    over.check_integrity()


def test_a_reservation_never_grows():
    over = allocator["contiguous"](Capacity(num_slots=64, max_model_len=64))
    decodes = DecodeSet()
    decodes.join(admit(over, 0, 6, 9))
    assert decodes.growths == {}


def test_members_that_finish_together_leave_in_order_of_arrival():
    over, decodes = paged(), DecodeSet()
    members = [admit(over, number, 4 + number, 3) for number in range(5)]
    for member in reversed(members):
        decodes.join(member)
    assert tick(decodes, over) == []
    assert tick(decodes, over) == members


def test_members_that_grow_together_are_served_in_order_of_arrival():
    over, decodes = paged(), DecodeSet()
    members = [admit(over, number, 8, 9) for number in range(3)]
    for member in reversed(members):
        decodes.join(member)
    tick(decodes, over)
    assert [member.block_table[2] for member in members] == [93, 92, 91]


def test_who_leaves_is_forgotten():
    over, decodes = paged(), DecodeSet()
    one, two = admit(over, 0, 4, 9), admit(over, 1, 7, 9)
    decodes.join(one)
    tick(decodes, over)
    decodes.join(two)
    decodes.copy_pending += [one, two]
    tick(decodes, over)
    decodes.leave(one)
    assert (one.num_tokens, one.decodes, decodes.context) == (6, None, 8)
    assert decodes.copy_pending == [two]
    over.free(one)
    for _ in range(7):
        assert one not in tick(decodes, over)
    assert decodes.size == 0
    assert not any(decodes.growths.values())


def test_growth_ahead_stops_before_memory_is_short():
    over, decodes = paged(blocks=10), DecodeSet()
    for number in range(3):
        decodes.join(admit(over, number, 4, 20))  # grow at ticks 1, 5, 9, ...: 3 blocks each time
    assert over.headroom == 7
    served, books = decodes.grow(over, ticks=12, spare=2)
    # Tick 1 leaves 4 free, tick 5 would leave 1.
    assert served == 4
    assert books == [(1, 24, 0)]
    assert over.headroom == 4
    assert sorted(decodes.growths) == [5]
    assert decodes.grow(over, ticks=12, spare=1)[0] == 4 + 4


def test_growth_ahead_reports_every_tick_that_changed():
    over, decodes = paged(size=4), DecodeSet()
    decodes.join(admit(over, 0, 3, 8))  # 10 tokens in 12 slots: grows at ticks 2 and 6
    decodes.join(admit(over, 1, 4, 3))  # 6 tokens in 8 slots: grows at tick 1
    assert decodes.grow(over, ticks=7, spare=1) == (7, [(1, 12, 2), (2, 16, 2), (6, 20, 4)])


members = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 30), st.integers(2, 40), st.booleans()),
    min_size=1,
    max_size=10,
)


@settings(max_examples=150)
@given(members=members, ahead=st.integers(1, 9), size=st.sampled_from([1, 2, 4, 7]), spare=st.integers(1, 3))
def test_the_calendar_against_a_walk(members, ahead, size, spare):
    """Members join, leave and finish; one set moves tick by tick, one as far ahead as it may: both as a walk says."""
    single, many = paged(120, size), paged(120, size)
    sets = {id(single): DecodeSet(), id(many): DecodeSet()}
    joined: list[tuple[int, Sequence, Sequence, int]] = []  # tick, one of each set, tick at which it leaves
    coming = sorted((at, number, *rest) for number, (at, *rest) in enumerate(members))
    now = 0
    walked: dict[int, int] = {}  # number: tokens
    while True:
        while coming and coming[0][0] <= now:
            _, number, prompt, output, leaves = coming.pop(0)
            if single.headroom < prompt:
                continue
            pair = [admit(over, number, prompt, output) for over in (single, many)]
            for over, sequence in zip((single, many), pair, strict=True):
                sets[id(over)].join(sequence)
            joined.append((number, *pair, now + output // 2 if leaves else FOREVER))
            walked[number] = prompt
        for entry in list(joined):
            number, one, two, leave_at = entry
            if leave_at <= now and number in walked:
                for over, sequence in ((single, one), (many, two)):
                    sets[id(over)].leave(sequence)
                    over.free(sequence)
                del walked[number]
                joined.remove(entry)
        if not coming and not walked:
            return
        stops = (
            [at for at, *_ in coming]
            + [entry[3] for entry in joined]
            + [sets[id(many)].next_finish, now + ahead]
        )
        steps = max(1, min(stop for stop in stops if stop > now) - now)
        steps, _ = sets[id(many)].grow(many, steps, spare)
        if not steps:
            return  # memory is short: the scheduler's business
        sets[id(many)].advance(steps)
        many.num_tokens += steps * sets[id(many)].size
        done = sets[id(many)].take_finished()
        for step in range(steps):
            finished = tick(sets[id(single)], single)
            assert step == steps - 1 or not finished
        now += steps
        for number in walked:
            walked[number] += steps
        ended = [
            entry for entry in joined if entry[1].num_tokens == entry[1].final_tokens and entry[0] in walked
        ]
        assert finished == [entry[1] for entry in sorted(ended, key=lambda entry: entry[0])]
        assert done == [entry[2] for entry in sorted(ended, key=lambda entry: entry[0])]
        for number, one, two, _ in joined:
            assert one.num_tokens == two.num_tokens == walked[number]
            assert one.block_table == two.block_table
            assert one.capacity == two.capacity == len(one.block_table) * size
            assert one.num_tokens <= one.capacity
        for entry in ended:
            single.free(entry[1])
            many.free(entry[2])
            del walked[entry[0]]
            joined.remove(entry)
        for over in (single, many):
            over.check_integrity()
            decodes = sets[id(over)]
            assert decodes.clock == now
            assert decodes.size == len(walked)
            assert decodes.context == sum(walked.values())
        assert (single.num_held, single.num_internal) == (many.num_held, many.num_internal)
