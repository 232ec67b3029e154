"""A user's own policies, written as in a plug-in file: thirty lines each, under the same checks as built-in ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from sim import (
    Admission,
    Allocator,
    Capacity,
    PositiveInt,
    Request,
    Scheduler,
    Sequence,
    Step,
    allocator,
    scheduler,
)
from sim.pools.block_pool import BlockPool
from tests.sim import test_oracle
from tests.sim.story import Story, ask, memory
from tests.sim.test_allocators import Ownership


class Doubling(Allocator):
    """Slots anywhere, twice as many whenever a sequence outgrows those it has.

    Fields:
        first: Slots that a sequence starts with, where its prompt is shorter.
    """

    def __init__(self, capacity: Capacity, *, first: PositiveInt = 4) -> None:
        super().__init__(capacity)
        self.first = first
        self.pool = BlockPool(capacity.num_slots)

    def admission(self, request: Request, num_tokens: int) -> Admission:
        needed = max(self.first, num_tokens)
        if needed > self.num_slots:
            return Admission.NEVER
        return Admission.OK if needed <= self.pool.num_free else Admission.LATER

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        table = sequence.block_table
        table += self.pool.take(max(self.first, num_tokens, 2 * len(table)) - len(table))
        return len(table)

    def release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []

    def slots(self, sequence: Sequence):
        return np.array(sequence.block_table[: sequence.num_tokens], np.int64)

    def num_external(self, head_refused: bool) -> int:
        return self.pool.num_free if self.pool.num_free < self.first else 0

    @property
    def headroom(self) -> int:
        largest = max([sequence.capacity for sequence in self.sequences], default=1)
        return self.pool.num_free // largest

    def can_append(self, request: Request) -> bool:
        (sequence,) = request.sequences
        return sequence.num_tokens < sequence.capacity or sequence.capacity <= self.pool.num_free


class ShortestFirst(Scheduler):
    """The shortest prompt of the queue first; prompts and decodes share a step."""

    def plan(self, now: int) -> Step:
        step = Step()
        self.head_refused = False
        self.grow(step)
        if step.preempted:
            return step
        if self.swapped:
            self.swap_in(step)
            return step
        shortest = sorted(self.waiting, key=lambda request: (request.prefill_tokens, request.id))
        self.waiting.clear()
        self.waiting.extend(shortest)
        self.admit_in_order(step, now)
        return step


class Patient(Scheduler):
    """Looks at the queue every 20 ms only, or when nothing runs: what time it is matters."""

    def __init__(self, allocator: Allocator, *, preemption: str = "auto", max_num_seqs: int = 99) -> None:
        super().__init__(allocator, preemption=preemption, max_num_seqs=max_num_seqs)
        self.looked = 0

    def plan(self, now: int) -> Step:
        step = Step()
        self.head_refused = False
        self.grow(step)
        if not step.preempted and (now >= self.looked + 20_000_000 or not self.running):
            self.looked = now
            if self.swapped:
                self.swap_in(step)
            else:
                self.admit_in_order(step, now)
        return step


OWN = {"doubling": Doubling, "shortest_first": ShortestFirst, "patient": Patient}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The policies are known to the registries while the tests of this module run."""
    for registry, kind in ((allocator, "doubling"), (scheduler, "shortest_first"), (scheduler, "patient")):
        registry(kind)(OWN[kind])
    test_oracle.ALLOCATORS["doubling"] = ("doubling", {})
    yield
    del test_oracle.ALLOCATORS["doubling"]
    for registry, kind in ((allocator, "doubling"), (scheduler, "shortest_first"), (scheduler, "patient")):
        del registry._entries[kind]


def test_an_own_allocator_keeps_its_books():
    machine = type("Machine", (Ownership,), {"kind": "doubling", "fields": {"first": 3}})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=50, stateful_step_count=50, deadline=None)
    )


@pytest.mark.parametrize(
    ("allocator_name", "scheduler_kind"),
    [
        ("doubling", "vllm_v0"), ("doubling", "orca"), ("doubling", "static"), ("doubling", "shortest_first"),
        ("paged 4", "shortest_first"), ("paged 4", "patient"), ("paged 4 little host", "patient"),
        ("doubling", "patient"), ("contiguous oracle first fit", "shortest_first"),
    ],
)  # fmt: skip
@settings(max_examples=25)
@given(
    rows=st.lists(test_oracle.single, min_size=1, max_size=14),
    slots=st.sampled_from([64, 96, 150, 400]),
    clock=st.sampled_from(list(test_oracle.TIMINGS)),
    preemption=st.sampled_from(["auto", "recompute", "swap"]),
    max_num_seqs=st.sampled_from([3, 32]),
)
def test_own_policies_equal_the_naive_stepper(
    allocator_name, scheduler_kind, rows, slots, clock, preemption, max_num_seqs
):
    workload = test_oracle.Given(rows)
    fields = {"preemption": preemption, "max_num_seqs": max_num_seqs}
    test_oracle.assert_equal(
        *test_oracle.both(workload, allocator_name, scheduler_kind, clock, slots, **fields)
    )


def test_the_shortest_goes_first():
    story = Story(ShortestFirst(memory(slots=32)), ask((0, 28, 2), (1, 20, 2), (2, 7, 2), (2, 4, 2)))
    assert story.log == [
        "0: prompt 0(28)",
        "10: decode 0",
        "11: prompt 3(4) 2(7) 1(20)",
        "21: decode 1, recompute 3 2",
        "22: prompt 3(5) 2(8)",
    ]


def test_the_patient_one_waits():
    story = Story(Patient(memory(slots=80)), ask((0, 4, 30), (5, 4, 2), (25, 4, 2)))
    assert [line for line in story.log if "prompt" in line] == [
        "0: prompt 0(4)",
        "20: prompt 1(4), decode 0",
        "40: prompt 2(4), decode 0",
    ]
