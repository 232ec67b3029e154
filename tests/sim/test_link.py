"""The host link: what is known at submission is what a resource of SimPy comes to."""

from __future__ import annotations

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from sim import Device, Model, Transfers, UserError
from sim.link import Link

MODEL = Model(
    name="four layers", num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, num_params=1e6,
    active_params=1e6, max_model_len=64,
)  # fmt: skip
DEVICE = Device(name="d", flops_per_s=1e12, memory_bytes_per_s=1e10, memory_bytes=1e9, host_bytes_per_s=1e9)
US = 1_000


def link(copy_us: float = 10.0, **fields) -> Link:
    """A block takes 10 us in either direction."""
    return Link(Transfers(None, None, 1, copy_latency_us=copy_us, asynchronous=True, **fields))


def test_copies_of_a_direction_wait_for_each_other_and_not_for_the_other_direction():
    wire = link()
    assert wire.submit_out(3) == [10 * US, 20 * US, 30 * US]  # each block is over when it is copied
    wire.now = 15 * US
    assert wire.submit_out(2) == [40 * US, 50 * US]
    assert wire.submit_in(2) == 35 * US
    assert wire.submit_in(1, after=50 * US) == 60 * US  # its last block gets to the host at 50
    wire.now = 100 * US
    assert wire.submit_out(1) == [110 * US]
    assert wire.busy_time == 9 * 10 * US


def test_the_queue_counts_both_directions():
    wire = link()
    wire.submit_out(4)
    wire.submit_in(2)
    assert wire.queue_seconds() == pytest.approx(60e-6)
    wire.now = 30 * US
    assert wire.queue_seconds() == pytest.approx(10e-6)
    wire.now = 90 * US
    assert wire.queue_seconds() == 0


def test_a_step_waits_for_what_it_cannot_compute_beside():
    whole = Link(Transfers(MODEL, DEVICE, 4, asynchronous=True))
    layered = Link(Transfers(MODEL, DEVICE, 4, asynchronous=True, layer_wise=True))
    for wire in (whole, layered):
        wire.awaited = 1_000
    assert whole.stall(400, 200) == 600  # nothing is computed before all is there
    assert layered.stall(400, 200) == 600 - 150  # three of four layers are
    assert layered.stall(400, 800) == 0
    assert whole.stall(1_000, 5) == whole.stall(2_000, 5) == 0
    with pytest.raises(UserError, match=r"layer_wise needs a model"):
        Transfers(None, None, 1, asynchronous=True, layer_wise=True)


class Resources:
    """The same copies by SimPy: a resource of capacity one in each direction, a process for each copy."""

    def __init__(self, transfers: Transfers) -> None:
        self.env = simpy.Environment(initial_time=0)
        self.transfers = transfers
        self.lanes = {"out": simpy.Resource(self.env, 1), "in": simpy.Resource(self.env, 1)}
        self.ends: dict[int, int] = {}

    def copy(self, number: int, way: str, blocks: int, before: simpy.Event | None):
        with self.lanes[way].request() as turn:  # takes its place in the queue at submission
            yield turn
            if before is not None and not before.processed:
                yield before
            seconds = self.transfers.swap_seconds(*((blocks, 0) if way == "out" else (0, blocks)))
            yield self.env.timeout(round(seconds * 1e9))
            self.ends[number] = int(self.env.now)


@given(
    copies=st.lists(
        st.tuples(st.integers(0, 200 * US), st.booleans(), st.integers(1, 12)), min_size=1, max_size=30
    ),
    copy_us=st.sampled_from([0.7, 3.3, 10.0]),
)
def test_every_copy_ends_when_a_simpy_resource_would_end_it(copies, copy_us):
    """Every third copy back is of blocks that went out just before it."""
    wire = link(copy_us)
    there = Resources(wire.transfers)
    env = there.env
    known: dict[int, int] = {}

    def submit():
        last_out: tuple[int, simpy.Event] | None = None
        for number, (gap, out, blocks) in enumerate(copies):
            yield env.timeout(gap)
            wire.now = int(env.now)
            before = None
            if out:
                known[number] = wire.submit_out(blocks)[-1]
            else:
                after = 0
                if last_out is not None and number % 3 == 0:
                    after, before = known[last_out[0]], last_out[1]
                known[number] = wire.submit_in(blocks, after)
            process = env.process(there.copy(number, "out" if out else "in", blocks, before))
            if out:
                last_out = number, process

    env.process(submit())
    env.run()
    assert there.ends == known
