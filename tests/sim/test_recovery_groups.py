"""Samples and beams that give way: moved or computed again as a whole, or stopped without what they share.

A prompt takes 1 ms a token and a decode 1 ms; blocks hold four slots.
"""

from __future__ import annotations

import pytest

from sim import Admission, Request, Sequence, Step, Transfers
from sim.allocators.blocks import in_common
from sim.audit.audit import Audit
from sim.beams import fork
from sim.schedulers.victims import cheapest_to_recover, latest
from tests.sim.probing import GROUPS, run
from tests.sim.story import Asked, Story, ask, memory, scheduled
from tests.sim.test_recovery import _held, clock, story

TWO = (0, 8, 9), (0, 8, 9)
"""At 17 ms the first needs a block, and the second, two samples, has its prompt in two and one for each sample."""

MODES = ["auto", "swap", "recompute", "hybrid", "partial"]


def group(owner, number: int, prompt: int, *, n: int = 2, grown: int = 0, output: int = 40) -> Request:
    """A request of n samples on the device, each with so many tokens of its own."""
    request = Request(number, 0, prompt, output, n=n, content=(number,), content_grain=prompt)
    first = _held(owner, request)
    if owner.keeps_freed:
        owner.computed(first)
    request.first_token_time = 0
    request.sequences += [fork(owner, first) for _ in range(1, n)]
    for _ in range(grown):
        for sequence in request.sequences:
            owner.append(sequence)
            sequence.origin += 1
            owner.num_tokens += 1
    return request


def crowd(width: int, *, beams: bool = False, number: int = 14) -> list[Request]:
    """More groups than fit, each with a prompt that fills no block to its end."""
    kind = "beam_width" if beams else "n"
    return [Request(each, 0, 9 + each % 5, 17 + each % 7, **{kind: width}) for each in range(number)]


# Which way


@pytest.mark.parametrize(
    ("block_ms", "way"),
    [
        (1.24, "swap out 1"),  # four distinct blocks out and in again take 9.92 ms
        (1.25, "recompute 1"),  # 10 ms either way, for 8 tokens of the prompt and one of each sample
        (1.26, "recompute 1"),
    ],
)
def test_hybrid_takes_the_cheaper_way_for_all_of_a_group(block_ms, way):
    told = story(32, *TWO, preemption="hybrid", n=2, block_ms=block_ms)
    assert told.log[2] == f"17: decode 0, {way}"


