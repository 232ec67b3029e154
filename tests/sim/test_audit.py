"""The audit: sound allocators pass on every step of any workload, without doing anything for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import Admission, Allocator, Capacity, ProbeError, Request, allocator, scheduler, victim
from sim.allocators import PagedAllocator
from sim.audit.audit import Audit
from tests.sim.probing import GROUPS, requests, run
from tests.sim.story import ask, memory


def capacity(slots: int) -> Capacity:
    return Capacity(num_slots=slots, max_model_len=64)


@pytest.mark.parametrize("policy", scheduler.kinds)
@pytest.mark.parametrize("kind", allocator.kinds)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 10**6),
    slots=st.sampled_from([64, 96, 150, 400]),
    preemption=st.sampled_from(["auto", "recompute", "swap", "hybrid", "partial"]),
    who=st.sampled_from(victim.kinds),
)
def test_every_registered_allocator_passes(kind, policy, seed, slots, preemption, who):
    owner = allocator[kind](capacity(slots))
    asked = requests(seed, groups=kind in GROUPS)
    audit = Audit(every=1)
    summary = run(owner, asked, audit, policy, preemption=preemption, victim=who, max_num_seqs=8)
    assert audit.num_samples == summary["steps"]
    assert not audit.ledger.live
    assert not getattr(audit.ledger, "_forked", None), "nothing is kept of sequences that are over"


COUNTS_ON_ENDS = {"lightllm", "sglang", "trtllm"}
"""Schedulers that admit whom they foresee to fit, and so hardly ever preempt."""


@pytest.mark.parametrize("policy", scheduler.kinds)
@pytest.mark.parametrize(
    "fields", [{"block_size": 1}, {"block_size": 4}, {"block_size": 4, "num_host_blocks": 6}]
)
def test_small_blocks_and_a_small_host(policy, fields):
    moved = 0
    for seed in range(14):
        owner = allocator["paged"](capacity(100), **fields)
        moved += run(owner, requests(seed, groups=True), policy=policy)["preemptions"]
    assert moved > (-1 if policy in COUNTS_ON_ENDS else 10)


@pytest.mark.parametrize("choice", [{"reserve": "pow2"}, {"reserve": "oracle", "placement": "best_fit"}])
def test_chunks(choice):
    for seed in range(10):
        run(allocator["contiguous"](capacity(300), **choice), requests(seed), policy="orca")


@pytest.mark.parametrize("kind", allocator.kinds)
def test_a_run_is_the_same_with_a_probe(kind):
    def asked() -> list[Request]:
        return requests(3, 40, groups=kind in GROUPS)

    def owner() -> Allocator:
        return allocator[kind](capacity(200))

    class Blind:
        next_sample = 1 << 60

        def start(self, allocator):
            pass

        def finish(self):
            pass

    expected = run(owner(), asked(), Blind())
    for audit in (Audit(every=1), Audit(every=7), Audit(samples=16), Audit(samples=16, num_requests=40)):
        assert run(owner(), asked(), audit) == expected


def test_a_long_run_takes_as_many_samples_as_asked_for():
    asked = [Request(name, name * 20_000_000, 20, 30) for name in range(3000)]
    audit = Audit(num_requests=3000)
    summary = run(memory(slots=2000), asked, audit)
    assert summary["steps"] > 10_000
    assert 48 <= audit.num_samples <= 70
    assert audit.cpu_s > 0


class Scattered(Allocator):
    """A user's own: single slots wherever they are free, kept in a dictionary, no pool and no table."""

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity)
        self.free_slots = list(range(capacity.num_slots))
        self.places: dict[object, list[int]] = {}

    def admission(self, request, num_tokens):
        if request.prompt_tokens + request.output_tokens > self.num_slots:
            return Admission.NEVER
        return Admission.OK if num_tokens <= len(self.free_slots) else Admission.LATER

    def reserve(self, sequence, num_tokens):
        held = self.places.setdefault(sequence, [])
        while len(held) < num_tokens:
            held.append(self.free_slots.pop(len(self.free_slots) // 2))
        return len(held)

    def release(self, sequence):
        self.free_slots += self.places.pop(sequence)

    def slots(self, sequence):
        return np.array(self.places[sequence][: sequence.num_tokens], np.int64)

    @property
    def headroom(self):
        return len(self.free_slots)

    def can_append(self, request):
        return bool(self.free_slots)


def test_an_allocator_of_a_users_own():
    preemptions = 0
    for seed in range(10):
        preemptions += run(Scattered(capacity(150)), requests(seed), policy="orca")["preemptions"]
    assert preemptions


def test_a_users_own_that_hands_a_slot_out_twice():
    class Generous(Scattered):
        def reserve(self, sequence, num_tokens):
            held = super().reserve(sequence, num_tokens)
            self.free_slots.insert(0, self.places[sequence][-1])
            return held

        def release(self, sequence):
            self.free_slots = sorted({*self.free_slots, *self.places.pop(sequence)})

    expected = (
        r"step \d+: sequence \d+\.0, slot \d+: expected it for itself alone, found it held by sequence \d+\.0"
    )
    with pytest.raises(ProbeError, match=expected):
        run(Generous(capacity(150)), requests(0), policy="orca")


class Cached(PagedAllocator):
    """A prefix cache as small as can be: full blocks of prompts are found by content, the oldest goes first."""

    keeps_freed = True
    faithful = True  # forgets a block's content when the block is handed out

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity, block_size=4, watermark=0.0)
        self.known: dict[object, int] = {}
        self.pool.free.reverse()
        self.hits = 0

    def reserve(self, sequence, num_tokens):
        request = sequence.request
        prompt = [request.content[: index // 4] for index in range(4, request.prompt_tokens, 4)]
        if sequence.block_table or not request.content:
            held = super().reserve(sequence, num_tokens)
        else:
            hit: list[int] = []
            for name in prompt:
                if name not in self.known:
                    break
                hit.append(self.known[name])
            for block in hit:
                if self.pool.references[block]:
                    self.pool.extra_references += 1
                else:
                    self.pool.free.remove(block)
                self.pool.references[block] += 1
            self.hits += len(hit)
            self.probe.touch("device", hit)
            sequence.block_table = hit
            held = super().reserve(sequence, num_tokens)
        if self.faithful:
            mine = set(sequence.block_table)
            self.known = {name: block for name, block in self.known.items() if block not in mine}
        if request.content:
            self.known.update(zip(prompt, sequence.block_table, strict=False))
        return held

    def admit(self, sequence, num_tokens):
        super().admit(sequence, num_tokens)
        self._recount()
        return 0  # what it found is computed again

    def _recount(self):
        """The books of the base class know no blocks that requests share."""
        self.num_tokens = self.num_held = self.num_internal = 0
        seen: dict[int, int] = {}
        for sequence in self.sequences:
            for index, block in enumerate(sequence.block_table):
                seen[block] = max(seen.get(block, 0), min(4, max(0, sequence.num_tokens - 4 * index)))
        self.num_tokens, self.num_held = sum(seen.values()), 4 * len(seen)

    def free(self, sequence):
        self.release(sequence)
        self.sequences.discard(sequence)
        sequence.capacity = 0
        self._recount()

    def check_integrity(self):
        """Not asked: the audit has to do without."""


def prompts(number: int) -> list[Request]:
    """Requests whose prompts begin alike: one of three contents, then one of two."""
    return [
        Request(
            name,
            name * 4_000_000,
            11 + name % 2,
            14,
            content=(name % 3, name % 2, 10 + name % 5),
            content_grain=4,
        )
        for name in range(number)
    ]


@pytest.mark.parametrize("every", [1, 5, 13])
def test_cached_prefixes(every):
    owner = Cached(capacity(100))
    run(owner, prompts(60), Audit(every=every), policy="orca")
    assert owner.hits > 50


@pytest.mark.parametrize("every", [1, 5])
def test_a_prefix_found_in_a_block_that_holds_something_else_by_now(every):
    class Forgetful(Cached):
        faithful = False

    with pytest.raises(
        ProbeError, match=r"sequence \d+\.0, token \d, device slot \d+(: expected| is written over)"
    ):
        run(Forgetful(capacity(100)), prompts(60), Audit(every=every), policy="orca")


@pytest.mark.parametrize("every", [1, 5])
def test_a_prefix_taken_for_another(every):
    class Careless(Cached):
        def reserve(self, sequence, num_tokens):
            request = sequence.request
            content, request.content = request.content, (0, *request.content[1:])
            held = super().reserve(sequence, num_tokens)
            request.content = content
            return held

    with pytest.raises(ProbeError, match=r"expected its own content \(0x\w+\), found (a )?token"):
        run(Careless(capacity(100)), prompts(60), Audit(every=every), policy="orca")


def test_cached_blocks_without_keeping_them():
    class Inconsistent(Cached):
        keeps_freed = False

    with pytest.raises(
        ProbeError, match=r"Inconsistent hands out blocks .* as cached, but its keeps_freed is False"
    ):
        run(Inconsistent(capacity(100)), prompts(60), policy="orca")


def test_a_probe_says_when():
    class Lost(PagedAllocator):
        def slots(self, sequence):
            return super().slots(sequence)[:-1]

    with pytest.raises(ProbeError, match=r"^step 0: sequence 0\.0 has 5 tokens, and slots for 4$"):
        run(Lost(capacity(64)), ask((0, 5, 5)))
