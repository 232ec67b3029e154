"""Compiled for an H100, without one: no spills, wide loads, tensor cores, shared memory that there is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install kvsim[triton])")

from attention.kernels import plan
from attention.kernels.configurations import configuration, key_of, shipped
from attention.kernels.launch import attend
from tests.attention.kernels.cases import case
from tests.attention.kernels.compiling import MOST_SHARED_MEMORY, Build, build, build_attention

DEFAULT = {"kind": "decode", "dtype": "bfloat16", "head_dim": 128, "group": 4, "block_size": 16}
ENTRIES = [pytest.param(entry, id="-".join(map(str, entry.given.values()))) for entry in shipped()]

VARIANTS = [
    {"group": 1},
    {"group": 64},
    {"group": 7, "head_dim": 80},
    {"block_size": 1},
    {"block_size": 100},
    {"block_size": 256},
    {"dtype": "float16"},
    {"WINDOWED": True},
    {"CAPPED": True},
    {"WIDE": True},
]


def verify(built: Build, dtype: str, registers: int = 255) -> None:
    assert built.stack == 0, f"spills {built.stack} bytes a thread"
    assert built.registers <= registers
    assert built.shared_memory <= MOST_SHARED_MEMORY
    assert built.copy_widths == {"0x10"}
    assert not built.narrow_loads
    assert built.tensor_cores == (dtype != "float32")  # float32 is multiplied exactly, not in TF32


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_shipped_configuration(entry):
    shape, value = DEFAULT | dict(entry.given), entry.configuration
    dtype = shape["dtype"]
    built = build_attention(value=value, **shape)
    verify(built, dtype)
    buffers = 2 * (value.num_stages - 1) * value.tile * shape["head_dim"] * (4 if dtype == "float32" else 2)
    assert built.shared_memory >= buffers, "K and V have fewer buffers than num_stages - 1"
    if "group" not in entry.given:  # not measured: then as many must fit as the splits are chosen for
        assert built.registers * value.num_warps * 32 * value.programs_per_sm <= 65536
        assert built.shared_memory * value.programs_per_sm <= MOST_SHARED_MEMORY


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_variants(kind, variant):
    shape = {"head_dim": 128, "group": 4, "block_size": 16} | variant
    dtype = shape.pop("dtype", "bfloat16")
    chosen = configuration(key_of(kind, shape["head_dim"], dtype, shape["group"], shape["block_size"]))
    verify(build_attention(kind, chosen, dtype, **shape), dtype)


def test_without_splits_decode_writes_its_output():
    chosen = configuration(key_of("decode", 128, "bfloat16", 4, 16))
    shape = {"head_dim": 128, "group": 4, "block_size": 16}
    verify(build_attention("decode", chosen, "bfloat16", **shape, DIRECT=True), "bfloat16", registers=128)
    verify(build_attention("decode", chosen, "bfloat16", **shape, RAGGED=True), "bfloat16", registers=128)


def test_long_prompts_use_the_wide_tensor_core_instructions():
    chosen = configuration(key_of("prefill", 128, "bfloat16", 4, 16))
    assert "wgmma" in build_attention("prefill", chosen, "bfloat16", head_dim=128, group=4, block_size=16).ptx


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_odd_strides_do_not_spill(kind, dtype):
    shape = {"head_dim": 128, "group": 4, "block_size": 16}
    built = build_attention(kind, plan.UNALIGNED[kind], dtype, **shape, STEP=1)
    assert built.stack == 0
    assert built.shared_memory <= MOST_SHARED_MEMORY


@pytest.fixture
def launched(monkeypatch):
    """What Triton's own launcher would run, (name, compiled kernel), as if there were an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:  # only what is asked of a driver before anything is loaded
        def get_current_device(self) -> int:
            return 99

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    compiled = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled.append((self.__name__, run(self, *arguments, grid=grid, warmup=True, **options)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Absent())
    return compiled


def test_one_compilation_serves_all_batches_and_lengths(launched):
    for lengths in ((4000,), (3000, 1, 777), (16,)):
        paged = case(torch.device("cpu"), lengths, heads=8, head_dim=128, dtype=torch.bfloat16)
        attend(dataclasses.replace(paged.call(), num_splits=len(lengths) + 1))
    for query_lens in ((9,), (1, 7, 40), (2, 3)):
        paged = case(torch.device("cpu"), (50,) * len(query_lens), query_lens, heads=8, head_dim=128)
        attend(paged.call())
    kernels = {name: {id(kernel) for other, kernel in launched if other == name} for name, _ in launched}
    assert len(kernels["decode_kernel"]) == 2  # bfloat16, and float32 in ragged batches
    assert len(kernels["combine_kernel"]) == 1  # the ragged ones are too short to be split
    assert len(kernels["prefill_kernel"]) == 2  # with and without sequences that are left to decode
    assert all(kernel.metadata.shared <= MOST_SHARED_MEMORY for _, kernel in launched)


def test_combine_does_not_spill():
    from attention.kernels.combine import combine_kernel

    types = dict.fromkeys(combine_kernel.arg_names, "i32") | {
        "out": "*bf16", "lse": "*fp32", "part_out": "*fp32", "part_lse": "*fp32", "seq_lens": "*i32",
        "query_start_loc": "*i32",
    }  # fmt: skip
    constants = {
        "HEAD_DIM": 256, "DIMS": 256, "BLOCK_SIZE": 16, "TILE": 32, "SPLITS": 16, "RAGGED": False, "WINDOWED": False,
        "LSE": True, "UPCAST": False,
    }  # fmt: skip
    built = build(combine_kernel, types, constants, 4, 3)
    assert built.stack == 0
    assert built.registers <= 128


@pytest.mark.parametrize("name", ["write_kernel", "copy_kernel"])
def test_moves_are_wide(name):
    from attention.kernels import moves

    function = getattr(moves, name)
    pointers = dict.fromkeys(("k", "v", "k_cache", "v_cache", "cache"), "*i16")
    pointers |= {"slot_mapping": "*i64", "block_mapping": "*i64"}
    types = dict.fromkeys(function.arg_names, "i32") | pointers
    constants = {
        "KV_HEADS": 8, "ROWS": 32, "HEAD_DIM": 128, "DIMS": 128, "BLOCK_SIZE": 16, "STEP": 8, "FROM_DIM_STRIDE": 1,
        "K_DIM_STRIDE": 1, "V_DIM_STRIDE": 1, "WIDTH": 128, "COLUMNS": 128, "DIM_STRIDE": 1,
    }  # fmt: skip
    built = build(function, types, {key: value for key, value in constants.items() if key in types}, 4, 3)
    assert built.stack == 0
    assert not built.narrow_loads
    assert "v4.b32" in built.ptx
