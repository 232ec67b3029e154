"""Swaps beside compute: a step waits for what it reads, layer by layer, and for nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from random import Random

import pytest
import torch

from attention.cache import BlockAllocator, OutOfBlocks, PagedKVCache
from attention.generation.transformer import Transformer, TransformerConfig
from attention.in_flight import Fence, InFlight
from attention.layer import PagedAttention
from attention.metadata import AttentionMetadata
from attention.swap.block_copies import CopyStream
from attention.swap.host_records import HostRecords
from attention.swap.swap_space import SwapSpace
from tests.attention.late import DiaryStream, LateStream, PromptStream
from tests.attention.test_swapping import family, twins

MODEL = Transformer(
    TransformerConfig(
        vocab_size=50, hidden_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, ffn_dim=32, seed=3
    )
)
BLOCK_SIZE = 4


def step(kv, seq_ids, tokens, model=MODEL):
    """The next tokens of each sequence; logits behind the last of each, `[num_seqs, vocab_size]`."""
    known = [kv.length(seq_id) for seq_id in seq_ids]
    counts = [len(mine) for mine in tokens]
    metadata = kv.extend(seq_ids, counts)
    flat = torch.tensor([token for mine in tokens for token in mine], device=kv.device)
    places = [first + i for first, count in zip(known, counts, strict=True) for i in range(count)]
    logits = model(flat, torch.tensor(places, device=kv.device), kv, metadata)
    return logits[torch.tensor(counts).cumsum(0) - 1]


def expected(tokens, model=MODEL, device="cpu"):
    """Logits behind every one of these tokens, by the formula over one piece of memory."""
    kv = model.contiguous_kv()
    seq_id = kv.new()
    metadata = kv.extend([seq_id], [len(tokens)])
    return model(torch.tensor(tokens, device=device), torch.arange(len(tokens), device=device), kv, metadata)


class Story:
    """Sequences that grow, fork, die, leave and come back at random, in pools that run full, with fixed tokens."""

    def __init__(self, seed, streams, layers_per_copy=1, model=MODEL, num_blocks=10):
        self.random = Random(seed)
        self.model = model
        self.kv = model.paged_kv(num_blocks, BLOCK_SIZE)
        self.kv.cache.k.fill_(torch.nan)
        self.kv.cache.v.fill_(torch.nan)
        self.space = SwapSpace(self.kv.cache, 6, layers_per_copy=layers_per_copy, streams=streams)
        self.tokens: dict[int, list[int]] = {}
        self.seen: list[tuple[list[int], torch.Tensor]] = []

    def tell(self, num_acts=80):
        for _ in range(num_acts):
            what = self.random.choice(
                ["new", "step", "step", "step", "fork", "free", "out", "out", "in", "in"]
            )
            try:
                self.act(what)
            except OutOfBlocks:
                pass
        return self

    def act(self, what):
        random, kv = self.random, self.kv
        away = what == "in"
        known = self.space.seq_ids if away else list(kv.cache.sequences)
        some = random.sample(known, random.randint(min(1, len(known)), min(2, len(known))))
        if what == "new" and len(self.tokens) < 7:
            self.tokens[kv.new()] = []
        elif what == "step" and some:
            new = [[random.randrange(50) for _ in range(random.randint(1, 5))] for _ in some]
            logits = step(kv, some, new, self.model)
            for seq_id, mine, row in zip(some, new, logits, strict=True):
                self.tokens[seq_id] = self.tokens[seq_id] + mine
                self.seen.append((self.tokens[seq_id], row))
        elif what == "fork" and some and len(self.tokens) < 7:
            self.tokens[kv.fork(some[0])] = self.tokens[some[0]]
        elif what == "free" and some:
            kv.free(some[0])
            del self.tokens[some[0]]
        elif what == "out":
            self.space.swap_out(some)
        elif what == "in":
            self.space.swap_in(some)

    @property
    def error(self):
        """The largest difference from logits that were computed without any swap, or any block."""
        errors = [
            (row - expected(tokens, self.model, row.device)[-1]).abs().nan_to_num(torch.inf).max()
            for tokens, row in self.seen
        ]
        return float(max(errors, default=0.0))

    def check_books(self):
        cache, space = self.kv.cache, self.space
        for pool, copies, tables in (
            (cache.allocator.pool, cache.in_flight, map(cache.block_table, cache.sequences)),
            (space.pool, space._in_flight, map(space.block_table, space.seq_ids)),
        ):
            pool.check_integrity([*tables, copies.kept])


def streams_of(kind, seed):
    """To the host, and to the device."""
    if kind == "late":
        return LateStream(), LateStream()
    if kind == "one late":
        return (LateStream(), PromptStream()) if seed % 2 else (PromptStream(), LateStream())
    return LateStream(Random(seed)), LateStream(Random(seed + 1000))


@pytest.mark.parametrize("kind", ["late", "one late", "sometimes", "one for both"])
@pytest.mark.parametrize("layers_per_copy", [1, 3, None])
def test_late_copies_change_no_logits(kind, layers_per_copy):
    for seed in range(8):
        streams = streams_of(kind, seed)
        streams = (streams[0], streams[0]) if kind == "one for both" else streams
        story = Story(seed, streams, layers_per_copy).tell()
        assert story.error < 1e-5
        story.check_books()
        story.space.synchronize()
        story.check_books()
        assert not story.kv.cache.in_flight
        assert not story.space._in_flight


def test_copies_that_are_done_at_once_change_no_logits():
    for seed in range(6):
        assert Story(seed, None).tell().error < 1e-5


def nothing(*_args, **_kwargs):
    return []


def free_at_once(self, fence, blocks):
    self._pool.release(blocks)


def one_layer_early(self, layer):
    if layer:
        self.stream.hold(self.event(layer - 1))


def without(number):
    """Copies that skip one of the two things that they wait for: before reading, before writing."""

    def patch(monkeypatch, direction):
        copy = getattr(HostRecords, direction)

        def broken(self, sources, targets, *fences):
            left = list(fences)
            left[number] = []
            return copy(self, sources, targets, *left)

        monkeypatch.setattr(HostRecords, direction, broken)

    return patch


DROPPED = {
    "steps wait for nothing": lambda patch: patch.setattr(AttentionMetadata, "wait", nothing),
    "steps wait for the layer before": lambda patch: patch.setattr(Fence, "wait", one_layer_early),
    "copies on write wait for nothing": lambda patch: patch.setattr(InFlight, "hold", nothing),
    "sources are free at once": lambda patch: patch.setattr(InFlight, "leave", free_at_once),
    "nobody waits for readers": lambda patch: patch.setattr(
        InFlight, "before_writing", InFlight.before_reading
    ),
    "copies wait for no others": lambda patch: patch.setattr(LateStream, "wait", nothing),
    "out reads what is arriving": lambda patch: without(0)(patch, "gather"),
    "in reads what is arriving": lambda patch: without(0)(patch, "scatter"),
}


@pytest.mark.parametrize("dropped", DROPPED)
def test_every_wait_is_needed(dropped, monkeypatch):
    DROPPED[dropped](monkeypatch)
    assert any(
        Story(seed, streams_of(kind, seed)).tell().error > 1e-3
        for seed in range(40)
        for kind in ("late", "one late", "sometimes")
    )


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("tight", ["device", "host"])
def test_a_copy_into_blocks_that_another_still_reads_waits_for_it(tight, dropped, monkeypatch):
    """One sequence takes the place of another, on the device or in the host's memory, by a faster stream."""
    if dropped:
        without(1)(monkeypatch, "scatter" if tight == "device" else "gather")
    late, prompt = LateStream(), PromptStream()
    kv = MODEL.paged_kv(3 if tight == "device" else 6, BLOCK_SIZE)
    streams = (late, prompt) if tight == "device" else (prompt, late)
    space = SwapSpace(kv.cache, 6 if tight == "device" else 3, streams=streams, layers_per_copy=1)
    histories = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
    one = kv.new()
    step(kv, [one], histories[:1])
    space.swap_out([one])
    space.synchronize()
    two = kv.new()
    step(kv, [two], histories[1:])
    if tight == "device":  # two leaves slowly, one comes into its blocks, then two comes back
        space.swap_out([two])
        space.swap_in([one])
        kv.free(one)
        space.swap_in([two])
        row = step(kv, [two], [[5]])[0]
        told = [*histories[1], 5]
    else:  # one comes back slowly, two leaves into its records
        space.swap_in([one])
        space.swap_out([two])
        row = step(kv, [one], [[5]])[0]
        told = [*histories[0], 5]
    error = float((row - expected(told)[-1]).abs().nan_to_num(torch.inf).max())
    assert error > 1e-3 if dropped else error < 1e-5


