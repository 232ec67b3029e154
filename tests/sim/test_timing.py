"""Step times against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import Device, Model, Request, Sequence, Step, Transfers, UserError, timing
from tests.sim.story import Story, ask, memory, scheduled

# OPT-13B on an A100-40GB.
OPT = Model(
    name="opt-13b", num_layers=40, hidden_size=5120, num_heads=40, num_kv_heads=40, head_dim=128,
    num_params=12.85e9, active_params=12.85e9, max_model_len=2048,
)  # fmt: skip
A100 = Device(
    name="a100-40gb",
    flops_per_s=312e12,
    memory_bytes_per_s=1555e9,
    memory_bytes=40 * 2**30,
    host_bytes_per_s=32e9,
)


def step(decodes: int = 0, context: int = 0, chunks: tuple[tuple[int, int], ...] = ()) -> Step:
    """A step with so many decodes over so much context, and (start, tokens) of prompts."""
    made = Step()
    made.num_decodes, made.decode_context = decodes, context
    for start, tokens in chunks:
        made.chunks.append((Sequence(Request(0, 0, 1, 1), 0, 0, 1), start, tokens))
        made.num_prefill_tokens += tokens
    return made


def near(seconds: float):
    return pytest.approx(seconds, rel=1e-12)


def test_fixed():
    clock = timing["fixed"](prefill_ms=7, decode_ms=3)
    assert clock.seconds(step(decodes=5, context=100)) == 0.003
    assert clock.seconds(step(chunks=((0, 9), (0, 1)))) == 0.007
    assert clock.seconds(step(decodes=1, context=9, chunks=((0, 9),))) == near(0.010)
    assert clock.context_free


def test_linear_by_the_fit_of_splitwise():
    """Llama-2-70B on H100s: 29.9 + 0.206 batch + 0.000174 batch context; 5.4 + 0.0899 tokens + 1.46e-6 ..."""
    clock = timing["linear"]()
    assert clock.seconds(step(decodes=32, context=32 * 1000)) == near((29.9 + 6.592 + 5.568) / 1e3)
    assert clock.seconds(step(chunks=((0, 1000),))) == near((5.4 + 89.9 + 1.46) / 1e3)
    chunked = step(chunks=((0, 1000), (500, 100)))  # 1000 x 1000 + 100 x 600
    assert clock.seconds(chunked) == near((5.4 + 1100 * 0.0899 + 1.06e6 * 1.46e-6) / 1e3)
    both = step(decodes=32, context=32_000, chunks=((0, 1000),))  # one base, the larger
    assert clock.seconds(both) == near((29.9 + 6.592 + 5.568 + 89.9 + 1.46) / 1e3)


def roofline(model: Model = OPT, device: Device = A100, **fields):
    bounds = {"step_overhead_ms": 0, "compute_efficiency": 1, "memory_efficiency": 1}
    return timing["roofline"](model, device, **{**bounds, **fields})


def test_roofline_of_decodes_reads_weights_and_context():
    """25.7 GB of weights and 819,200 bytes a token at 1555 GB/s."""
    assert OPT.kv_bytes_per_token == 819_200
    seconds = roofline().seconds(step(decodes=30, context=30 * 300))
    assert seconds == near(25.7e9 / 1555e9 + 9000 * 819_200 / 1555e9)
    assert round(seconds * 1e3, 3) == 21.269


def test_roofline_of_a_prompt_computes():
    """2 x 12.85e9 FLOPs a token; 4 x 40 x 40 x 128 a pair of tokens, 512 x 513 / 2 pairs."""
    linear = 2 * 12.85e9 * 512 / 312e12
    pairs = 512 * 513 // 2
    attention = max(4 * 40 * 40 * 128 * pairs / 312e12, 512 * 819_200 / 1555e9)
    assert roofline().seconds(step(chunks=((0, 512),))) == near(linear + attention)
    small = step(chunks=((0, 4),))  # too few tokens to hide the weights
    assert roofline().seconds(small) == near(25.7e9 / 1555e9 + 4 * 819_200 / 1555e9)


def test_roofline_of_a_fused_step_with_a_later_chunk():
    """A chunk of 100 after 400: each token sees 400 and those of the chunk up to itself."""
    pairs = 100 * 400 + 100 * 101 // 2 + 2000
    context = 500 + 2000
    tokens = 100 + 8
    expected = max(2 * 12.85e9 * tokens / 312e12, 25.7e9 / 1555e9) + max(
        4 * 40 * 40 * 128 * pairs / 312e12, context * 819_200 / 1555e9
    )
    assert roofline().seconds(step(decodes=8, context=2000, chunks=((400, 100),))) == near(expected)


def test_roofline_fields():
    plain = roofline().seconds(step(decodes=30, context=9000))
    assert roofline(step_overhead_ms=20).seconds(step(decodes=30, context=9000)) == near(plain + 0.020)
    assert roofline(memory_efficiency=0.5).seconds(step(decodes=30, context=9000)) == near(2 * plain)
    prompt = step(chunks=((0, 2000),))
    halved = roofline(compute_efficiency=0.5)
    assert halved.linear_per_token == near(2 * roofline().linear_per_token)
    assert halved.seconds(prompt) > roofline().seconds(prompt)
    pair = Device(
        name="2 x a100", flops_per_s=312e12, memory_bytes_per_s=1555e9, memory_bytes=80 * 2**30,
        host_bytes_per_s=32e9, count=2,
    )  # fmt: skip
    assert roofline(OPT, pair).seconds(step(decodes=30, context=9000)) == near(plain / 2)


def test_roofline_of_a_quantised_cache_reads_less_and_dequantises():
    """409,600 values a token: a byte each, or half of one, and 3,200 scales; 9.75e12 vector operations a second."""
    weights = 25.7e9 / 1555e9
    decodes = step(decodes=30, context=9000)
    for precision, size, ops in (("int8", 422_400, 2), ("fp8", 422_400, 2), ("int4", 217_600, 4)):
        clock = roofline(replace(OPT, kv_cache_dtype=precision))
        computing = 4 * 40 * 40 * 128 * 9000 / 312e12 + 409_600 * ops * 9030 / 9.75e12
        assert clock.seconds(decodes) == near(weights + max(9000 * size / 1555e9, computing))
        assert clock.decode_seconds(30, 9000) == clock.seconds(decodes)
    int4 = replace(OPT, kv_cache_dtype="int4")
    assert computing > 9000 * 217_600 / 1555e9  # as QServe finds on this device
    free = roofline(int4, dequantize_ops=0)
    assert free.seconds(decodes) == near(weights + 9000 * 217_600 / 1555e9)
    assert roofline(int4, vector_share=1 / 16).seconds(decodes) < roofline(int4).seconds(decodes)
    prompt = step(chunks=((0, 512),))
    pairs = 4 * 40 * 40 * 128 * (512 * 513 // 2) / 312e12
    attention = max(
        pairs + 409_600 * 4 * 1024 / 9.75e12, 512 * 217_600 / 1555e9
    )  # each token read, and written
    assert roofline(int4).seconds(prompt) == near(2 * 12.85e9 * 512 / 312e12 + attention)


def test_tensor_parallel_devices_reduce_what_every_layer_leaves():
    """Two all-reduces a layer, each a ring of 2 (n - 1) sends of 5120 / n values for every token."""
    four = Device(
        name="4 x a100", flops_per_s=312e12, memory_bytes_per_s=1555e9, memory_bytes=160 * 2**30,
        host_bytes_per_s=32e9, count=4,
    )  # fmt: skip
    mixed = step(decodes=30, context=9000, chunks=((0, 100),))
    alone = roofline(OPT, four).seconds(mixed)
    linked = roofline(OPT, four, link_gb_per_s=16, link_latency_us=20)
    sends = 2 * 40 * 6
    assert linked.seconds(mixed) == near(alone + sends * (20e-6 + 130 * 5120 * 2 / 4 / 16e9))
    assert linked.decode_seconds(30, 9000) == linked.seconds(step(decodes=30, context=9000))
    assert roofline(OPT, A100, link_gb_per_s=16, link_latency_us=20).seconds(mixed) == roofline().seconds(
        mixed
    )
    with pytest.raises(UserError, match="link_latency_us without link_gb_per_s"):
        roofline(OPT, four, link_latency_us=20)


def test_a_mixture_of_experts_reads_what_its_tokens_use():
    mixture = Model(
        name="moe", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, num_params=8e9,
        active_params=1e9, max_model_len=64,
    )  # fmt: skip
    clock = roofline(mixture)
    kv = mixture.kv_bytes_per_token / 1555e9
    assert clock.seconds(step(decodes=1, context=1)) == near(2e9 / 1555e9 + kv)
    assert clock.seconds(step(decodes=3, context=3)) == near(6e9 / 1555e9 + 3 * kv)
    assert clock.seconds(step(decodes=20, context=20)) == near(16e9 / 1555e9 + 20 * kv)  # all experts, once


@pytest.mark.parametrize(("model", "device", "missing"), [(None, A100, "model"), (OPT, None, "device")])
def test_roofline_needs_its_shapes(model, device, missing):
    with pytest.raises(UserError, match=f"timing roofline needs a {missing}"):
        timing["roofline"](model, device)


# Tables

TABLES = {
    "m_linear_ops.csv": "num_tokens,other_ms,linear_per_layer_ms\n8,9,0.5\n16,9,0.6\n64,9,1.0\n",
    "m_attn_decode.csv": (
        "batch_size,kv_cache_size,attn_decode_per_layer_ms\n1,100,0.10\n1,200,0.20\n4,100,0.30\n4,200,0.50\n"
    ),
    "m_attn_prefill.csv": "kv_cache_size,prefill_chunk_size,attn_prefill_per_layer_ms\n0,10,0.7\n0,50,2.0\n64,10,9.0\n",
}


def write(folder: Path, **changed: str | None) -> Path:
    for name, text in TABLES.items():
        text = changed.get(name.removesuffix(".csv"), text)
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_tables_take_the_upper_entry(tmp_path):
    clock = timing["table"](None, None, tables=write(tmp_path), num_layers=10, step_overhead_ms=1)
    # Milliseconds: overhead 1 and ten layers.
    assert clock.decode_seconds(1, 100) * 1e3 == near(1 + 10 * (0.5 + 0.10))
    assert clock.decode_seconds(1, 101) * 1e3 == near(1 + 10 * (0.5 + 0.20))
    assert clock.decode_seconds(2, 2 * 100) * 1e3 == near(1 + 10 * (0.5 + 0.30))
    assert clock.decode_seconds(4, 4 * 150) * 1e3 == near(1 + 10 * (0.5 + 0.50))
    assert clock.seconds(step(chunks=((0, 9),))) * 1e3 == near(1 + 10 * (0.6 + 0.7))
    # Two prompts are one of the root of the sum of squares: 30 and 40 make 50.
    assert clock.seconds(step(chunks=((0, 30), (0, 34)))) * 1e3 == near(1 + 10 * (1.0 + 2.0))
    # 6 tokens after 7: 13 squared less 7 squared is 120, below 50 squared.
    both = step(decodes=2, context=200, chunks=((7, 6),))
    assert clock.seconds(both) * 1e3 == near(1 + 10 * (0.5 + 0.30 + 2.0))


def test_tables_are_scaled_past_their_end(tmp_path):
    clock = timing["table"](None, None, tables=write(tmp_path), num_layers=1)
    assert clock.seconds(step(chunks=((0, 100),))) * 1e3 == near(1.0 * 100 / 64 + 2.0 * 100 / 50)
    assert clock.decode_seconds(1, 400) * 1e3 == near(0.5 + 0.20 * 400 / 200)
    assert clock.decode_seconds(8, 8 * 100) * 1e3 == near(0.5 + 0.30 * 8 / 4)


def test_tables_take_the_layers_of_the_model(tmp_path):
    assert timing["table"](OPT, None, tables=write(tmp_path)).per_layer == 40 / 1e3
    with pytest.raises(UserError, match="timing table needs num_layers"):
        timing["table"](None, None, tables=tmp_path)


LINEAR = "num_tokens,linear_per_layer_ms\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"m_linear_ops\.csv:1: no column 'num_tokens', found "),
        (
            "tokens,linear_per_layer_ms\n8,1\n",
            r"m_linear_ops\.csv:1: no column 'num_tokens', found tokens, linear",
        ),
        (LINEAR, r"m_linear_ops\.csv: no rows under the header"),
        (LINEAR + "8,1\n16\n", r"m_linear_ops\.csv:3: expected numbers .* got 16"),
        (LINEAR + "8,1\n\n16,fast\n", r"m_linear_ops\.csv:4: expected numbers .* got 16, fast"),
        (LINEAR + "8.5,1\n", r"m_linear_ops\.csv:2: expected numbers"),
        (LINEAR + "8,nan\n", r"m_linear_ops\.csv:2: expected numbers from 0 for .* got 8, nan"),
        (LINEAR + "8,inf\n", r"m_linear_ops\.csv:2: expected numbers"),
        (LINEAR + "8,-1\n", r"m_linear_ops\.csv:2: expected numbers"),
        (LINEAR + "-8,1\n", r"m_linear_ops\.csv:2: expected numbers"),
        (None, r"timing\.tables: expected one file \*linear_ops\.csv in .*, found none"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, complaint):
    write(tmp_path, m_linear_ops=text)
    with pytest.raises(UserError, match=complaint):
        timing["table"](None, None, tables=tmp_path, num_layers=1)


def test_other_bad_tables(tmp_path):
    with pytest.raises(UserError, match=r"timing\.tables: .*nowhere is not a folder"):
        timing["table"](None, None, tables=tmp_path / "nowhere", num_layers=1)
    write(tmp_path, m_attn_prefill=TABLES["m_attn_prefill.csv"].replace("\n0,", "\n1,"))
    with pytest.raises(UserError, match=r"no row with kv_cache_size 0 in \*attn_prefill\.csv"):
        timing["table"](None, None, tables=tmp_path, num_layers=1)
    (tmp_path / "n_linear_ops.csv").write_text(LINEAR)
    with pytest.raises(UserError, match=r"expected one file .* found m_linear_ops\.csv, n_linear_ops\.csv"):
        timing["table"](None, None, tables=tmp_path, num_layers=1)
    (tmp_path / "n_linear_ops.csv").unlink()
    (tmp_path / "m_linear_ops.csv").write_bytes(b"num_tokens,linear_per_layer_ms\n8,\xff\n")
    with pytest.raises(UserError, match=r"m_linear_ops\.csv: cannot be read"):
        timing["table"](None, None, tables=tmp_path, num_layers=1)


# All of them


@pytest.fixture(scope="module")
def clocks(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("tables"))
    made = {"table": timing["table"](None, None, tables=folder, num_layers=3, step_overhead_ms=0.1)}
    for kind in timing.kinds:
        if not any(field.required for field in timing.fields(kind)):
            made[kind] = timing[kind](OPT, A100)
    return made


@given(decodes=st.integers(1, 5000), data=st.data())
def test_a_decode_step_costs_the_same_to_the_bit(clocks, decodes, data):
    context = data.draw(st.integers(decodes, decodes * 5000))
    for kind, clock in clocks.items():
        assert clock.decode_seconds(decodes, context) == clock.seconds(step(decodes, context)), kind
        if clock.context_free:
            assert clock.decode_seconds(decodes, context) == clock.decode_seconds(decodes, decodes), kind


@given(
    decodes=st.integers(0, 300), mean=st.integers(1, 4000), chunks=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(1, 2000)), max_size=4
    )
)  # fmt: skip
def test_times_are_numbers_and_more_work_takes_no_less(clocks, decodes, mean, chunks):
    for kind, clock in clocks.items():
        some = clock.seconds(step(decodes, decodes * mean, tuple(chunks)))
        more = clock.seconds(step(decodes, decodes * mean, (*chunks, (0, 100))))
        assert 0 <= some < math.inf
        assert some <= more, kind


# Rounding to the clock


@pytest.mark.parametrize(
    ("decode_ms", "nanoseconds"), [(0, 1), (1e-9, 1), (4e-7, 1), (1.5e-6, 2), (2.5e-6, 2), (1, 1_000_000)]
)
def test_a_step_lasts_whole_nanoseconds_and_at_least_one(decode_ms, nanoseconds):
    for stretches in (False, True):
        story = Story(
            scheduled("orca", memory(slots=64)), ask((0, 4, 4)), prefill_ms=0, decode_ms=decode_ms,
            stretches=stretches,
        )  # fmt: skip
        durations = [round(value * 1e6) for value in story.column("steps", "duration")]
        assert durations == [1, nanoseconds, nanoseconds, nanoseconds]


# Moving blocks


def test_transfers_by_hand():
    """A block of 16 tokens is 13.1 MB in 80 pieces; swaps at 24 GB/s, copies read and write at 1555 GB/s."""
    clock = Transfers(OPT, A100, 16)
    moving = Step()
    moving.swapped_out_blocks, moving.swapped_in_blocks, moving.copied_blocks = 3, 2, 4
    size = 16 * 819_200
    assert size == 13_107_200
    swap = 80 * 8e-6 + size / 24e9
    assert clock.seconds(moving) == near(5 * swap + 4 * 2 * size / 1555e9)
    assert clock.seconds(Step()) == 0


def test_quantised_swaps_move_less_and_cost_the_device_a_pass():
    """Of 128 values of two bytes remain as many codes and a scale of four bytes; 40 heads, K and V, 40 layers."""
    moving = Step()
    moving.swapped_out_blocks = 2
    whole = 16 * 819_200
    for precision, row in (("int8", 132), ("fp8", 132), ("int4", 68)):
        swapped = 16 * 2 * 40 * 40 * row
        quantizing = (whole + swapped) / 1555e9
        at_once = Transfers(OPT, A100, 16, quantization=precision)
        assert at_once.seconds(moving) == near(2 * (80 * 8e-6 + swapped / 24e9 + quantizing))
        beside = Transfers(OPT, A100, 16, quantization=precision, asynchronous=True)
        assert beside.seconds(moving) == near(2 * quantizing)
        assert beside.swap_seconds(2, 0) == near(2 * (80 * 8e-6 + swapped / 24e9))
    with pytest.raises(UserError, match=r"quantization needs a model"):
        Transfers(None, A100, 16, quantization="int8")
    with pytest.raises(UserError, match=r"int8 takes 422,400 bytes a token, expected less than the 409,600"):
        Transfers(replace(OPT, kv_bytes_per_value=1.0), A100, 16, quantization="int8")


def test_transfer_fields():
    moving = Step()
    moving.swapped_in_blocks = 1
    fields = {"host_bandwidth_gb_per_s": 10, "copy_latency_us": 100, "copies_per_block": 2}
    assert Transfers(OPT, A100, 16, **fields).seconds(moving) == near(200e-6 + 13_107_200 / 10e9)
    assert Transfers(None, None, 16, copy_latency_us=5).seconds(moving) == near(5e-6)
    pair = Device(
        name="2", flops_per_s=1, memory_bytes_per_s=1e12, memory_bytes=1, host_bytes_per_s=32e9, count=2
    )
    assert Transfers(OPT, pair, 16, copy_latency_us=0).seconds(moving) == near(13_107_200 / 48e9)
