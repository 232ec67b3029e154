"""Swapping: blocks leave for the host and come back elsewhere; sharing is kept, and nothing changes half."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from functools import partial
from random import Random

import pytest
import torch

from attention.cache import BlockAllocator, OutOfBlocks, PagedKVCache
from attention.functional import paged_attention
from attention.swap import block_copies
from attention.swap.block_copies import batches, runs
from attention.swap.host_records import HostRecords
from attention.swap.quantization import Quantization
from attention.swap.swap_space import SwapSpace
from attention.swap.swapping import swap_in, swap_out
from attention.validation.swapped import stored_rows
from attention.validation.twin import Form, Twin
from tests.attention.late import DiaryStream

FORM = Form(block_size=4, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=3)


def twins(num_blocks=40, dtype=torch.float32, device="cpu", seed=0, form=FORM) -> Twin:
    return Twin(form, num_blocks, dtype, torch.device(device), seed)


def family(twin: Twin) -> list[int]:
    """Three that share ten tokens in three blocks, the last of which two of them have copied."""
    (parent,) = twin.new()
    twin.append([parent], 10)
    members = [parent, twin.fork(parent), twin.fork(parent)]
    twin.append(members, [1, 4, 2])
    return members


def state(twin: Twin, space: SwapSpace):
    """Everything that an operation could change, but for the order of free lists and rows nobody holds."""
    cache = twin.cache
    return (
        {seq_id: (cache.block_table(seq_id), cache.length(seq_id)) for seq_id in cache.sequences},
        {seq_id: space.block_table(seq_id) for seq_id in space.seq_ids},
        list(cache.allocator.pool.references), list(space.pool.references),
        sorted(cache.allocator.pool.free), sorted(space.pool.free), dict(cache.detached),
    )  # fmt: skip


def check(twin: Twin, space: SwapSpace) -> None:
    """The cache holds every history to the bit, and the books of both pools add up."""
    for seq_id in twin.cache.sequences:
        for layer in twin.layers:
            assert torch.equal(stored_rows(twin, seq_id, layer), torch.stack(twin.histories[seq_id][layer]))
    twin.cache.allocator.pool.check_integrity(map(twin.cache.block_table, twin.cache.sequences))
    space.pool.check_integrity(map(space.block_table, space.seq_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("staging_bytes", [1, 5000, 1 << 30])
def test_a_family_comes_back_elsewhere_to_the_bit(dtype, staging_bytes, device):
    twin = twins(dtype=dtype, device=device)
    members = family(twin)
    before = [twin.cache.block_table(seq_id) for seq_id in members]
    saved, free = twin.cache.blocks_saved, twin.cache.allocator.num_free
    distinct = len(set().union(*before))
    space = SwapSpace(twin.cache, 20, staging_bytes=staging_bytes)
    moved = space.swap_out(members)
    space.synchronize()
    assert (moved.num_blocks, moved.num_bytes) == (distinct, distinct * 2 * 3 * 4 * 2 * 8 * dtype.itemsize)
    assert moved.num_copies == {1: distinct, 1 << 30: 1}.get(staging_bytes, moved.num_copies)
    assert twin.cache.allocator.num_free == 40
    assert space.num_free == 20 - distinct
    assert space.pool.extra_references == saved
    twin.spoil()
    guest = twin.new()
    twin.append(guest, 30)  # in the blocks that were given back
    assert space.swap_in(members).num_blocks == distinct
    space.synchronize()
    after = [twin.cache.block_table(seq_id) for seq_id in members]
    assert not set(before[0]) & set(after[0])
    assert twin.cache.blocks_saved == saved
    assert twin.cache.allocator.num_free == free - 8
    assert space.num_free == 20
    check(twin, space)
    for impl in ("reference", "torch"):
        problem = twin.append([*members, *guest], 1)
        out = paged_attention(**problem.arguments, impl=impl)
        torch.testing.assert_close(
            out.cpu().double(), problem.expected[0], rtol=0, atol={2: 2e-2, 4: 1e-6, 8: 1e-12}[dtype.itemsize]
        )


def test_attention_after_a_swap_is_that_before_to_the_bit(device):
    twin = twins(device=device)
    members = family(twin)
    problem = twin.append(members, [1, 3, 1])
    before = paged_attention(**problem.arguments)
    space = SwapSpace(twin.cache, 20)
    space.swap_out(members)
    twin.spoil()
    twin.append(twin.new(), 9)
    space.swap_in(members[::-1])
    again = twin.again(members, problem)
    assert not torch.equal(again.arguments["block_tables"], problem.arguments["block_tables"])
    assert torch.equal(paged_attention(**again.arguments), before)


def test_part_of_a_family_leaves_and_the_rest_stays():
    twin = twins()
    one, two, three = family(twin)
    space = SwapSpace(twin.cache, 20)
    space.swap_out([two])
    twin.spoil()  # blocks that others hold are not free
    check(twin, space)
    twin.append([one, three], 3)
    space.swap_in([two])
    check(twin, space)
    assert not set(twin.cache.block_table(two)) & set(twin.cache.block_table(one))
    space.swap_out([one, two, three])
    space.swap_in([three])  # the host still holds what the other two need
    check(twin, space)
    space.swap_in([two, one])
    check(twin, space)
    assert space.num_free == 20


def test_a_swapped_sequence_is_refused():
    twin = twins()
    one, two, _ = family(twin)
    space = SwapSpace(twin.cache, 20)
    space.swap_out([one])
    before = state(twin, space)
    told = re.escape(f"seq_ids: got {one}, which is swapped out")
    for attempt in (
        lambda: twin.cache.extend([two, one], 1),
        lambda: twin.cache.fork(one),
        lambda: twin.cache.free(one),
        lambda: twin.cache.length(one),
        lambda: space.swap_out([two, one]),
    ):
        with pytest.raises(ValueError, match=told):
            attempt()
        assert state(twin, space) == before


def test_a_full_host_pool_changes_nothing():
    twin = twins()
    members = family(twin)
    distinct = len(set().union(*map(twin.cache.block_table, members)))
    space = SwapSpace(twin.cache, distinct - 1)
    before = state(twin, space)
    with pytest.raises(OutOfBlocks, match=f"asked for {distinct} blocks, {distinct - 1} of {distinct - 1}"):
        space.swap_out(members)
    assert state(twin, space) == before
    check(twin, space)
    space.swap_out(members[:2])
    check(twin, space)


def test_a_full_device_changes_nothing():
    twin = twins(num_blocks=8)
    members = family(twin)
    space = SwapSpace(twin.cache, 20)
    moved = space.swap_out(members).num_blocks
    guest = twin.new()
    twin.append(guest, (8 - moved + 1) * 4)
    before = state(twin, space)
    with pytest.raises(OutOfBlocks, match=f"asked for {moved} blocks, {moved - 1} of 8 are free"):
        space.swap_in(members)
    assert state(twin, space) == before
    twin.free(guest)
    space.swap_in(members)
    check(twin, space)


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_copy_that_fails_changes_nothing(direction, monkeypatch):
    twin = twins()
    members = family(twin)
    space = SwapSpace(twin.cache, 20)
    if direction == "scatter":
        space.swap_out(members)
    before = state(twin, space)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HostRecords, direction, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        (space.swap_in if direction == "scatter" else space.swap_out)(members)
    assert state(twin, space) == before
    monkeypatch.undo()
    if direction == "scatter":
        space.swap_in(members)
    check(twin, space)


def test_mistakes_are_told():
    twin = twins()
    members = family(twin)
    space = SwapSpace(twin.cache, 20)
    for attempt, message in (
        (lambda: space.swap_out([99]), "seq_ids: got 99, expected one of 0, 1, 2"),
        (lambda: space.swap_out([members[0]] * 2), "seq_ids: got [0, 0], expected different sequences"),
        (
            lambda: space.swap_in([members[0]]),
            "seq_ids: got 0, expected one of those swapped out: none, nothing is swapped out",
        ),
        (lambda: space.drop([5]), "seq_ids: got 5, expected one of those swapped out: none"),
        (lambda: SwapSpace(twin.cache, -1), "num_host_blocks: got -1, expected an integer >= 0"),
        (lambda: SwapSpace(twin.cache, 1, quantization="int9"), "quantization: got 'int9'"),
    ):
        before = state(twin, space)
        with pytest.raises(ValueError, match=re.escape(message)):
            attempt()
        assert state(twin, space) == before
    space.swap_out(members[:1])
    with pytest.raises(ValueError, match=re.escape("seq_ids: got 1, expected one of those swapped out: 0")):
        space.swap_in(members[:2])


def test_what_is_dropped_is_gone():
    twin = twins()
    members = family(twin)
    space = SwapSpace(twin.cache, 20)
    space.swap_out(members)
    space.drop(members[:2])
    space.swap_in(members[2:])
    check(twin, space)
    assert (space.num_free, space.seq_ids, twin.cache.detached) == (20, [], {})
    with pytest.raises(ValueError, match="seq_ids: got 0, expected one of 2"):
        twin.cache.length(members[0])


def test_a_reset_forgets_what_is_swapped():
    twin = twins()
    members = family(twin)
    space = SwapSpace(twin.cache, 20)
    space.swap_out(members[:1])
    twin.cache.reset()
    with pytest.raises(ValueError, match="seq_ids: got 0, which the cache has dropped by a reset"):
        space.swap_in(members[:1])
    space.drop(members[:1])
    assert space.num_free == 20


def test_an_empty_sequence_has_nothing_to_move():
    cache = PagedKVCache(4, 8, BlockAllocator(4, 4, 8))  # whose heads nobody told
    space = SwapSpace(cache, 0)
    seq_id = cache.new()
    assert space.swap_out([seq_id]).num_blocks == 0
    assert space.swap_in([seq_id]).num_bytes == 0
    assert cache.length(seq_id) == 0


def test_any_story_keeps_every_history():
    """Random appends, forks, frees, swaps and drops in pools that run full, against the histories kept aside."""
    happened = Counter()
    for seed in range(40):
        random = Random(seed)
        form = Form(1 + seed % 5, num_heads=2, num_kv_heads=1, head_dim=4, num_layers=2)
        twin = twins(num_blocks=14, form=form, seed=seed)
        space = SwapSpace(twin.cache, 9)
        for _ in range(60):
            what = random.choice(
                ["new", "append", "append", "fork", "free", "out", "out", "in", "in", "drop"]
            )
            known = space.seq_ids if what in ("in", "drop") else list(twin.cache.sequences)
            some = random.sample(known, random.randint(min(1, len(known)), min(3, len(known))))
            before = state(twin, space)
            try:
                if what == "new" and len(known) < 6:
                    twin.new()
                elif what == "append" and some:
                    twin.append(some, [random.randint(1, 6) for _ in some])
                elif what == "fork" and some and len(known) < 6:
                    twin.fork(some[0])
                elif what == "free" and some:
                    twin.free(some[:1])
                elif what == "out":
                    shared = {before[0][seq_id][0][0] for seq_id in some if before[0][seq_id][0]}
                    happened["shared out"] += len(shared) < len(some)
                    space.swap_out(some)
                    twin.spoil()
                elif what == "in":
                    space.swap_in(some)
                elif what == "drop" and some:
                    space.drop(some[:1])
                    del twin.histories[some[0]]
                happened[what] += 1
            except OutOfBlocks as error:
                happened[f"{what}: no blocks"] += "asked for" in str(error)
                assert state(twin, space) == before
            check(twin, space)
    for what in ("shared out", "out", "in", "drop", "append: no blocks", "out: no blocks", "in: no blocks"):
        assert happened[what] > 5, happened


QUANTISED = [
    "int8",
    "int4",
    *(["fp8"] if hasattr(torch, "float8_e4m3fn") else []),
    Quantization.named("int4", 2),
]


@pytest.mark.parametrize("quantization", QUANTISED, ids=[*QUANTISED[:-1], "int4 in pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_swap_is_within_its_bound(quantization, dtype, device):
    twin = twins(dtype=dtype, device=device, form=Form(4, 6, 2, 6, num_layers=3))
    members = family(twin)
    space = SwapSpace(twin.cache, 20, quantization=quantization, measure=True, staging_bytes=4000)
    chosen = space.quantization
    assert space.bytes_per_block == 3 * chosen.bytes_per_block(4, 2, 6, dtype)
    report = space.swap_out(members)
    written = 8 + 3 + 4 + 4 + 2  # two shared blocks, a third one of each, a fourth one
    assert report.error is not None
    assert report.error.num_values == written * 3 * 2 * 2 * 6
    assert 0.5 < report.error.share <= 1
    assert report.num_bytes == report.num_blocks * space.bytes_per_block
    twin.spoil()
    twin.append(twin.new(), 9)
    space.swap_in(members)
    largest = 0.0
    for seq_id in members:
        for layer in twin.layers:
            kept = torch.stack(twin.histories[seq_id][layer])
            got = stored_rows(twin, seq_id, layer)
            assert torch.equal(got, chosen.dequantize(chosen.quantize(kept), 6, dtype))
            largest = max(largest, float((got.double() - kept.double()).abs().max()))
    assert largest == pytest.approx(report.error.max_error)
    assert space.swap_out([members[0]]).error is not None


def test_a_host_pool_of_int4_takes_a_quarter_of_half_precision():
    twin = twins(dtype=torch.bfloat16, form=Form(16, 4, 2, 128))
    whole, small = SwapSpace(twin.cache, 4), SwapSpace(twin.cache, 4, quantization="int4")
    assert small.bytes_per_block / whole.bytes_per_block == (64 + 4) / 256


# The functions over caches


def caches(num_blocks: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(num_blocks, 4, 2, 8, generator=random) for _ in range(4)]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_blocks_go_where_the_mapping_says(device, index):
    on_device = [cache.to(device) for cache in caches(8, 0)]
    on_host = caches(5, 1)
    expected = [cache.clone() for cache in on_host]
    mapping = torch.tensor([[7, 2], [0, 4], [7, 3], [3, 0]], dtype=index)
    for cache, host in zip(on_device, expected, strict=True):
        for source, target in mapping.tolist():
            host[target] = cache[source].cpu()
    swap_out(on_device, on_host, mapping)
    if device == "cuda":
        torch.cuda.synchronize()
    for got, wanted in zip(on_host, expected, strict=True):
        assert torch.equal(got, wanted)
    expected = [cache.clone() for cache in on_device]
    for cache, host in zip(expected, on_host, strict=True):
        cache[1], cache[5], cache[6] = host[4].to(device), host[0].to(device), host[4].to(device)
    swap_in(on_device, on_host, torch.tensor([[4, 1], [0, 5], [4, 6]], dtype=index))
    for got, wanted in zip(on_device, expected, strict=True):
        assert torch.equal(got, wanted)
    swap_out(on_device, on_host, torch.empty(0, 2, dtype=index))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a stream of its own needs a GPU")
def test_copies_on_a_stream_are_ordered_against_compute():
    stream = torch.cuda.Stream()
    cache = torch.zeros(64, 16, 8, 128, device="cuda")
    host = torch.zeros(64, 16, 8, 128, pin_memory=True)
    mapping = torch.tensor([[block, block] for block in range(64)])
    work = torch.randn(4096, 4096, device="cuda")
    for value in range(1, 6):
        for _ in range(5):
            work = work @ work / 64  # what keeps the compute stream busy
        cache.fill_(value)
        swap_out([cache], [host], mapping, stream=stream)
        cache.fill_(-1)  # the block is free for others at once
        swap_in([cache], [host], mapping, stream=stream)
        assert bool((cache == value).all())
    stream.synchronize()
    assert bool((host == 5).all())


def test_copies_and_compute_wait_for_each_other_in_this_order(monkeypatch):
    """What a GPU is told, seen without one: by a stream that keeps a diary."""
    diary: list[str] = []
    stream = DiaryStream("copying", diary)
    stream.running, stream.staged = nullcontext, lambda values: values
    monkeypatch.setattr("attention.swap.swapping.CopyStream", lambda device, given: stream)
    for name in ("to_host", "from_host"):
        original = getattr(block_copies, name)
        logged = partial(
            lambda name, original, *args: (diary.append(name), original(*args))[1], name, original
        )
        monkeypatch.setattr(f"attention.swap.swapping.{name}", logged)
    hosts = caches(5, 1)
    swap_out(caches(8, 0)[:1], hosts[:1], torch.tensor([[1, 1]]))
    assert diary == ["copying waits for compute", "compute waits for copying", "to_host"]
    diary.clear()
    stream.staged = list
    swap_in(caches(8, 0)[:1], hosts[:1], torch.tensor([[1, 1]]))
    assert diary == ["from_host", "copying waits for compute", "compute waits for copying"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, h, m: (c, h[:3], m), "host_caches: got 3, expected 4 as caches"),
        (lambda c, h, m: (c, [*h[:3], h[3][:, :2]], m), "host_caches[3]: got shape [5, 2, 2, 8], expected [num_host"),
        (lambda c, h, m: (c, [h[0].half(), *h[1:]], m), "host_caches[0]: got torch.float16, expected torch.float32"),
        (lambda c, h, m: (c, [h[0].to("meta"), *h[1:]], m), "host_caches[0]: got it on meta, expected it on cpu"),
        (lambda c, h, m: (c, h, m[:, :1]), "block_mapping: got shape [1, 1], expected [n, 2]"),
        (lambda c, h, m: (c, h, m.float()), "block_mapping: got torch.float32, expected torch.int32 or torch.int64"),
        (lambda c, h, m: (c, h, m + 7), "block_mapping[0, 0]: got 8, expected 0 to 7"),
        (lambda c, h, m: (c, h, m + torch.tensor([0, 4])), "block_mapping[0, 1]: got 5, expected 0 to 4"),
        (lambda c, h, m: (c, h, m - 2), "block_mapping[0, 0]: got -1, expected 0 to 7"),
        (lambda c, h, m: (c, h, torch.cat((m, m))), "block_mapping: a target stands twice"),
    ],
)  # fmt: skip
def test_mistakes_in_the_functions_are_told(change, message):
    given_caches, hosts, mapping = change(caches(8, 0), caches(5, 1), torch.tensor([[1, 1]]))
    before = [cache.clone() for cache in hosts if cache.device.type == "cpu"]
    with pytest.raises(ValueError, match=re.escape(message)):
        swap_out(given_caches, hosts, mapping)
    for got, wanted in zip([host for host in hosts if host.device.type == "cpu"], before, strict=True):
        assert torch.equal(got, wanted)


def test_neighbours_travel_together():
    assert runs([3, 4, 5, 9, 8, 1]) == [(0, 3, 3), (3, 9, 1), (4, 8, 1), (5, 1, 1)]
    assert runs([]) == []
    assert list(batches(5, 10, 25)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(batches(2, 100, 25)) == [slice(0, 1), slice(1, 2)]
