"""Allocators of several layer groups against an independent model of what every token's place holds.

The model puts each token of each group where the allocator says, and never looks at pages: what is live follows
from the window's definition, what may share a place from the tokens themselves.
"""

from __future__ import annotations

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

from sim import Admission, Request, Sequence
from tests.sim.test_layer_groups import SETTINGS, build


class GroupOwnership(RuleBasedStateMachine):
    """Requests come, in parts or whole, decode together, give way, and leave."""

    name = "a window"

    @initialize(slots=st.sampled_from([60, 100, 300]), grain=st.sampled_from([4, 6]))
    def build(self, slots, grain):
        self.grain = grain
        self.memory = build(self.name, slots, 48)
        self.empty = self.memory.usage()
        self.live: list[Sequence] = []
        self.partial: dict[Sequence, int] = {}  # tokens of the prompt
        self.tokens: dict[Sequence, list[object]] = {}
        self.first: dict[Sequence, int] = {}  # position of the first token of the last run
        self.contents: dict[int, object] = {}
        self.number = 0

    def _put(self, sequence: Sequence, begin: int) -> None:
        """The tokens from `begin` on are written, in every group that holds them; the others have to be there."""
        for group in self.memory.token_groups:
            first, slots = self.memory.group_slots(sequence, group)
            for position, slot in enumerate(slots.tolist(), first):
                wanted = group, self.tokens[sequence][position]
                if position >= begin:
                    self.contents[slot] = wanted
                assert self.contents[slot] == wanted, f"{sequence}, token {position} of group {group}"

    def _start(self, sequence: Sequence, known: int, filled: int) -> None:
        hit = self.memory.admit(sequence, known if filled == known else filled, filled)
        assert 0 <= hit < filled
        self.first[sequence] = hit
        self._put(sequence, hit)

    @rule(
        prompt=st.integers(1, 30),
        output=st.integers(1, 17),
        content=st.lists(st.integers(0, 1), max_size=6),
        chunk=st.sampled_from([5, 48]),
    )
    def admit(self, prompt, output, content, chunk):
        request = Request(self.number, 0, prompt, output, content=tuple(content), content_grain=self.grain)
        self.number += 1
        memory = self.memory
        if memory.admission_in_chunks(request, prompt, chunk) is not Admission.OK:
            return
        sequence = Sequence(request, 0, 0, prompt + output - 1)
        request.sequences.append(sequence)
        self.tokens[sequence] = [
            ("prompt", position, *content[: position // self.grain + 1])
            if position < len(content) * self.grain
            else (request.id, position)
            for position in range(prompt + output)
        ]
        self._start(sequence, prompt, min(prompt, memory.cached_tokens(request, prompt) + chunk))
        self.live.append(sequence)
        if sequence.num_tokens < prompt:
            self.partial[sequence] = prompt

    @precondition(lambda self: self.partial)
    @rule(data=st.data(), tokens=st.integers(1, 9))
    def go_on(self, data, tokens):
        """The next part of a prompt, if there is room."""
        sequence = data.draw(st.sampled_from(list(self.partial)), label="sequence")
        start = sequence.num_tokens
        tokens = min(tokens, self.partial[sequence] - start)
        if self.memory.demand(sequence, tokens) > self.memory.headroom:
            return
        self.memory.extend(sequence, tokens)
        self.first[sequence] = start
        self._put(sequence, start)
        if start + tokens == self.partial[sequence]:
            del self.partial[sequence]

    @rule(steps=st.integers(1, 6), together=st.booleans())
    def decode(self, steps, together):
        """All that decode gain a token, as one batch or one after the other."""
        memory = self.memory
        for _ in range(steps):
            ready = [
                each for each in self.live if each not in self.partial and each.num_tokens < each.final_tokens
            ]
            growing = [each for each in ready if each.num_tokens == each.capacity]
            if together and memory.headroom >= len(growing):
                due = [edge for each in ready for edge in each.edges if edge.turn == each.num_tokens + 1]
                memory.turn([(1, list(growing), due)]) if growing or due else None
            else:
                for sequence in list(ready):
                    if memory.can_append(sequence.request):
                        memory.append(sequence)
                    else:
                        ready.remove(sequence)
                memory.settle()
            memory.look_at_windows()
            for sequence in ready:
                memory.num_tokens += memory.slots_per_token
                memory.slide(sequence.sliding)
                self.first[sequence] = sequence.origin
                sequence.origin += 1
            for sequence in ready:
                self._put(sequence, sequence.num_tokens - 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), back=st.booleans())
    def leave(self, data, back):
        """A request leaves, at its end or before; it may be back at once."""
        sequence = data.draw(st.sampled_from(self.live), label="sequence")
        tokens = sequence.num_tokens
        self.memory.free(sequence)
        self.live.remove(sequence)
        self.partial.pop(sequence, None)
        request = sequence.request
        if not back or not 0 < tokens < sequence.final_tokens:
            return
        request.preemptions += 1
        if self.memory.admission(request, tokens + 1) is Admission.OK:
            self._start(sequence, tokens + 1, tokens + 1)
            self.live.append(sequence)

    def _undone(self) -> list[Sequence]:
        return [each for each in self.live if not self.memory.holdings[each].done]

    @precondition(lambda self: len(self._undone()) > 2)
    @rule(data=st.data())
    def retire(self, data):
        """A request is done and keeps its pages for a while, which may be shared meanwhile."""
        sequence = data.draw(st.sampled_from(self._undone()), label="sequence")
        self.memory.retire(sequence.request)
        self.partial.pop(sequence, None)
        self.first[sequence] = 0

    @invariant()
    def books_are_right(self):
        self.memory.check_integrity()

    @invariant()
    def windows_are_held_and_what_is_behind_them_is_not(self):
        memory = self.memory
        live: dict[int, bool] = {}
        for sequence in self.live:
            for group in memory.token_groups if not memory.holdings[sequence].done else ():
                first, slots = memory.group_slots(sequence, group)
                window = memory.groups[group].window
                needed = 0 if window is None else max(0, self.first[sequence] - window + 1)
                assert first <= needed, "what the last run looked at is there"
                assert needed - first <= memory.block_size or sequence.num_tokens == 0
                assert len(slots) == sequence.num_tokens - first
                for position, slot in enumerate(slots.tolist(), first):
                    assert self.contents[slot] == (group, self.tokens[sequence][position])
                    live[slot] = live.get(slot, False) or position >= needed
        states = len(memory.groups) - len(memory.token_groups)
        done = sum(holding.done for holding in memory.holdings.values())
        slots_of = sum(
            memory.groups[self.contents[slot][0]].token_slots for slot, needed in live.items() if needed
        )
        slots_of += states * 7 * len(self.live)
        seen = memory.usage().token_states
        if not memory.blocks_saved and not done:
            assert slots_of <= seen <= slots_of + self._unclaimed()

    def _unclaimed(self) -> int:
        """Dead tokens in pages that had other holders when the window entered them count as live."""
        memory = self.memory
        return sum(
            memory.block_size * memory.groups[edge.group].token_slots
            for holding in memory.holdings.values()
            for edge in holding.edges
            if not edge.own
        )

    def teardown(self):
        for sequence in self.live:
            self.memory.free(sequence)
        self.memory.check_integrity()
        assert self.memory.usage() == self.empty
        assert not self.memory.owners
        assert not self.memory.holdings


@pytest.mark.parametrize("name", SETTINGS)
def test_group_ownership(name):
    machine = type("Machine", (GroupOwnership,), {"name": name})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )
