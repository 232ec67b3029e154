"""Several layer groups: windows, states, pages of one size and of several, their books, and what a probe sees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.probe import AttentionProbe
from sim import (
    Admission,
    Capacity,
    Device,
    Model,
    ProbeError,
    Request,
    Sequence,
    Step,
    allocator,
    scheduler,
    timing,
)
from sim.allocators.group_hits import GroupHits
from sim.allocators.window_edge import NULL
from sim.audit.audit import Audit
from sim.beams import fork
from sim.errors import UserError
from sim.layer_groups import LayerKind, own_pages, unified_pages
from sim.pools.block_pool import OutOfBlocks
from sim.pools.large_pages import LargePages
from sim.tiers.tiered_store import TieredStore
from tests.sim.probing import requests, run
from tests.sim.tiers import made, store

KINDS = (LayerKind(1, 2), LayerKind(3, 2, 7), LayerKind(2, 2, 20), LayerKind(1, state_bytes=7))
SETTINGS = {
    "a window": ("prefix", {"block_size": 4, "windows": [10]}, ()),
    "full and windows": ("prefix", {"block_size": 4, "windows": [None, 9, 1]}, ()),
    "unified pages": ("prefix", {"block_size": 4}, KINDS[:3]),
    "unified pages and states": ("prefix", {"block_size": 4}, KINDS),
    "jenga": ("jenga", {"block_size": 4}, KINDS),
}


def build(name: str, slots: int, longest: int = 64):
    kind, fields, layers = SETTINGS[name]
    capacity = Capacity(num_slots=slots, max_model_len=longest)
    if layers:
        capacity = Capacity(num_slots=slots, max_model_len=longest, layers=layers, kv_bytes=15 * slots)
    return allocator[kind](capacity, **fields)


@pytest.mark.parametrize("policy", scheduler.kinds)
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), slots=st.sampled_from([64, 96, 150, 400]))
def test_every_token_is_where_its_group_says(name, policy, seed, slots):
    audit = Audit(every=1)
    memory = build(name, slots)
    summary = run(memory, requests(seed, groups=memory.can_fork), audit, policy, max_num_seqs=8)
    assert audit.num_samples == summary["steps"]
    assert not audit.ledger.live


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_over_the_tables_of_all_groups(name):
    sliding = 0
    for seed in range(4):
        probe = AttentionProbe(every=1, device="cpu")
        drawn = probe._window
        seen = []
        probe._window = lambda *given, drawn=drawn, seen=seen: seen.append(drawn(*given)) or seen[-1]
        run(build(name, 200), requests(seed), probe, "vllm_v1", max_num_seqs=8)
        assert probe.max_error is not None
        assert probe.max_error < 1e-5
        sliding += sum(window.sliding is not None for window in seen)
    assert sliding > 20


def _lose_a_page(memory, sequence, group):
    """A page of a group is swapped with that of another group."""
    tables = memory.holdings[sequence].tables
    other = memory.token_groups[(group + 1) % len(memory.token_groups)]
    tables[group][-1], tables[other][-1] = tables[other][-1], tables[group][-1]


def test_a_probe_sees_tables_of_two_groups_mixed_up():
    memory = build("full and windows", 400)
    admit = memory.admit

    def mixing(sequence, *given):
        hit = admit(sequence, *given)
        for each in memory.sequences - {sequence}:
            _lose_a_page(memory, each, 0)
        return hit

    memory.admit = mixing
    memory.check_integrity = lambda: None
    with pytest.raises(ProbeError, match=r"layer group \d"):
        run(memory, requests(1), Audit(every=1), "vllm_v1")


def test_a_probe_sees_a_branch_that_writes_where_another_reads():
    memory = build("full and windows", 400)
    memory.copy_tail = lambda sequence: 0
    memory.check_integrity = lambda: None
    with pytest.raises(ProbeError, match=r"layer group \d"):
        run(memory, requests(1, groups=True), Audit(every=1), "vllm_v1")


def test_a_probe_sees_a_tail_that_is_copied_in_one_group_only():
    memory = build("full and windows", 400)
    copy_tail = memory.copy_tail

    def forgetting(sequence):
        shared = memory.holdings[sequence].tables[1][-1]
        copied = copy_tail(sequence)
        memory.holdings[sequence].tables[1][-1] = shared
        return copied

    memory.copy_tail = forgetting
    memory.check_integrity = lambda: None
    with pytest.raises(ProbeError):
        run(memory, requests(1, groups=True), Audit(every=1), "vllm_v1")


def test_a_probe_sees_a_window_that_gives_back_too_much():
    memory = build("full and windows", 400)
    begin = memory.begin

    def narrow(sequence, *given):
        begin(sequence, *given)
        for edge in sequence.edges:
            edge.window = max(1, edge.window - memory.block_size)
            edge.turn = max(sequence.origin + 1, edge.window)

    memory.begin = narrow
    memory.check_integrity = lambda: None
    with pytest.raises(ProbeError):
        run(memory, requests(1), AttentionProbe(every=1, device="cpu"), "vllm_v1")


# Models and their bytes


def model(**fields) -> Model:
    shape = {
        "name": "tiny", "num_layers": 8, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "num_params": 1e6, "active_params": 1e6, "max_model_len": 4096,
    }  # fmt: skip
    return Model(**{**shape, **fields})


def test_bytes_of_a_sequence():
    """Full layers keep all tokens, sliding ones their window, states do not grow."""
    hybrid = model(num_sliding_layers=5, sliding_window=100, num_state_layers=2, state_values_per_layer=300)
    token = 2 * 2 * 16 * 2
    assert hybrid.kv_bytes_per_token == 6 * token
    assert hybrid.kv_bytes(40) == 6 * 40 * token + 2 * 600
    assert hybrid.kv_bytes(1000) == (1000 + 5 * 100) * token + 2 * 600
    assert model().kv_bytes(1000) == 8 * 1000 * token
    assert not model().layer_kinds
    assert model(kv_values_per_token=576).kv_bytes(10) == 11_520, "MLA: by its bytes"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_sliding_layers": 3}, "num_sliding_layers and sliding_window go together"),
        ({"state_values_per_layer": 3}, "num_state_layers and state_values_per_layer go together"),
        ({"num_sliding_layers": 9, "sliding_window": 4}, "9 sliding and 0 state layers are more than its 8"),
    ],
)
def test_kinds_of_layers_that_contradict_each_other(fields, complaint):
    with pytest.raises(UserError, match=complaint):
        model(**fields)


def test_unified_pages_of_gemma_and_jamba():
    """Gemma's 62 layers are groups of 10, the sliding ones 9 or 8; Jamba's blocks grow to the size of its states."""
    gemma = unified_pages((LayerKind(10, 8192), LayerKind(52, 8192, 1024)), 16)
    assert [group.token_slots for group in gemma.groups] == [10, 9, 9, 9, 9, 8, 8]
    assert {group.page_slots for group in gemma.groups} == {160}
    assert gemma.slot_bytes == 8192
    jamba = unified_pages((LayerKind(4, 4096), LayerKind(28, state_bytes=311_296)), 16)
    assert jamba.block_size == 80
    assert [group.state_slots for group in jamba.groups] == [0] + [304] * 7
    assert {group.page_slots for group in jamba.groups} == {320}


def test_jenga_has_no_padding():
    pages = own_pages((LayerKind(10, 8192), LayerKind(52, 8192, 1024)), 16)
    assert [group.page_slots for group in pages.groups] == [160, 832]
    memory = LargePages(4160 * 3 + 5, [160, 832])
    assert (memory.size, memory.splits, memory.num_large) == (4160, [26, 5], 3)


def test_pages_of_a_request_stay_together_and_large_ones_come_back():
    memory = LargePages(24 * 3, [8, 6])
    mine: dict[int, int] = {}
    others: dict[int, int] = {}
    first = memory.take(0, 1, mine)
    second = memory.take(0, 1, others)
    assert second[0] // 3 != first[0] // 3, "a request opens a large page of its own"
    assert memory.take(0, 2, mine) == [first[0] + 1, first[0] + 2]
    kept: dict[int, int] = {}
    states = memory.take(1, 4, kept)
    assert not memory.free
    assert memory.fits([2, 0])
    assert not memory.fits([3, 0])
    assert not memory.fits([0, 1])
    assert memory.take(0, 2, mine) == [second[0] + 1, second[0] + 2], (
        "where no large page is free, those of others"
    )
    with pytest.raises(OutOfBlocks):
        memory.take(0, 1, mine)
    memory.give(1, states, kept)
    assert len(memory.free) == 1
    assert memory.loose == 0
    memory.check_integrity([range(6), []])


def live(memory, sequence) -> list[int]:
    return [memory.group_slots(sequence, group)[0] for group in memory.token_groups]


def test_a_window_gives_blocks_back_while_decoding():
    """Window 8, blocks of 4, a prompt of 14: one block is null with the next token, two with the one after [M]."""
    memory = allocator["prefix"](
        Capacity(num_slots=100, max_model_len=64), block_size=4, windows=[8, None], prefix_caching=False
    )
    assert memory.num_slots == 200
    request = Request(0, 0, 14, 20)
    sequence = Sequence(request, 0, 0, 33)
    request.sequences.append(sequence)
    memory.admit(sequence, 14)
    seen = []
    for _ in range(4):
        seen.append((live(memory, sequence)[0], memory.usage().token_states, memory.usage().internal))
        assert memory.can_append(request)
        memory.append(sequence)
        memory.settle()
        memory.look_at_windows()
        sequence.origin += 1
        memory.num_tokens += memory.slots_per_token
        memory.slide(sequence.sliding)
        memory.check_integrity()
    assert seen == [(0, 28, 0), (4, 23, 3), (8, 24, 0), (8, 25, 1)]


def test_branches_share_the_pages_of_every_group_until_they_write():
    """Window 8, blocks of 4, a prompt of 10 and three samples: three rows of pages, and two copies of the last."""
    memory = allocator["prefix"](Capacity(num_slots=100, max_model_len=64), block_size=4, windows=[None, 8])
    request = Request(0, 0, 10, 20, n=3)
    parent = Sequence(request, 0, 0, 29)
    request.sequences.append(parent)
    memory.admit(parent, 10)
    for _ in range(2):
        request.sequences.append(fork(memory, parent))
    usage = memory.usage()
    assert (memory.pool.num_used, memory.blocks_saved, usage.token_states, usage.reserved) == (6, 12, 20, 4)
    assert memory.can_append(request)
    copies = [memory.append(each) for each in request.sequences]
    assert copies == [1, 1, 0]
    usage = memory.usage()
    assert (memory.pool.num_used, memory.blocks_saved, usage.token_states) == (10, 8, 28)
    memory.settle()
    for each in request.sequences:
        each.origin += 1
    memory.num_tokens += 3 * memory.slots_per_token
    memory.look_at_windows()
    memory.check_integrity()
    for each in request.sequences[::2]:
        memory.free(each)
        memory.check_integrity()
    assert (memory.pool.num_used, memory.blocks_saved) == (6, 0)
    memory.free(request.sequences[1])
    assert memory.usage().token_states == memory.usage().reserved == memory.usage().internal == 0


def test_tiers_are_asked_for_what_a_window_sees():
    """Full attention and window 8, blocks of 4: behind 9 blocks of a prompt the window needs the last two."""
    memory = allocator["prefix"](Capacity(num_slots=48, max_model_len=64), block_size=4, windows=[None, 8])
    tiers = store("large host")
    memory.open_tiers(tiers)

    def serve(number: int, name: int) -> Sequence:
        request = Request(number, 0, 40, 1, content=(name,), content_ends=(40,))
        assert memory.admission(request, 40) is Admission.OK
        sequence = Sequence(request, 0, 0, 40)
        request.sequences.append(sequence)
        memory.admit(sequence, 40)
        tiers.begin(number)
        memory.check_integrity()
        return sequence

    for number, name in enumerate((1, 2)):  # the second takes the pages of the first
        memory.free(serve(number, name))
    again = Request(2, 0, 40, 1, content=(1,), content_ends=(40,))
    assert memory.cached_tokens(again, 40) == 36
    sequence = serve(2, 1)
    assert tiers.tiers[0].read_blocks == 9 + 2
    assert tiers.tiers[0].hit_tokens == 36
    assert memory.holdings[sequence].tables[1][:7] == [NULL] * 7
    memory.free(sequence)


def test_what_is_near_is_loaded_where_the_rest_is_cheaper_to_compute():
    """Of 10 pages of full attention the last are in a slow store; up to there the window is on the host too."""
    memory = allocator["prefix"](Capacity(num_slots=48, max_model_len=64), block_size=4, windows=[None, 8])
    slow = made("remote", 100, bandwidth_gb_per_s=0.001)  # a second for a page
    tiers = TieredStore([made("host", 16), slow], load="by_cost")
    memory.open_tiers(tiers)
    tiers.cost.price = lambda request, behind: 0.05 * (40 - behind)
    tables = [[*range(10)], [*range(10, 20)]]
    names = GroupHits(memory.pool, 4, [None, 8])
    request = Request(0, 0, 40, 1, content=(1,), content_ends=(40,))
    keys = names.keys(request, 40)
    for group, table in enumerate(tables):
        tiers.device_keys[table[0] : table[-1] + 1] = [(key, group) for key in keys]
        tiers.found(Sequence(request, 0, 0, 40), [(key, group) for key in keys], table)
    tiers.begin(0)
    tiers.stall(0, 0)
    tiers.device_keys[:] = [None] * len(tiers.device_keys)
    assert [tier.num_used for tier in tiers.tiers] == [16, 4]
    tiers.begin(10**10)
    assert memory.cached_tokens(request, 40) == 24
    sequence = Sequence(request, 0, 0, 40)
    request.sequences.append(sequence)
    memory.admit(sequence, 40)
    assert [tier.read_blocks for tier in tiers.tiers] == [6 + 2, 0]
    assert tiers.declined_tokens == 36 - 24
    memory.check_integrity()


def test_a_page_in_a_tier_has_the_layers_of_one_group():
    memory = allocator["prefix"](Capacity(num_slots=48, max_model_len=64), block_size=4, windows=[None, 8])
    assert memory.offloaded_bytes(1000.0) == 4 * 1000.0 / 2
    unified = build("unified pages", 400)
    assert unified.offloaded_bytes(0.0) == unified.groups[0].page_slots * unified.slot_bytes


def test_each_branch_has_a_state_of_its_own():
    """Pages for the states of three branches are taken with the prompt; a fork only says whose they are."""
    memory = build("unified pages and states", 400)
    request = Request(0, 0, 6, 10, n=3)
    assert memory.admission(request, 6) is Admission.OK
    parent = Sequence(request, 0, 0, 15)
    request.sequences.append(parent)
    memory.admit(parent, 6)
    memory.check_integrity()
    used, usage = memory.pool.num_used, memory.usage()
    for _ in range(2):
        request.sequences.append(fork(memory, parent))
        memory.check_integrity()
    assert memory.pool.num_used == used
    assert memory.usage().reserved < usage.reserved
    states = [
        memory.holdings[each].tables[group] for each in request.sequences for group in memory.state_groups
    ]
    assert len({page for (page,) in states}) == len(states)
    for each in request.sequences:
        memory.free(each)
        memory.check_integrity()
    assert memory.pool.num_used == 0


def test_branches_that_never_came_leave_nothing_behind():
    memory = build("unified pages and states", 400)
    request = Request(0, 0, 6, 10, n=3)
    parent = Sequence(request, 0, 0, 15)
    request.sequences.append(parent)
    memory.admit(parent, 6)
    memory.free(parent)
    memory.check_integrity()
    assert memory.pool.num_used == memory.num_held == 0


def test_a_window_asks_for_what_it_may_hold_with_a_step_in_flight():
    """The bound that vLLM's own test names: a window of 1024, steps of 1024 tokens, 129 blocks of 16.

    However little of a step is left for the prompt, as it is one number for all of them.
    """
    asked = Request(0, 0, 16_000, 10)
    for blocks, answer in ((128, Admission.NEVER), (129, Admission.OK)):
        memory = allocator["prefix"](Capacity(blocks * 16, 16_384), block_size=16, windows=[1024])
        assert memory.admission_in_chunks(asked, 16_000, 1024) is answer
        assert memory.admission_in_chunks(asked, 16_000, 1024, 5) is answer


def test_behind_a_hit_a_window_still_needs_its_next_chunk():
    """The bound counts blocks from the start of the prompt: a hit beyond it leaves only what the chunk takes."""
    memory = allocator["prefix"](Capacity(12 * 4, 200), block_size=4, windows=[8])
    first = Request(0, 0, 81, 1, content=tuple(range(20)), content_grain=4)
    holder = Sequence(first, 0, 0, 81)
    first.sequences.append(holder)
    memory.admit(holder, 8, 8)
    for _ in range(9):
        memory.extend(holder, 8)
    memory.extend(holder, 1)
    later = Request(1, 0, 100, 1, content=tuple(range(20)), content_grain=4)
    assert memory.cached_tokens(later, 100) == 80
    assert memory.admission_in_chunks(later, 100, 8, 8) is Admission.OK
    memory.pool.take(memory.pool.num_free - 1)
    assert memory.admission_in_chunks(later, 100, 8, 4) is Admission.OK
    assert memory.admission_in_chunks(later, 100, 8, 8) is Admission.LATER


@pytest.mark.parametrize("windows", [[None], [None, 9], [10, None, 1]])
def test_a_follower_finds_what_was_answered(windows):
    """Prompt 10 and answer 30, then both again: all blocks that are full, whatever a window gave back meanwhile."""
    memory = allocator["prefix"](Capacity(400, 200), block_size=4, windows=windows)
    asked = [
        Request(0, 0, 10, 30, content=(1,), content_ends=(10,), output_content=2),
        Request(1, 10**9, 44, 2, content=(1, 2, 3), content_ends=(10, 40, 44)),
        Request(2, 2 * 10**9, 44, 2, content=(1, 4, 3), content_ends=(10, 40, 44)),
    ]
    run(memory, asked, Audit(every=1), "vllm_v1")
    assert [request.cached_tokens for request in asked] == [0, 36, 8], "the last token has no slot"


def test_a_prompt_longer_than_the_pool_runs_in_chunks_if_its_window_fits():
    """Eight blocks of 4 and a window of 8: 60 tokens fit 8 at a time, and not at once."""
    memory = allocator["prefix"](
        Capacity(num_slots=32, max_model_len=100), block_size=4, windows=[8], prefix_caching=False
    )
    asked = Request(0, 0, 60, 10)
    assert memory.admission(asked, 60) is Admission.NEVER
    assert memory.admission_in_chunks(asked, 60, 8) is Admission.OK
    summary = run(memory, [asked], policy="vllm_v1", max_num_batched_tokens=8)
    assert summary["requests_finished"] == 1
    refused = run(
        allocator["prefix"](Capacity(num_slots=32, max_model_len=100), block_size=4, windows=[8, None]),
        [Request(0, 0, 60, 10)], policy="vllm_v1", max_num_batched_tokens=8,
    )  # fmt: skip
    assert refused["requests_rejected"] == 1


def test_windows_let_more_requests_run_in_the_same_memory():
    def running(**fields) -> float:
        memory = allocator["prefix"](Capacity(num_slots=2000, max_model_len=1000), block_size=4, **fields)
        asked = [Request(number, 0, 300, 100) for number in range(40)]
        return run(memory, asked, AttentionProbe(samples=4), "vllm_v1")["mean_running"]

    whole, half = running(), running(windows=[None, 16])
    assert half > 1.5 * whole


def test_time_of_a_step_follows_the_windows():
    device = Device(
        name="d", flops_per_s=1e15, memory_bytes_per_s=1e9, memory_bytes=1e9, host_bytes_per_s=1e9
    )
    timed = {
        name: timing["roofline"](model(**fields), device, step_overhead_ms=0.0)
        for name, fields in {
            "full": {}, "sliding": {"num_sliding_layers": 4, "sliding_window": 100},
            "states": {"num_state_layers": 4, "state_values_per_layer": 1000},
        }.items()
    }  # fmt: skip
    weights = 2e6 / 1e9
    token = 8 * 128 / 1e9
    assert timed["full"].decode_seconds(10, 5000) == pytest.approx(weights + 5000 * token)
    assert timed["sliding"].decode_seconds(10, 5000) == pytest.approx(weights + (2500 + 500) * token)
    assert timed["sliding"].decode_seconds(10, 900) == timed["full"].decode_seconds(10, 900)
    states = 10 * 2 * 4 * 2000 / 1e9
    assert timed["states"].decode_seconds(10, 5000) == pytest.approx(weights + 2500 * token + states)
    slow = Device(name="d", flops_per_s=1e9, memory_bytes_per_s=1e15, memory_bytes=1e9, host_bytes_per_s=1e9)
    sliding = timing["roofline"](model(num_sliding_layers=8, sliding_window=100), slow, step_overhead_ms=0.0)
    step = Step()
    step.chunks = [(None, 70, 60)]
    pairs = sum(min(position + 1, 100) for position in range(70, 130))
    assert sliding.seconds(step) == pytest.approx(2e6 * 60 / 1e9 + 4 * 8 * 64 * pairs / 1e9)


def test_behind_a_hit_a_window_needs_less_than_the_whole_prompt():
    """Four blocks, and 20 tokens: too many at once, but of 16 that are cached the window looks at one block."""
    over = allocator["prefix"](Capacity(1, 64, 4), block_size=4, windows=[4])
    tokens = {"content": tuple(range(20)), "content_grain": 1}
    request = Request(0, 0, 20, 1, **tokens)
    sequence = Sequence(request, 0, 0, 20)
    request.sequences.append(sequence)
    over.admit(sequence, 4)
    for _ in range(4):
        over.extend(sequence, 4)
    over.free(sequence)
    again = Request(1, 0, 20, 1, **tokens)
    assert over.cached_tokens(again, 20) == 16
    assert over.admission(again, 20) is Admission.OK
    assert over.admission(Request(2, 0, 20, 1), 20) is Admission.NEVER
