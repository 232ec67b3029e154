"""Every registered allocator against an independent model of who owns which slots.

The model keeps, for every sequence, what each of its tokens is and in which slot it was put. An allocator is
put through it by being registered; field settings worth a run of their own stand in `SETTINGS`.
"""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sim import Admission, Capacity, Request, Sequence, Transfers, allocator
from sim.beams import fork
from sim.link import Link
from sim.prefixes.eviction import eviction
from sim.units import FOREVER

MAX_MODEL_LEN = 48

SETTINGS = {
    "contiguous": [
        {"reserve": reserve, "placement": placement}
        for reserve in ("max", "pow2", "oracle")
        for placement in ("buddy", "first_fit", "best_fit")
    ],
    "paged": [
        {},
        {"block_size": 1, "watermark": 0.1},
        {"block_size": 4, "watermark": 0.0},
        {"block_size": 4, "watermark": 0.2, "num_host_blocks": 6},
        {"block_size": 7, "num_host_blocks": 0},
        {"block_size": 4, "prefix_caching": True},
        {"block_size": 5, "prefix_caching": True, "watermark": 0.0, "num_host_blocks": 9},
        {"block_size": 16, "prefix_caching": True},
    ],
    "prefix": [
        {"block_size": 4},
        {"block_size": 3, "watermark": 0.1},
        {"block_size": 4, "keyless_first": False},
        {"block_size": 4, "prefix_caching": False},
        {"block_size": 8},
    ],
    "vattention": [{}, {"watermark": 0.2}, {"reclamation": "eager", "map_ahead": False}],
    "multi_size": [
        {"block_size": 2, "largest_block": 16, "slack": 0.3},
        {"block_size": 4, "largest_block": 8, "slack": 1.0, "num_host_blocks": 9, "watermark": 0.1},
        {"block_size": 8, "largest_block": 8},
        {"block_size": 2, "largest_block": 16, "slack": 0.3, "prefix_caching": True},
        {"block_size": 4, "largest_block": 8, "slack": 1.0, "watermark": 0.1, "prefix_caching": True},
    ],
    "adaptive": [
        {"block_size": 2, "largest_block": 16},
        {"window": 3, "largest_block": 64, "entry_cost": 20.0},
        {"block_size": 2, "largest_block": 16, "window": 3, "prefix_caching": True},
    ],
    "token": [{}, {"num_host_blocks": 20}],
    "radix": [{}, {"block_size": 4}, {"block_size": 3, "eviction": eviction["mru"], "watermark": 0.1}],
}

CASES = [
    pytest.param(
        kind,
        fields,
        id=" ".join(
            [kind, *(f"{name}={getattr(value, '__name__', value)}" for name, value in fields.items())]
        ),
    )
    for kind in allocator.kinds
    for fields in SETTINGS.get(kind, [{}])
]


