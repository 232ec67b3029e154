"""The index of runs against a dictionary with an entry for each key, and pools that hide keys of one request."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sim import Request
from sim.prefixes.keys import own_keys, stretch
from sim.tiers.offloading_pools import OffloadingPool
from sim.tiers.run_index import RunIndex
from sim.tiers.storage_tier import Run
from tests.sim.tiers import made, store


class Machine(RuleBasedStateMachine):
    """Runs of shared keys, of stretches that one request has, and of both, in a tier that loses their ends."""

    def __init__(self):
        super().__init__()
        self.tier = made("host", 1000)
        self.index = RunIndex()
        self.plain: dict[int, Run] = {}
        self.clock = 0

    @rule(shared=st.integers(0, 3), request=st.integers(0, 2), first=st.integers(0, 9), own=st.integers(0, 5))
    def name(self, shared, request, first, own):
        asked = Request(request, 0, 1, 1)
        keys = [*range(shared), *own_keys(asked, first, first + own)]
        assert not keys or self.index.has_any(stretch(keys)) == any(key in self.plain for key in keys)
        keys = [key for key in keys if key not in self.plain]
        if keys:
            self.clock += 1
            run = self.index.name(Run(stretch(keys), (self.clock, 0), self.clock, 0))
            self.tier.add(run)
            self.plain |= dict.fromkeys(keys, run)

    @precondition(lambda self: self.plain)
    @rule(data=st.data())
    def part(self, data):
        run = data.draw(st.sampled_from([*self.plain.values()]))
        if len(run.keys) > 1:
            other = self.index.name(self.tier.part(run, data.draw(st.integers(1, len(run.keys) - 1))))
            self.plain |= dict.fromkeys(other.keys, other)

    @precondition(lambda self: self.plain)
    @rule(data=st.data())
    def drop(self, data):
        before = self.tier.num_used
        count = data.draw(st.integers(1, before))
        for run, keys in self.tier.drop(count):
            self.index.drop(run, keys)
            for key in keys:
                del self.plain[key]
        assert self.tier.num_used == before - count

    @invariant()
    def both_are_equal(self):
        self.tier.check_integrity()
        assert sorted(self.index) == sorted(self.plain)
        assert len(self.index) == len(self.plain)
        for key, run in self.plain.items():
            assert self.index.get(key) is run
        known = [*range(3)]
        assert self.index.leading(known) == next((at for at in known if at not in self.plain), 3)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_keys_of_one_request_are_a_range_only_where_they_follow_on_one_another():
    request = Request(3, 0, 1, 1)
    assert stretch([*own_keys(request, 2, 6)]) == own_keys(request, 2, 6)
    for keys in ([1, 2, 3], [7, *own_keys(request, 1, 3)], [("a", 1), ("a", 2)]):
        assert stretch(keys) is keys
    forked = [*own_keys(request, 0, 2), *own_keys(request, 2, 4, branch=1)]
    assert stretch(forked) is forked


def test_blocks_of_one_request_are_found_when_it_gives_way_and_known_to_tiers_before():
    pool = OffloadingPool(4, store("host"), keyless_first=True)
    keys = own_keys(Request(0, 0, 1, 1), 0, 2)
    table = pool.take(2)
    pool.register_table(table, keys)
    assert [pool.keys[block] for block in table] == [*keys]
    assert pool.find_leading(keys) == []
    pool.check_integrity([table])
    pool.reveal(table, keys)
    assert pool.find_leading(keys) == table
    pool.check_integrity([table])
    pool.release(table[::-1])
    assert pool.find_leading(keys) == table
    pool.take(4)
    assert pool.find_leading(keys) == []
    assert pool.num_keyed == 0


def test_stretches_of_one_request_overlap_in_a_single_key():
    request, index = Request(3, 0, 1, 1), RunIndex()
    index.name(Run(own_keys(request, 5, 8), (1, 0), 1, 0))
    for first, stop, there in ((2, 5, False), (3, 6, True), (7, 9, True), (8, 9, False)):
        assert index.has_any(own_keys(request, first, stop)) is there
    assert not index.has_any(own_keys(Request(4, 0, 1, 1), 5, 8))