def test_what_branches_share_is_computed_once():
    told = story(32, *TWO, preemption="recompute", n=2)
    assert told.log[2:4] == ["17: decode 0, recompute 1", "18: prompt 1(10) 1(2)"]
    assert told.log[-4:-3] == ["66: prompt 1(13) 1(5)"]
    assert told.summary["recomputed_tokens"] == 10 + 12 + 14 + 16
    assert told.summary["recompute_s"] == pytest.approx(60e-3)  # steps that nothing else needed
    assert told.summary["swapped_out_blocks"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_only_v0_gives_a_group_up_that_the_host_has_no_room_for(mode):
    policy = scheduled("vllm_v0", memory(slots=32, num_host_blocks=2), preemption=mode)
    asked = ask(*TWO)
    asked[1].n = asked[1].width = 2
    statuses = Story(policy, asked, clock=clock()).column("requests", "status")
    assert statuses == ["finished", "rejected" if mode == "auto" else "finished"]


@pytest.mark.parametrize("beams", [False, True])
@pytest.mark.parametrize("kind", ["paged", "paged cached", "multi_size", "adaptive", "token"])
def test_every_mode_goes_its_own_way(kind, beams):
    """The reverse of a mode that does nothing: what was moved and what was computed again, mode by mode."""

    def summary(mode: str, block_ms: float = 0.5) -> dict:
        fields = {"block_size": 4, "watermark": 0.0} if kind != "token" else {}
        if "cached" in kind:
            fields["prefix_caching"] = True
        owner = memory(kind.split()[0], slots=240, num_host_blocks=999, **fields)
        policy = scheduled("vllm_v0", owner, preemption=mode)
        transfers = Transfers(None, None, 1, copy_latency_us=1e3 * block_ms)
        return Story(
            policy, Asked(crowd(3, beams=beams), beams=(0.3, 1)), clock=clock(), transfers=transfers
        ).summary

    told = {mode: summary(mode) for mode in ("auto", "swap", "recompute")}
    told |= {"dear": summary("hybrid", 1e3), "cheap": summary("hybrid", 1e-3)}
    for each in told.values():
        assert each["requests_finished"] == 14
        assert each["preemptions"] > 3
    moved = {mode: each["swapped_out_blocks"] > 0 for mode, each in told.items()}
    assert moved == {"auto": True, "swap": True, "recompute": False, "dear": False, "cheap": True}
    again = {mode: each["recomputed_tokens"] > 0 for mode, each in told.items()}
    assert again == {"auto": False, "swap": False, "recompute": True, "dear": True, "cheap": False}
    assert told["dear"]["recomputed_tokens"] == told["recompute"]["recomputed_tokens"]
    if kind == "paged":
        partial = summary("partial")
        assert partial["requests_finished"] == 14
        assert 0 < partial["recomputed_tokens"] < told["recompute"]["recomputed_tokens"] / 2
        assert partial["swapped_out_blocks"] == 0


# What it costs


COSTS = {
    "paged": ("paged", {}, 8 + 2 + 2 + 2),  # the prompt once, and what each sample generated
    "paged cached": ("paged", {"prefix_caching": True}, 4 + 2 + 2 + 2),  # V0 does not flag a last full block
    "multi size": ("multi_size", {"block_size": 4}, 8 + 2 + 2 + 2),
    "token": ("token", {}, 8 + 2 + 2 + 2),
    "prefix": ("prefix", {"block_size": 4}, 2 + 2 + 2),  # the prompt is cached
    "prefix without caching": ("prefix", {"block_size": 4, "prefix_caching": False}, 10 + 10 + 10),
    "radix": ("radix", {"block_size": 4}, 2 + 2 + 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_of_computing_a_group_again(name):
    kind, fields, tokens = COSTS[name]
    owner = memory(kind, slots=400, **fields)
    policy = scheduled("vllm_v0", owner, preemption="recompute")
    policy.recovery.price(clock(), Transfers(None, None, 1, copy_latency_us=1e3))
    request = group(owner, 0, 8, n=3, grown=2)
    assert policy.recovery.recompute_seconds(request) == pytest.approx(tokens * 1e-3)
    assert policy.recovery.seconds(request) == pytest.approx(tokens * 1e-3)
    owner.check_integrity()


def test_the_cost_of_moving_a_group_is_that_of_its_distinct_blocks():
    owner = memory(slots=400)
    policy = scheduled("vllm_v0", owner)
    policy.recovery.price(clock(), Transfers(None, None, 1, copy_latency_us=1e3))
    request = group(owner, 0, 8, n=3, grown=2)
    assert policy.recovery.seconds(request) == pytest.approx(10e-3)  # 2 + 3 blocks, there and back
    owner.host_pool.take(owner.host_pool.num_free - 4)
    assert policy.recovery.seconds(request) == float("inf")  # V0 gives it up


def test_hybrid_moves_nothing_that_could_not_come_back():
    """Five blocks and one for each of three branches are more than the pool has."""
    owner = memory(slots=28)
    policy = scheduled("vllm_v0", owner, preemption="hybrid")
    policy.recovery.price(clock(), Transfers(None, None, 1, copy_latency_us=1e-3))
    assert not policy.recovery.swaps(group(owner, 0, 8, n=3, grown=2))


@pytest.mark.parametrize("kind", ["prefix", "radix", "paged"])
def test_the_cheapest_group_gives_way(kind):
    """1 has long outputs, 2 shares a long prompt, of which little is computed again where it is cached."""
    fields = {} if kind == "paged" else {"block_size": 4}
    owner = memory(kind, slots=400, **fields)
    policy = scheduled("vllm_v0", owner, preemption="recompute", victim=cheapest_to_recover)
    policy.recovery.price(clock(), Transfers(None, None, 1, copy_latency_us=1e3))
    few, many, prompt = group(owner, 0, 8, grown=2), group(owner, 1, 8, grown=9), group(owner, 2, 32, grown=3)
    assert policy._choose_victim([few, many, prompt]) is few
    assert policy._choose_victim([many, prompt]) is (many if kind == "paged" else prompt)
    assert latest([few, many, prompt]) is prompt


# What is shared again


def test_branches_share_the_blocks_of_their_last_common_ancestor():
    """Beams form a tree: the second parts from the first behind a block, the third from the second behind two."""
    request = Request(0, 0, 4, 40, beam_width=4)
    tables = [1, 2, 3, 4], [1, 5, 6, 7], [1, 5, 8, 9], [1, 2, 3, 10]
    made = [Sequence(request, branch, 16, 40) for branch in range(4)]
    for sequence, table in zip(made, tables, strict=True):
        sequence.block_table = table
    first, second, *_ = made
    assert in_common(made, 4) == [None, (first, 1), (second, 2), (first, 3)]
    assert in_common(made, 2) == [None, (first, 1), (second, 2), (first, 2)]
    assert in_common(made, 0) == [None] * 4


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("paged", {}), ("paged", {"prefix_caching": True}), ("token", {}),
        ("multi_size", {"block_size": 4}), ("adaptive", {"block_size": 4}),
    ],
)  # fmt: skip
def test_a_group_comes_back_as_it_was(kind, fields):
    """It shares what it shared, holds as many slots but for those of the next tokens, and the books add up."""
    owner = memory(kind, slots=400, **fields)
    policy = scheduled("vllm_v0", owner, preemption="recompute")
    request = group(owner, 0, 11, n=3, grown=6)
    saved, tokens = owner.blocks_saved, owner.num_tokens
    policy.running[request] = 1
    policy.preempt(request, Step())
    assert owner.num_held == owner.num_tokens == owner.blocks_saved == 0
    step = Step()
    policy.admit_in_order(step, 0)
    owner.check_integrity()
    assert owner.blocks_saved == saved > 0
    assert owner.num_tokens == tokens + 3
    there = 2 * (11 // owner.block_size) * owner.block_size
    if "prefix_caching" in fields:  # of each of the three all but its last full block was flagged as computed
        there = 3 * 12
    assert step.num_prefill_tokens == 3 * 18 - there
    assert not any(sequence.sibling for sequence in request.sequences)


def test_counted_beams_are_listed_before_they_give_way():
    """The naive walk lists them from the start; here nobody has looked at a table when memory runs out."""
    asked = Asked(crowd(4, beams=True), beams=(0.3, 1))
    policy = scheduled("vllm_v0", memory(slots=300), preemption="recompute")
    told = Story(policy, asked, clock=clock(), stretches=True)
    assert policy.allocator.counted is not None
    again = run(memory(slots=300), crowd(4, beams=True), Audit(every=1), preemption="recompute")
    assert told.summary["requests_finished"] == again["requests_finished"] == 14
    assert told.summary["recomputed_tokens"] > 100


# Partial preemption


def test_a_stopped_group_keeps_what_its_branches_share():
    owner = memory(slots=400)
    request = group(owner, 0, 8, n=3, grown=6)  # two blocks shared, and two of each sample
    free = owner.pool.num_free
    for sequence in request.sequences:
        owner.stop(sequence)
    assert owner.yielding == 6
    owner.check_integrity()
    other = _held(owner, Request(1, 0, 4 * (free + 3), 40))
    lengths = [sequence.num_tokens for sequence in request.sequences]
    assert lengths == [8, 12, 14]  # who stopped first gives up first, its last block before the one behind
    owner.extend(other, 12)
    assert [sequence.num_tokens for sequence in request.sequences] == [8] * 3
    assert owner.headroom == 0
    assert owner.admission(request, 15) is Admission.LATER
    owner.check_integrity()


def test_a_last_block_that_branches_share_stays_with_one_of_them():
    """Three samples that have just been forked; each of them is to write another token in it."""
    owner = memory(slots=400)
    request = group(owner, 0, 10, n=3)
    owner.remember(request)
    for sequence in request.sequences:
        owner.stop(sequence)
    owner.check_integrity()
    assert [sequence.num_tokens for sequence in request.sequences] == [8, 8, 10]
    assert [owner.admit(sequence, 11) for sequence in request.sequences] == [8, 8, 10]
    tails = {sequence.block_table[2] for sequence in request.sequences}
    assert len(tails) == 3
    assert owner.blocks_saved == 4
    owner.check_integrity()


def test_where_nobody_runs_stopped_groups_give_up_what_they_share_too():
    """Of seven blocks each group shares two; the first comes to eight tokens a sample, and needs four behind them."""
    owner = memory(slots=28)
    first, second = group(owner, 0, 8, output=60), group(owner, 1, 8, output=60)
    single = _held(owner, Request(2, 0, 9, 5))
    for request in first, second:
        owner.remember(request)
        for sequence in request.sequences:
            owner.stop(sequence)
    assert owner.admission(first, 16) is Admission.LATER  # the single one runs
    owner.free(single)
    assert owner.pool.num_free == 3
    assert owner.admission(first, 16) is Admission.OK
    assert [owner.admit(sequence, 16) for sequence in first.sequences] == [8, 8]
    assert [sequence.capacity for sequence in second.sequences] == [0, 0]
    owner.check_integrity()
    assert owner.admission(second, 9) is Admission.LATER


@pytest.mark.parametrize("mode", ["recompute", "hybrid", "partial"])
@pytest.mark.parametrize("kind", GROUPS)
def test_the_probe_finds_every_token_of_groups_at_every_step(kind, mode):
    fields = {} if kind == "token" else {"block_size": 4}
    variants = [fields, {**fields, "prefix_caching": True}] if kind == "paged" else [fields]
    for each in variants:
        for beams in (False, True):
            owner = memory(kind, slots=240, **each)
            dear = Transfers(None, None, 1, copy_latency_us=1e6)
            summary = run(owner, crowd(3, beams=beams), Audit(every=1), transfers=dear, preemption=mode)
            assert summary["requests_finished"] == 14
            assert summary["recomputed_tokens"] > 0


def test_a_group_that_comes_back_takes_nothing_of_its_own_branches():
    """The first branch needs two blocks again; its siblings stopped before the one that is to give them up."""
    owner = memory(slots=60)
    request = group(owner, 0, 8, n=3, grown=6)
    single = _held(owner, Request(1, 0, 16, 40))
    owner.remember(request)
    for sequence in (*request.sequences, single):
        owner.stop(sequence)
    other = _held(owner, Request(2, 0, 4 * (owner.pool.num_free + 2), 40))
    owner.free(other)
    owner.pool.take(owner.pool.num_free)
    assert [owner.admit(sequence, 15) for sequence in request.sequences] == [8, 14, 14]
    assert single.num_tokens == 8


def test_a_group_whose_blocks_were_evicted_is_computed_once():
    """Beside prefix caching too: of 18 tokens the samples share two full blocks of the prompt."""
    owner = memory(slots=120, prefix_caching=True)
    policy = scheduled("vllm_v0", owner, preemption="recompute")
    request = group(owner, 0, 11, n=3, grown=6)
    policy.running[request] = 1
    policy.preempt(request, Step())
    owner.free(_held(owner, Request(1, 0, 120, 1)))
    step = Step()
    policy.admit_in_order(step, 0)
    assert [tokens for _, _, tokens in step.chunks] == [18, 10, 10]


@pytest.mark.parametrize(
    ("kind", "slots", "rows", "fields"),
    [
        ("vllm_v0", 48, [(1, 22, 21, 1), (1, 20, 12, 2)], {"chunked_prefill": True, "max_num_batched_tokens": 8}),
        ("sglang", 40, [(0, 9, 3, 2), (1, 15, 3, 2), (1, 16, 11, 2)], {}),
    ],
)  # fmt: skip
def test_nobody_is_refused_for_what_stopped_groups_hold(kind, slots, rows, fields):
    """V0 gives up who is alone and lacks a block, SGLang whom it foresees not to fit: stopped groups go first."""
    asked = ask(*[row[:3] for row in rows])
    for request, row in zip(asked, rows, strict=True):
        request.n = request.width = row[3]
    told = Story(scheduled(kind, memory(slots=slots, watermark=0.01), preemption="partial", **fields), asked)
    assert told.column("requests", "status") == ["finished"] * len(rows)
