"""Quantised rows: what comes back is within its bound, packed as told, and no row spoils another."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.swap.grids import GRIDS
from attention.swap.quantization import Quantization, Quantized

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMATS = tuple(name for name in GRIDS if name != "fp8" or hasattr(torch, "float8_e4m3fn"))


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(quantization: Quantization, x: torch.Tensor) -> torch.Tensor:
    return quantization.dequantize(quantization.quantize(x), x.shape[-1], x.dtype)


def points(name: str) -> torch.Tensor:
    """Every value that a grid has, listed one by one."""
    if name == "fp8":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return every[every.isfinite()]
    highest = {"int8": 127, "int4": 7}[name]
    return torch.arange(-highest, highest + 1).float()


@pytest.mark.parametrize("name", FORMATS)
def test_a_ratio_goes_to_the_nearest_point_of_the_grid(name):
    grid, every = GRIDS[name], points(name)
    assert float(every.abs().max()) == grid.largest
    ratios = torch.cat((rows(4000) * grid.largest / 4, torch.linspace(-grid.largest, grid.largest, 1000)))
    ratios = ratios.clamp(-grid.largest, grid.largest)
    found = grid.decode(grid.encode(ratios), len(ratios)).float()
    nearest = (ratios[:, None] - every).abs().amin(1)
    torch.testing.assert_close((found - ratios).abs(), nearest, rtol=0, atol=0)
    assert bool((nearest <= grid.distance(ratios)).all())
    assert float(nearest.max()) <= grid.worst * grid.largest


@given(
    name=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    head_dim=st.sampled_from([1, 2, 7, 8, 64]),
    groups=st.booleans(),
    exponent=st.integers(-160, 130),
    spread=st.integers(0, 60),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150)
def test_errors_are_within_their_bound(name, dtype, head_dim, groups, exponent, spread, seed):
    group = next((size for size in (2, 1) if head_dim % size == 0), None) if groups else None
    quantization = Quantization.named(name, group)
    exponents = exponent - torch.randint(0, spread + 1, (5, 3, head_dim))
    highest = torch.finfo(dtype).max
    x = (rows(5, 3, head_dim, seed=seed).double() * 2.0**exponents).clamp(-highest, highest).to(dtype)
    report = quantization.measure(x)
    assert report.share <= 1.0
    assert report.num_values == x.numel()
    assert report.max_error <= report.max_bound
    assert there_and_back(quantization, x).dtype == dtype


@pytest.mark.parametrize(("name", "share"), [("int8", 1 / 254), ("int4", 1 / 14), ("fp8", 1 / 28)])
def test_the_bound_is_what_the_name_promises_and_is_reached(name, share):
    if name not in FORMATS:
        pytest.skip("torch has no float8_e4m3fn")
    x = rows(2000, 64)
    largest = x.abs().amax(-1, keepdim=True)
    shares = (there_and_back(Quantization.named(name), x) - x).abs() / largest
    assert 0.95 * share < float(shares.max()) <= share * (1 + 1e-4)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_and_the_smallest(name, dtype):
    info = torch.finfo(dtype)
    for x in (info.max, -info.max, info.smallest_normal, info.smallest_normal * info.eps, 0.0):
        row = torch.tensor([[x, 0.0, x / 2, -x]], dtype=dtype)
        back = there_and_back(Quantization.named(name), row)
        assert bool(back.isfinite().all())
        assert Quantization.named(name).measure(row).share <= 1.0
    assert torch.equal(there_and_back(Quantization.named(name), torch.zeros(3, 8)), torch.zeros(3, 8))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_slot_that_nobody_wrote_spoils_no_other(name, poison):
    clean = rows(6, 16, 2, 64)
    spoiled = clean.clone()
    spoiled[:, 5:] = poison  # the tail of every block
    spoiled[2, 1, 0] = poison  # one head of a token
    quantization = Quantization.named(name)
    back, expected = there_and_back(quantization, spoiled), there_and_back(quantization, clean)
    kept = torch.ones(6, 16, 2, dtype=torch.bool)
    kept[:, 5:] = False
    kept[2, 1, 0] = False
    assert torch.equal(back[kept], expected[kept])
    if poison != 3e38:
        assert bool(back[~kept].isnan().all())
        assert quantization.measure(spoiled).num_values == int(kept.sum()) * 64


def test_int4_packs_two_values_into_a_byte():
    quantized = Quantization.named("int4").quantize(torch.tensor([[7.0, -7.0, 3.0, 0.4, -1.0]]))
    assert quantized.codes.tolist() == [[15 | 1 << 4, 11 | 8 << 4, 7 | 0 << 4]]
    assert quantized.scales.tolist() == [[1.0]]
    back = Quantization.named("int4").dequantize(quantized, 5, torch.float32)
    assert back.tolist() == [[7.0, -7.0, 3.0, 0.0, -1.0]]


def test_groups_of_channels_keep_small_channels_beside_large_ones():
    x = rows(100, 64)
    x[:, :16] *= 1000
    whole, grouped = Quantization.named("int4"), Quantization.named("int4", group_size=16)
    errors = [(there_and_back(quantization, x) - x)[:, 16:].abs().max() for quantization in (whole, grouped)]
    assert errors[0] > 2
    assert errors[1] < 0.4
    assert grouped.num_groups(64) == 4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_dim", [7, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_per_block_are_those_that_are_kept(name, head_dim, dtype):
    for group in (None, 1, head_dim):
        quantization = Quantization.named(name, group)
        both = rows(3, 2, 16, 4, head_dim).to(dtype)
        packed = quantization.pack(quantization.quantize(both))
        assert packed.dtype == torch.uint8
        assert packed.shape == (3, quantization.bytes_per_block(16, 4, head_dim, dtype))
        unpacked = quantization.unpack(packed, (3, 2, 16, 4), head_dim, dtype)
        assert torch.equal(
            quantization.dequantize(unpacked, head_dim, dtype), there_and_back(quantization, both)
        )


def test_bytes_of_a_known_block():
    assert Quantization.named("int8").bytes_per_block(16, 8, 128) == 2 * 16 * 8 * (128 + 4)
    assert Quantization.named("int4").bytes_per_block(16, 8, 128) == 2 * 16 * 8 * (64 + 4)
    assert Quantization.named("int4", 32).bytes_per_block(16, 8, 128) == 2 * 16 * 8 * (64 + 16)


@pytest.mark.parametrize("name", FORMATS)
def test_quantising_twice_adds_rounding_only(name):
    once = there_and_back(Quantization.named(name), rows(500, 64))
    twice = there_and_back(Quantization.named(name), once)
    assert float(((twice - once).abs() / once.abs().amax(-1, keepdim=True)).max()) < 1e-6


def test_a_wrong_code_is_over_the_bound():
    x = rows(10, 64)
    quantization = Quantization.named("int8")
    good = quantization.quantize(x)
    codes = good.codes.clone()
    codes[4, 7] += 1 if codes[4, 7] < 127 else -1
    assert quantization.measure(x, good).share <= 1
    assert quantization.measure(x, Quantized(codes, good.scales)).share > 1


def test_mistakes_are_told(monkeypatch):
    def refused(message):
        return pytest.raises(ValueError, match=re.escape(message))

    with refused("quantization: got 'int3', expected one of int8, int4, fp8"):
        Quantization.named("int3")
    with refused("group_size: got 0, expected at least 1, or None for the whole row"):
        Quantization.named("int4", 0)
    with refused("group_size: got 3, expected a divisor of head_dim 8"):
        Quantization.named("int4", 3).quantize(torch.zeros(1, 8))
    with refused("x: got torch.int64, expected a floating-point type"):
        Quantization.named("int8").quantize(torch.zeros(1, 8, dtype=torch.int64))
    monkeypatch.delattr(torch, "float8_e4m3fn", raising=False)
    with refused("has no float8_e4m3fn"):
        Quantization.named("fp8")
