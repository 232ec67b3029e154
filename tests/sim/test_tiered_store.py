"""Tiers by themselves: against lists of blocks that are sorted anew for every eviction, and as stories of time."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sim import Request, Sequence, Transfers, UserError
from sim.prefixes.eviction import eviction
from sim.tiers.kinds import tier
from sim.tiers.storage_tier import Run
from sim.tiers.tiered_store import TieredStore
from sim.tiers.traffic import TierTraffic
from tests.sim.story import Story, ask, memory, scheduled
from tests.sim.test_link import DEVICE, MODEL
from tests.sim.tiers import made

LENGTH = 9
"""Blocks of the longest prompt; block i of prompt p has the key (p, i)."""


class Block:
    """A block as an eviction order sees it, and what decides among equals: when it came, its place in the prompt."""

    def __init__(self, now, place, priority):
        self.created = self.used = self.number = now
        self.place = place
        self.uses = 0
        self.priority = priority


class Machine(RuleBasedStateMachine):
    """Prompts that become findable, and prompts that are loaded, in any order."""

    SIZES = (12,)
    ORDER = "lru"

    def __init__(self):
        super().__init__()
        self.store = TieredStore([made("host", size, self.ORDER, name=f"tier {size}") for size in self.SIZES])
        self.blocks: dict[tuple[int, int], Block] = {}
        self.clock = 0

    def tick(self):
        self.clock += 1
        return self.clock

    def rank(self, key):
        block = self.blocks[key]
        return eviction[self.ORDER](block), block.number, -block.place

    @rule(prompt=st.integers(0, 5), length=st.integers(1, LENGTH), priority=st.integers(0, 2))
    def write(self, prompt, length, priority):
        keys = [(prompt, at) for at in range(length)]
        request = Request(0, 0, 1, 1, priority=-priority)  # greater is less urgent there
        self.store.device_keys = list(keys)
        self.store.found(Sequence(request, 0, 0, 1), list(keys), list(range(length)))
        self.store.begin(self.store.now + 1)
        new = [key for key in keys if key not in self.blocks]
        if new:
            self.put(new, priority)

    def put(self, new, priority):
        new = new[: sum(self.SIZES)]
        missing = len(self.blocks) + len(new) - sum(self.SIZES)
        for key in sorted(self.blocks, key=self.rank)[: max(0, missing)]:
            del self.blocks[key]
        now = self.tick()
        for place, key in enumerate(new):
            self.blocks[key] = Block(now, place, priority)

    @precondition(lambda self: self.blocks)
    @rule(prompt=st.integers(0, 5), length=st.integers(1, LENGTH), priority=st.integers(0, 2))
    def read(self, prompt, length, priority):
        keys = [(prompt, at) for at in range(length)]
        request = Request(0, 0, 1, 1, priority=-priority)  # greater is less urgent there
        found = self.store.lookup(request, keys, 0)
        there = [key in self.blocks for key in keys]
        assert found == (there.index(False) if False in there else length)
        self.store.load(request, keys[:found], list(range(found)))
        self.store.stall(self.store.now, 0)
        for key in reversed(keys[:found]):
            block = self.blocks[key]
            block.used = self.tick()
            block.uses += 1
            block.priority = max(block.priority, priority)

    @invariant()
    def each_tier_keeps_what_it_should(self):
        self.store.check_integrity()
        assert set(self.store.index) == set(self.blocks)


class Lfu(Machine):
    ORDER = "lfu"


class Fifo(Machine):
    ORDER = "fifo"


class Filo(Machine):
    ORDER = "filo"


class Priority(Machine):
    ORDER = "priority"


class Chain(Machine):
    """Behind each other, tiers are one list of blocks by their last use: the nearest has the head of it, and so on."""

    SIZES = (9, 12, 10)

    @invariant()
    def the_nearest_has_what_was_used_last(self):
        latest = sorted(self.blocks, key=self.rank, reverse=True)
        for tier_ in self.store.tiers:
            mine, latest = latest[: tier_.num_blocks], latest[tier_.num_blocks :]
            assert {key for run in tier_.runs for key in run.keys} == set(mine)


for machine in (Machine, Lfu, Fifo, Filo, Priority, Chain):
    case = machine.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
    globals()[f"Test{machine.__name__}"] = case


def test_parts_of_runs_keep_their_places():
    run = Run([*"abcdef"], (3, 0), 1, 0)
    run.slots = [5, 6, 7, 8, 9, 10]
    tail = run.part(4)
    middle = run.part(1)
    assert (run.keys, run.slots, run.number) == (["a"], [5], (3, 0))
    assert (middle.keys, middle.slots, middle.number) == ([*"bcd"], [6, 7, 8], (3, -1))
    assert (tail.keys, tail.slots, tail.number) == ([*"ef"], [9, 10], (3, -4))


# Time: a prompt takes 10 ms whatever its length, a decode 1 ms, a block 1 ms to or from the host

NAMED = {"content": tuple(range(5)), "content_grain": 4}


def story(*rows, slots=24, tiers=(("host", 20),), transfers=None, clock=None, **fields) -> Story:
    """Requests over six device blocks of four slots; those of odd numbers share no content with the others."""
    owner = memory("prefix", slots=slots, block_size=4)
    speeds = {"bandwidth_gb_per_s": 1.0, "latency_us": 0.0}
    owner.open_tiers(
        TieredStore([made(kind, blocks, **speeds, **dict(more)) for kind, blocks, *more in tiers], **fields)
    )
    asked = ask(*rows)
    for request in asked:
        if request.id % 2 == 0:
            request.content, request.content_grain = NAMED["content"], 4
    return Story(
        scheduled("vllm_v1", owner), asked, clock=clock,
        transfers=transfers or Transfers(None, None, 4, copy_latency_us=0, asynchronous=True),
    )  # fmt: skip


AGAIN = (0, 16, 1), (100, 24, 1), (200, 17, 1)  # four blocks; all six by another; the four again


def test_write_through_copies_beside_the_computation_and_loads_take_the_time_of_the_link():
    told = story(*AGAIN)
    assert told.log == ["0: prompt 0(16)", "100: prompt 1(24)", "200: prompt 2(1)"]
    assert told.column("steps", "duration") == [10, 10, 14]
    assert told.summary["host_hit_tokens"] == told.summary["prefix_hit_tokens"] == 16
    assert told.summary["host_written_gb"] == pytest.approx(10e-3)  # 4 + 6; one token is no block
    assert told.summary["host_read_gb"] == pytest.approx(4e-3)
    assert told.summary["tier_wait_s"] == pytest.approx(4e-3)


def test_what_the_device_evicts_is_written_back_before_its_place_is_taken():
    told = story(*AGAIN, policy="write_back")
    assert told.column("steps", "duration") == [10, 14, 15]  # 4 blocks leave; 5 leave while 4 come
    assert told.summary["host_hit_tokens"] == 16
    assert told.summary["host_written_gb"] == pytest.approx(9e-3)


def test_selective_writes_what_was_hit_often_enough():
    once = story(*AGAIN, policy="selective", min_hits=1)
    assert once.summary["host_written_gb"] == 0
    rows = (0, 16, 1), (100, 1, 1), (150, 17, 1), (200, 24, 1), (250, 17, 1)
    twice = story(*rows, policy="selective", min_hits=1)
    assert twice.summary["device_hit_tokens"] == 16
    assert twice.summary["host_written_gb"] == pytest.approx(4e-3)
    assert twice.summary["host_hit_tokens"] == 16
    assert story(*rows, policy="selective", min_hits=2).summary["host_hit_tokens"] == 0


def test_a_step_waits_for_a_block_that_is_still_copied_out():
    """The second prompt comes when the first is done, and its blocks are needed at once."""
    told = story((0, 16, 1), (5, 24, 1))
    assert told.column("steps", "duration") == [10, 14]
    slow = story((0, 16, 1), (5, 8, 1))  # two blocks are free beside those that leave
    assert slow.column("steps", "duration") == [10, 10]


def test_a_block_is_loaded_when_it_is_in_its_tier_and_not_before():
    told = story((0, 16, 1), (5, 24, 1), (6, 17, 1), policy="write_back")
    # 10: four blocks leave until 14 and then 1 is computed until 24; 24: 1's leave until 29, 0's come until 28
    assert told.column("steps", "duration") == [10, 14, 15]


SLOW = ("host", 10), ("nvme", 20, ("write_bandwidth_gb_per_s", 0.05))
"""A drive that takes 20 ms for each block written: at 210 ms one goes there, so that another can be written."""
FULL = (0, 16, 1), (100, 24, 1), (150, 1, 1), (200, 4, 1)


def test_what_is_on_its_way_to_a_farther_tier_is_loaded_from_there_when_it_has_arrived():
    told = story(*FULL, (215, 17, 1), tiers=SLOW)
    assert told.summary["nvme_hit_tokens"] == 4
    assert told.column("steps", "duration") == [10, 10, 10, 10, 26]  # written until 230, read until 231


def test_a_full_tier_takes_nothing_before_it_has_room():
    """The block of 200 is copied to the host when another has left it, and until then nobody gets its place."""
    told = story(*FULL, (205, 1, 1), (215, 24, 1), tiers=SLOW)
    assert told.column("steps", "duration")[-1] == 21  # from 220 on; the copies end at 230 and 231
    assert story(*FULL, (205, 1, 1), (215, 24, 1)).column("steps", "duration")[-1] == 10


def test_synchronous_transfers_are_waited_for_all():
    told = story((0, 16, 3), transfers=Transfers(None, None, 4, copy_latency_us=0))
    assert told.column("steps", "duration") == [
        10,
        5,
        1,
    ]  # the prompt's blocks are written when they are computed
    assert told.summary["tier_wait_s"] == pytest.approx(4e-3)
    assert story((0, 16, 3)).column("steps", "duration") == [10, 1, 1]


def test_layers_are_computed_while_the_rest_arrives():
    beside = Transfers(MODEL, DEVICE, 4, asynchronous=True, layer_wise=True)
    told = story(*AGAIN, transfers=beside)
    layers = MODEL.num_layers
    expected = 10 + max(0.0, 4 - 10 * (layers - 1) / layers)
    assert told.column("steps", "duration")[2] == pytest.approx(expected)


def test_what_is_cheaper_computed_is_not_loaded():
    """A prompt of this clock takes 10 ms whatever its length, so loading gains nothing: a tie is computed again."""
    told = story(*AGAIN, load="by_cost")
    assert told.column("steps", "duration") == [10, 10, 10]
    assert told.summary["prefix_hit_tokens"] == 0
    assert told.summary["tier_declined_tokens"] == 16


class PerToken:
    """10 ms for each token of a prompt, 1 ms for a decode."""

    context_free = True
    counts_entries = False
    num_slots = 0
    num_entries = None

    def __init__(self, ms):
        self.ms = ms

    def seconds(self, step):
        return (self.ms * step.num_prefill_tokens + (step.num_decodes > 0)) / 1e3

    def decode_seconds(self, size, context):
        return 1e-3


@pytest.mark.parametrize(
    ("per_token", "loaded"),
    [(0.2, 0), (0.25, 0), (0.26, 16), (1.0, 16)],  # a block of four takes 1 ms from the host
)
def test_what_is_cheaper_loaded_is_loaded_and_a_tie_is_computed(per_token, loaded):
    told = story(*AGAIN, load="by_cost", clock=PerToken(per_token))
    assert told.summary["host_hit_tokens"] == loaded
    assert told.column("steps", "duration")[2] == pytest.approx(min(17 * per_token, 4 + per_token))


def test_the_cheap_tier_is_read_and_the_dear_one_behind_it_is_not():
    """The end of the prompt went on to a slow tier."""
    owner = memory("prefix", slots=24, block_size=4)
    store = TieredStore(
        [
            tier["host"](1e6, None, num_blocks=8, bandwidth_gb_per_s=10.0, latency_us=0),
            tier["remote"](1e6, None, num_blocks=100, bandwidth_gb_per_s=0.1, latency_us=0),
        ],
        load="by_cost",
    )
    owner.open_tiers(store)
    asked = ask(*AGAIN)
    asked[0].content = asked[2].content = NAMED["content"]
    asked[0].content_grain = asked[2].content_grain = 4
    told = Story(
        scheduled("vllm_v1", owner), asked, clock=PerToken(1.0),
        transfers=Transfers(None, None, 4, copy_latency_us=0, asynchronous=True),
    )  # fmt: skip
    assert told.summary["host_hit_tokens"] == 8  # ten blocks came, the last two of the first prompt went on
    assert told.summary["remote_hit_tokens"] == 0
    assert told.summary["tier_declined_tokens"] == 8


def test_a_full_tier_passes_on_what_its_order_names_and_the_last_one_drops_it():
    told = story(*AGAIN, tiers=(("host", 4), ("nvme", 5)))
    # the other's six blocks: four stay, two go on at once, and so do the four of before, of which one is lost
    assert told.summary["nvme_hit_tokens"] == 12
    assert told.summary["host_hit_tokens"] == 0
    assert told.summary["tier_dropped_blocks"] >= 1


def test_tiers_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="list one at least"):
        TieredStore([])
    with pytest.raises(UserError, match="different names"):
        TieredStore([made("host", 1), made("host", 2)])
    with pytest.raises(UserError, match="none of them device"):
        TieredStore([made("host", 1, name="device")])
    with pytest.raises(UserError, match="belady knows all requests beforehand"):
        made("nvme", 1, "belady")
    with pytest.raises(UserError, match="needs a model"):
        tier["host"](0, None)
    with pytest.raises(UserError, match="hold no block"):
        tier["host"](2e9, None, capacity_gb=1.0)


def test_blocks_in_slots_side_by_side_travel_in_one_copy_for_each_piece():
    """On the host K and V of each layer lie by themselves; elsewhere a block is in one piece."""
    host, drive = tier["host"](1e6, None, num_blocks=99), tier["nvme"](1e6, None, num_blocks=99)
    for each in (host, drive):
        each.price_copies(1e-3, 2e-3, pieces=4)
        for slots in ([5, 6, 7], [8, 9], [3], [11, 13]):
            each.out.add(slots)
            each.back.add(slots)
        assert each.out.stretches == 4
    assert (host.out.seconds, host.back.seconds) == pytest.approx((16e-3, 32e-3))
    assert (drive.out.seconds, drive.back.seconds) == pytest.approx((4e-3, 8e-3))
    host.out.clear()
    assert host.out.seconds == 0


def test_a_transfer_takes_its_latency_its_bytes_and_its_copies():
    there = tier["host"](1e6, None, num_blocks=99, bandwidth_gb_per_s=1.0, latency_us=10)
    there.price_copies(1e-3, 1e-3, pieces=2)
    traffic = TierTraffic([there])
    run = Run([1, 2, 3], (0, 0), 0, 0)
    run.slots = [4, 5, 9]
    traffic.write(there, run, None, lifted=False)
    assert traffic.stall(0, 0) == 10_000 + 3 * 1_000_000 + 2 * 2 * 1_000_000