class Ownership(RuleBasedStateMachine):
    """Requests come, grow, fork, move and leave; the model follows and compares after every rule."""

    kind = "paged"
    fields: dict = {}  # noqa: RUF012
    flies = False

    @initialize(num_slots=st.sampled_from([100, 129, 150, 512]), grain=st.sampled_from([4, 6]))
    def build(self, num_slots, grain):
        self.grain = grain
        self.memory = allocator[self.kind](
            Capacity(num_slots=num_slots, max_model_len=MAX_MODEL_LEN), **self.fields
        )
        if self.flies:  # a block takes 10 ns in either direction
            self.memory.link = Link(Transfers(None, None, 1, copy_latency_us=0.01, asynchronous=True))
        self.flying: list[int] = []  # ends of the copies of device blocks on their way out
        self.link_free_at = 0
        self.empty_usage = self.memory.usage()
        self.live: list[Request] = []
        self.swapped: list[Request] = []
        self.retired: list[Request] = []
        self.stopped: list[Request] = []
        self.tokens: dict[Sequence, list[object]] = {}  # what each token is: equal only where shared
        self.places: dict[Sequence, list[int]] = {}  # where each token was put
        self.contents: dict[int, object] = {}  # the last token put into each slot
        self.uncomputed: list[Sequence] = []
        self.num_requests = 0

    # What the model knows

    def _pick(self, data, requests):
        return data.draw(st.sampled_from(requests), label="request")

    def _put(self, sequence: Sequence, copied: bool = False) -> None:
        """Note where the tokens are now; earlier ones may only have moved with a copy of the last block."""
        places = self.memory.slots(sequence).tolist()
        before = self.places.get(sequence, [])
        moved = [index for index, (old, new) in enumerate(zip(before, places, strict=False)) if old != new]
        if moved:
            assert copied, f"{sequence}: tokens {moved} moved without a copy"
            assert len(before) - moved[0] <= self.memory.block_size, f"{sequence}: tokens {moved} moved"
        self.places[sequence] = places
        self.contents.update(zip(places, self.tokens[sequence], strict=True))

    def _find(self, sequence: Sequence, tokens: int) -> None:
        """The first tokens were not computed again: their slots hold them."""
        for slot, token in zip(
            self.memory.slots(sequence)[:tokens].tolist(), self.tokens[sequence], strict=False
        ):
            assert self.contents[slot] == token

    def _grow_by_one(self, request: Request, appended: set[Sequence]) -> None:
        for sequence in request.sequences:
            sequence.origin += 1
            self.memory.num_tokens += 1
            self.tokens[sequence].append((request.id, sequence.branch, sequence.origin))
            self._put(sequence, sequence in appended)

    def _decoding(self) -> list[Request]:
        """Live requests of which no branch has its last token yet."""
        return [
            request
            for request in self.live
            if all(each.num_tokens < each.final_tokens for each in request.sequences)
        ]

    # What happens

    @rule(
        prompt=st.integers(1, 40),
        output=st.integers(1, 30),
        content=st.lists(st.integers(0, 1), max_size=9),
    )
    def admit(self, prompt, output, content):
        grain = self.grain
        output = min(output, MAX_MODEL_LEN - prompt)
        request = Request(self.num_requests, 0, prompt, output, content=tuple(content), content_grain=grain)
        self.num_requests += 1
        before = self.memory.usage()
        admission = self.memory.admission(request, prompt)
        assert self.memory.usage() == before
        if not self.memory.sequences and not self.flying:
            assert admission is not Admission.LATER, "nobody is there to wait for"
        if admission is not Admission.OK:
            assert str(prompt) in self.memory.refusal(request, prompt) or self.kind != "paged"
            return
        sequence = Sequence(request, 0, 0, prompt + output - 1)
        request.sequences.append(sequence)
        hit = self.memory.admit(sequence, prompt)
        assert sequence.num_tokens == prompt <= sequence.capacity
        self.live.append(request)
        self.tokens[sequence] = [
            ("prompt", position, *content[: position // grain + 1])
            if position < len(content) * grain
            else (request.id, 0, position)
            for position in range(prompt)
        ]
        self._begin(sequence, hit)

    def _begin(self, sequence: Sequence, hit: int) -> None:
        assert 0 <= hit < sequence.num_tokens
        assert hit == 0 or self.memory.keeps_freed
        self._find(sequence, hit)
        self._put(sequence)
        self.uncomputed.append(sequence)

    @precondition(lambda self: self.memory.keeps_freed and self.uncomputed)
    @rule(data=st.data())
    def compute(self, data):
        """A prompt is computed; equal content that is there already may take the place of its own."""
        sequence = data.draw(st.sampled_from(self.uncomputed), label="sequence")
        self.uncomputed.remove(sequence)
        self.memory.computed(sequence)
        self._find(sequence, sequence.num_tokens)
        self.places[sequence] = self.memory.slots(sequence).tolist()

    @precondition(lambda self: self._decoding())
    @rule(data=st.data(), others=st.booleans())
    def preempt(self, data, others):
        """A request gives way, and comes back with what it had generated if it fits at once."""
        request = self._pick(data, self._decoding())
        if len(request.sequences) > 1:
            return
        (sequence,) = request.sequences
        tokens = sequence.num_tokens + 1
        self.memory.free(sequence)
        if sequence in self.uncomputed:
            self.uncomputed.remove(sequence)
        request.preemptions += 1
        del self.places[sequence]
        if others:
            self._churn()
        if self.memory.admission(request, tokens) is not Admission.OK:
            del self.tokens[sequence]
            self.live.remove(request)
            return
        hit = self.memory.admit(sequence, tokens)
        self.tokens[sequence].append((request.id, 0, "generated", tokens))
        self._begin(sequence, hit)

    def _churn(self) -> None:
        """A request of its own content takes what it can get, and leaves."""
        request = Request(1000 + self.num_requests, 0, MAX_MODEL_LEN - 1, 2)
        self.num_requests += 1
        while request.prompt_tokens and (
            self.memory.admission(request, request.prompt_tokens) is not Admission.OK
        ):
            request.prompt_tokens -= 1
        if request.prompt_tokens:
            sequence = Sequence(request, 0, 0, request.prompt_tokens + 1)
            request.sequences.append(sequence)
            self.memory.admit(sequence, request.prompt_tokens)
            for slot in self.memory.slots(sequence).tolist():
                self.contents[slot] = None
            self.memory.free(sequence)

    @precondition(lambda self: self._decoding())
    @rule(data=st.data(), steps=st.integers(1, 5))
    def append(self, data, steps):
        """One request gains a token on every branch, as in steps where blocks are short."""
        request = self._pick(data, self._decoding())
        for _ in range(steps):
            if request not in self._decoding() or not self.memory.can_append(request):
                return
            copied = {sequence for sequence in request.sequences if self.memory.append(sequence)}
            alone = not self.memory.keeps_freed  # other requests may share the last block too
            assert not alone or len(copied) < len(request.sequences), "the last sharer writes in place"
            self._grow_by_one(request, copied)

    @precondition(lambda self: self._decoding())
    @rule()
    def decode(self):
        """Every unforked request gains a token, those without a free slot as one batch of the decode set."""
        requests = [
            request
            for request in self._decoding()
            if len(request.sequences) == 1 and not self.memory.shares_tail(request.sequences[0])
        ]
        sequences = [request.sequences[0] for request in requests]
        growing = [sequence for sequence in sequences if sequence.num_tokens == sequence.capacity]
        if self.memory.headroom < len(growing):
            return
        batch = list(growing)
        ((tick, held, internal),) = self.memory.grow([(7, batch)])
        assert (tick, held, internal) == (7, self.memory.num_held, self.memory.num_internal)
        assert batch == [sequence for sequence in growing if sequence.capacity < sequence.final_tokens]
        for request in requests:
            self._grow_by_one(request, set())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data):
        request = self._pick(data, self.live)
        parent = data.draw(st.sampled_from(request.sequences), label="parent")
        if self.memory.can_fork and parent in self.uncomputed:
            self.uncomputed.remove(parent)  # a prompt is computed before anybody forks from it
            self.memory.computed(parent)
            self.places[parent] = self.memory.slots(parent).tolist()
        if not self.memory.can_fork:
            with pytest.raises(TypeError, match="cannot share"):
                self.memory.fork(parent, Sequence(request, 9, 0, 0))
            return
        if len(request.sequences) > 3:
            return
        before = self.memory.usage()
        child = fork(self.memory, parent)
        assert self.memory.usage() == before, "a fork takes no memory"
        request.sequences.append(child)
        self.tokens[child] = list(self.tokens[parent])
        self._put(child)
        assert self.places[child] == self.places[parent]

    @precondition(lambda self: len(self.live + self.swapped + self.retired + self.stopped) > 1)
    @rule(data=st.data())
    def free(self, data):
        """A branch ends; its request with the last one."""
        request = self._pick(data, self.live + self.swapped + self.retired + self.stopped)
        sequence = data.draw(st.sampled_from(request.sequences), label="branch")
        self.memory.free(sequence)
        if sequence in self.uncomputed:
            self.uncomputed.remove(sequence)
        request.sequences.remove(sequence)
        del self.tokens[sequence]
        self.places.pop(sequence, None)
        for requests in (self.live, self.swapped, self.retired, self.stopped):
            if request in requests and not request.sequences:
                requests.remove(request)

    @precondition(lambda self: len(self.live) > 2)
    @rule(data=st.data())
    def retire(self, data):
        """A request is done and keeps its slots: all of them are internal waste."""
        request = self._pick(data, self.live)
        before = self.memory.usage()
        distinct = {slot for sequence in request.sequences for slot in self.places[sequence]}
        for sequence, places in self.places.items():
            if sequence not in request.sequences:
                distinct.difference_update(places)
        self.memory.retire(request)
        assert self.memory.usage().token_states == before.token_states - len(distinct)
        assert self.memory.usage().free == before.free or self.memory.keeps_freed
        self.uncomputed = [each for each in self.uncomputed if each not in request.sequences]
        self.live.remove(request)
        self.retired.append(request)
        for sequence in request.sequences:
            self.tokens[sequence] = []
            self.places[sequence] = []

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def swap_out(self, data):
        request = self._pick(data, self.live)
        if not self.memory.can_swap:
            assert not self.memory.can_swap_out(request)
            with pytest.raises(TypeError, match="cannot swap"):
                self.memory.swap_out(request)
            return
        if not self.memory.can_swap_out(request):
            return
        before = self.memory.usage()
        distinct = {slot for sequence in request.sequences for slot in self.places.pop(sequence)}
        for places in self.places.values():
            distinct.difference_update(places)
        moved = self.memory.swap_out(request)
        assert self.memory.usage().token_states == before.token_states - len(distinct)
        held = moved * self.memory.block_size
        if self.flies:  # nothing is free before it is copied
            begin = max(self.memory.link.now, self.link_free_at)
            self.flying += [begin + 10 * (index + 1) for index in range(moved)]
            self.link_free_at = begin + 10 * moved
            held = 0
        freed = self.memory.usage().free - before.free
        assert freed == held or (self.memory.keeps_freed and freed >= 0)
        self.uncomputed = [each for each in self.uncomputed if each not in request.sequences]
        self.live.remove(request)
        self.swapped.append(request)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data):
        request = self._pick(data, self.swapped)
        before, left = self.memory.usage(), self._slots_of_stopped()
        if self.memory.swap_in_admission(request) is not Admission.OK:
            assert self.memory.usage() == before
            return
        moved = self.memory.swap_in(request)
        yielded = left - self._slots_of_stopped() + self._landed_early()
        taken = before.free - self.memory.usage().free + yielded
        assert taken == moved * self.memory.block_size or (self.memory.keeps_freed and taken >= 0)
        self.swapped.remove(request)
        self.live.append(request)
        for sequence in request.sequences:
            self._put(sequence)

    def _landed_early(self) -> int:
        """Slots that were waited for since the last look, first in, first out."""
        landed = 0
        while self.flying and len(self.flying) > len(self.memory._flying):
            assert self.flying.pop(0) <= self.memory.link.awaited
            landed += self.memory.block_size
        return landed

    @precondition(lambda self: self.flies)
    @rule(time=st.integers(0, 120))
    def wait(self, time):
        """Time passes: blocks are free when they are copied, and not before."""
        self._landed_early()
        link = self.memory.link
        link.now += time
        free = self.memory.usage().free
        landed = [end for end in self.flying if end <= link.now]
        self.memory.land(link.now)
        freed = self.memory.usage().free - free
        assert freed == len(landed) * self.memory.block_size or (
            self.memory.keeps_freed and 0 <= freed <= len(landed) * self.memory.block_size
        )
        self.flying = self.flying[len(landed) :]
        assert self.memory.next_landing > link.now

    @precondition(lambda self: self._decoding())
    @rule(data=st.data())
    def stop(self, data):
        """A request gives way in part: it keeps its slots until others need them."""
        request = self._pick(data, self._decoding())
        if len(request.sequences) > 1:
            return
        (sequence,) = request.sequences
        if not self.memory.can_stop:
            with pytest.raises(TypeError, match="cannot take a part"):
                self.memory.stop(sequence)
            return
        before = self.memory.usage()
        empty = (sequence.capacity - sequence.num_tokens) // self.memory.block_size * self.memory.block_size
        self.memory.stop(sequence)
        assert self.memory.usage().free == before.free + (0 if self.memory.growth else empty)
        assert self.memory.usage().token_states == before.token_states
        request.preemptions += 1
        self.live.remove(request)
        self.stopped.append(request)

    @precondition(lambda self: self.stopped)
    @rule(data=st.data())
    def resume(self, data):
        """It comes back with what it kept, and computes the rest again."""
        request = self._pick(data, self.stopped)
        (sequence,) = request.sequences
        tokens = len(self.tokens[sequence]) + 1
        admission = self.memory.admission(request, tokens)
        if not self.live + self.retired and not self.flying:
            assert admission is not Admission.LATER, "all others yield"
        if admission is not Admission.OK:
            return
        left = len(self.places.get(sequence, []))
        kept = self.memory.admit(sequence, tokens)
        assert kept == left
        self.tokens[sequence].append((request.id, 0, "generated", tokens))
        self._find(sequence, kept)
        self._put(sequence)
        self.stopped.remove(request)
        self.live.append(request)

    def _slots_of_stopped(self) -> int:
        return sum(request.sequences[0].capacity for request in self.stopped)

    def _follow_stopped(self) -> None:
        """Who stopped loses tokens from the end, by whole blocks, and nothing while there is room."""
        for request in self.stopped:
            (sequence,) = request.sequences
            left = sequence.num_tokens if sequence.capacity else 0
            places = self.places.get(sequence, [])
            assert left == len(places) or left == sequence.capacity < len(places)
            self.places[sequence] = places[:left]
            if not left:
                self.places.pop(sequence)

    # What always holds

    @invariant()
    def books_are_right(self):
        self._follow_stopped()
        self._landed_early()
        self.memory.check_integrity()
        present = {each for request in self.live + self.retired + self.stopped for each in request.sequences}
        present -= {each for each in present if not each.capacity}
        assert self.memory.sequences == present
        for refused in (False, True):
            usage = self.memory.usage(refused)
            assert usage.total == self.memory.num_slots
        usage = self.memory.usage()
        assert usage.token_states == len({slot for places in self.places.values() for slot in places})
        alone = all(len(request.sequences) == 1 for request in self.live + self.retired)
        if alone and not self.memory.blocks_saved:
            waste = [max(0, each.capacity - each.final_tokens) for each in present]
            in_flight = len(self.flying) * self.memory.block_size
            if self.memory.keeps_freed:  # who finds a block that leaves has it
                in_flight = self.memory.yielding * self.memory.block_size
            assert usage.internal == sum(waste) + in_flight
            held = in_flight + sum(each.capacity for each in present)
            assert usage.reserved == held - usage.internal - usage.token_states

    @invariant()
    def nobody_is_moved_by_others(self):
        self._follow_stopped()
        stopped = {request.sequences[0] for request in self.stopped}
        for sequence, places in self.places.items():
            assert self.memory.slots(sequence).tolist() == places
            assert len(places) == sequence.num_tokens
            assert len(self.tokens[sequence]) == sequence.num_tokens or sequence in stopped
            assert all(0 <= slot < self.memory.num_slots for slot in places)

    @invariant()
    def only_equal_tokens_share_a_slot(self):
        self._follow_stopped()
        holder: dict[int, object] = {}
        for sequence, places in self.places.items():
            for slot, token in zip(places, self.tokens[sequence], strict=False):
                assert holder.setdefault(slot, token) == token, f"slot {slot} holds {holder[slot]}, {token}"
        for one, other in combinations(self.live, 2) if not self.memory.keeps_freed else ():
            slots = [
                {slot for each in request.sequences for slot in self.places[each]} for request in (one, other)
            ]
            assert slots[0].isdisjoint(slots[1])

    def teardown(self):
        for request in self.live + self.swapped + self.retired + self.stopped:
            for sequence in list(request.sequences):
                self.memory.free(sequence)
                request.sequences.remove(sequence)
        self.memory.land(FOREVER - 1)
        self.memory.check_integrity()
        assert not self.memory.sequences
        assert self.memory.usage() == self.empty_usage
        assert self.memory.num_held == self.memory.blocks_saved == 0


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_ownership(kind, fields):
    machine = type("Machine", (Ownership,), {"kind": kind, "fields": fields})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=50, deadline=None)
    )


@pytest.mark.parametrize(
    ("kind", "fields"), [case for case in CASES if getattr(allocator[case.values[0]], "can_fly", False)]
)
def test_ownership_with_blocks_in_flight(kind, fields):
    machine = type("Machine", (Ownership,), {"kind": kind, "fields": fields, "flies": True})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=50, deadline=None)
    )