def two_groups(streams, **options):
    """Two sequences of nine tokens, and a swap space."""
    kv = MODEL.paged_kv(16, BLOCK_SIZE)
    staying, leaving = kv.new(), kv.new()
    step(kv, [staying, leaving], [[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]])
    return kv, staying, leaving, SwapSpace(kv.cache, 8, streams=streams, layers_per_copy=1, **options)


def test_a_prefetch_stalls_nobody_but_who_reads_it(monkeypatch):
    out, back = LateStream(), LateStream()
    kv, staying, leaving, space = two_groups((out, back))
    space.swap_out([leaving])
    assert space.swap_in([leaving]).num_blocks == 3
    for token in range(3):
        step(kv, [staying], [[token]])
    assert (out.num_started, back.num_started) == (0, 0)
    assert not kv.cache.arrived(leaving)
    landed = []
    attend = type(kv).attend

    def watched(self, layer, *rest):
        out = attend(self, layer, *rest)
        landed.append([event.happened for event in fence.events])
        return out

    (fence,) = kv.cache.in_flight.before_reading(kv.cache.block_table(leaving))
    monkeypatch.setattr(type(kv), "attend", watched)
    row = step(kv, [staying, leaving], [[7], [8]])[1]
    assert landed == [[place <= layer for place in range(4)] for layer in range(4)]
    assert kv.cache.arrived(leaving)
    torch.testing.assert_close(row, expected([9, 8, 7, 6, 5, 4, 3, 2, 1, 8])[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("late", [False, True])
def test_a_layer_by_itself_waits_too(late):
    layer = PagedAttention(32, 4, BLOCK_SIZE, device="cpu")
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    cache = PagedKVCache(BLOCK_SIZE, 32, BlockAllocator(12, BLOCK_SIZE, 32))
    seq_ids = [cache.new(), cache.new()]
    layer(x[:, :8], cache, seq_ids)
    space = SwapSpace(cache, 8, streams=(LateStream(), LateStream()) if late else None)
    space.swap_out(seq_ids[1:])
    space.swap_in(seq_ids[1:])
    assert cache.arrived(seq_ids[1]) is not late
    out = layer(x[:, 8:], cache, seq_ids)
    whole = layer(x, PagedKVCache(BLOCK_SIZE, 32, BlockAllocator(12, BLOCK_SIZE, 32)))
    torch.testing.assert_close(out, whole[:, 8:], rtol=0, atol=1e-5)


def test_sources_are_not_free_until_copied_out_and_destinations_are_taken_at_submission():
    out, back = LateStream(), LateStream()
    kv, _, leaving, space = two_groups((out, back))
    cache = kv.cache
    assert (cache.num_free, space.num_free) == (10, 8)
    space.swap_out([leaving])
    assert (cache.num_free, space.num_free) == (10, 5)
    out.synchronize()
    assert (cache.num_free, space.num_free) == (13, 5)
    space.swap_in([leaving])
    assert (cache.num_free, space.num_free) == (10, 5)
    back.synchronize()
    assert (cache.num_free, space.num_free) == (10, 8)


def test_where_nothing_else_is_free_a_step_waits_for_the_copy_out_layer_by_layer():
    out, back = LateStream(), LateStream()
    kv, _, leaving, space = two_groups((out, back), staging_bytes=1)
    space.swap_out([leaving])
    guest = kv.new()
    with pytest.raises(OutOfBlocks, match="13 of 16 are free"):
        kv.extend([guest], [14 * BLOCK_SIZE])
    metadata = kv.extend([guest], [13 * BLOCK_SIZE])
    assert len(metadata.fences) == 1
    assert out.num_started == 0
    for layer in range(4):
        metadata.wait(layer)
        assert [event.happened for event in metadata.fences[0].events] == [
            place <= layer for place in range(4)
        ]
    other = kv.new()
    with pytest.raises(OutOfBlocks, match="0 of 16"):
        kv.extend([other], [1])


def test_streams_are_told_in_this_order():
    """Blocks are gathered behind compute; only scattering waits for it; compute is told nothing until it reads."""
    diary: list[str] = []
    streams = DiaryStream("out", diary), DiaryStream("in", diary)
    twin = twins()
    members = family(twin)
    space = SwapSpace(twin.cache, 20, layers_per_copy=1, streams=streams, staging_bytes=1 << 20)
    space.swap_out(members)
    assert diary == ["out waits for compute", *["out copies"] * 6]
    diary.clear()
    space.swap_in(members)
    assert diary == [*["in copies"] * 3, "in waits for compute", *["in copies"] * 3]
    diary.clear()
    small = SwapSpace(twin.cache, 20, layers_per_copy=1, streams=streams, staging_bytes=1)
    small.swap_out(members[:1])
    blocks = len(small.block_table(members[0]))
    assert diary == ["out waits for compute", *["out copies"] * 6 * blocks]


def test_what_a_gpu_is_told(monkeypatch):
    """The calls of torch.cuda behind a copy stream, on streams that keep a diary."""
    diary = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return f"event of {self.name}"

        def wait_event(self, event):
            diary.append(f"{self.name} waits for {event}")

        def synchronize(self):
            diary.append(f"the host waits for {self.name}")

    current = [Stream("compute")]

    @contextmanager
    def running(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", running)
    stream = CopyStream(torch.device("cuda"), Stream("copies"))
    stream.wait_for_compute()
    stream.submit(lambda: diary.append(f"work on {current[-1].name}"))
    event = stream.record()
    stream.wait("event of others")
    stream.hold(event)
    stream.synchronize()
    assert diary == [
        "copies waits for event of compute", "work on copies", "copies waits for event of others",
        "compute waits for event of copies", "the host waits for copies",
    ]  # fmt: skip


@pytest.mark.parametrize("layers_per_copy", [1, 2, 3, 7, None])
def test_layers_travel_in_groups(layers_per_copy):
    twin = twins()
    members = family(twin)
    space = SwapSpace(twin.cache, 20, quantization="int8", measure=True, layers_per_copy=layers_per_copy)
    moved = space.swap_out(members)
    assert moved.num_copies == -(-3 // (layers_per_copy or 3))
    assert moved.num_bytes == moved.num_blocks * 3 * space.quantization.bytes_per_block(4, 2, 8)
    whole = twins()
    alone = SwapSpace(whole.cache, 20, quantization="int8", measure=True)
    assert moved.error == alone.swap_out(family(whole)).error


def test_layers_per_copy_is_at_least_one():
    with pytest.raises(ValueError, match="layers_per_copy: got 0, expected an integer >= 1"):
        SwapSpace(twins().cache, 4, layers_per_copy=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams of their own need a GPU")
@pytest.mark.parametrize("layers_per_copy", [1, None])
def test_streams_of_a_gpu_change_no_logits(layers_per_copy):
    model = Transformer(MODEL.config, "cuda")
    for seed in range(12):
        story = Story(seed, None, layers_per_copy, model).tell()
        assert story.error < 1e-4
        story.space.synchronize()
        story.check_books()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams of their own need a GPU")
def test_a_prefetch_on_a_gpu_leaves_compute_alone():
    """Compute that was started behind a large swap-in is done before it."""
    config = TransformerConfig(vocab_size=50, hidden_dim=1024, num_layers=16, num_heads=16, num_kv_heads=16)
    kv = Transformer(config, "cuda").paged_kv(2048, 16)
    space = SwapSpace(kv.cache, 1024, layers_per_copy=1)
    seq_id = kv.new()
    kv.extend([seq_id], [1024 * 16])
    space.swap_out([seq_id])
    space.synchronize()
    space.swap_in([seq_id])
    torch.ones(1, device="cuda").add_(1)
    torch.cuda.current_stream().synchronize()
    assert not kv.cache.arrived(seq_id)
    space.synchronize()
    assert kv.cache.arrived(seq_id)
