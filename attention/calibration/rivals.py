"""Rivals: other ways to attend over a KV cache, to be timed beside the project's own.

Each is a class with the name that a table shows, `refusal`, which says in words why it cannot run here (None where
it can), and `calls`, ready to be timed, all for decodes of equally long sequences.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from attention.calibration.measuring import Call, rotations
from attention.calibration.trials import Bench, Heads

WORKSPACE = 128 << 20
"""Bytes that FlashInfer asks for."""


class Rival(Protocol):
    """Something to compare with."""

    name: str
    paged: bool
    capturable: bool

    def refusal(self, bench: Bench, block_size: int) -> str | None:
        """Why it cannot run there, None if it can."""

    def calls(self, bench: Bench, batch: int, context: int, block_size: int, heads: Heads) -> list[Call]:
        """Decode attention, each call over other memory."""


class Contiguous:
    """Plain scaled_dot_product_attention on K and V that lie in one piece, [batch, num_kv_heads, context, head_dim].

    Query heads that share a KV head stand in the place of query positions, the fastest form of it.
    """

    name = "SDPA"
    paged = False
    capturable = True

    def refusal(self, bench: Bench, block_size: int) -> str | None:
        """It always can."""
        return None

    def calls(self, bench: Bench, batch: int, context: int, block_size: int, heads: Heads) -> list[Call]:
        """K and V are parts of the pool."""
        group = heads.num_heads // heads.num_kv_heads
        q = bench.values(batch, heads.num_kv_heads, group, heads.head_dim)
        attend = torch.nn.functional.scaled_dot_product_attention

        def call(k: Tensor, v: Tensor) -> Call:
            return lambda: attend(q, k, v)

        return [call(k, v) for k, v in pieces(bench, batch, context, heads)]


class Flex:
    """flex_attention, compiled, on K and V that lie in one piece; nothing is masked."""

    name = "flex_attention"
    paged = False
    capturable = True

    def refusal(self, bench: Bench, block_size: int) -> str | None:
        """It needs a compiler."""
        if bench.device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
            return "torch.compile needs a C++ compiler on a CPU"
        if bench.device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "torch.compile needs triton on a GPU"
        return None

    def calls(self, bench: Bench, batch: int, context: int, block_size: int, heads: Heads) -> list[Call]:
        """Compiled for this very shape."""
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        q = bench.values(batch, heads.num_heads, 1, heads.head_dim)
        grouped = heads.num_heads != heads.num_kv_heads

        def call(k: Tensor, v: Tensor) -> Call:
            return lambda: compiled(q, k, v, enable_gqa=grouped)

        return [call(k, v) for k, v in pieces(bench, batch, context, heads)]


class Varlen:
    """torch.nn.attention.varlen.varlen_attn through block tables."""

    name = "varlen_attn"
    paged = True
    capturable = True

    def refusal(self, bench: Bench, block_size: int) -> str | None:
        """It needs a GPU, half precision, and a torch that has block tables."""
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return f"torch {torch.__version__} does not have it"
        if "block_table" not in inspect.signature(varlen_attn).parameters:
            return f"that of torch {torch.__version__} takes no block tables"
        if bench.device.type != "cuda":
            return "it runs on GPUs only"
        if bench.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes half precision only, got {bench.dtype}"
        return None

    def calls(self, bench: Bench, batch: int, context: int, block_size: int, heads: Heads) -> list[Call]:
        """Through random block tables."""
        from torch.nn.attention.varlen import varlen_attn

        k, v = bench.caches(block_size, heads)
        q = bench.values(batch, heads.num_heads, heads.head_dim)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=bench.device)
        lens = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
        options: dict[str, Any] = {"seqused_k": lens}
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # elsewhere it finds out by itself
            options["enable_gqa"] = heads.num_heads != heads.num_kv_heads

        def call(table: Tensor) -> Call:
            return lambda: varlen_attn(q, k, v, starts, None, 1, context, block_table=table, **options)

        return [call(table) for table in tables(bench, batch, context, block_size, heads)]


class FlashInfer:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper, planned beforehand; on tensor cores where heads are grouped."""

    name = "FlashInfer"
    paged = True
    capturable = True

    def refusal(self, bench: Bench, block_size: int) -> str | None:
        """It is a package of its own, for GPUs."""
        if bench.device.type != "cuda":
            return "it runs on GPUs only"
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed (pip install flashinfer-python)"
        return None

    def calls(self, bench: Bench, batch: int, context: int, block_size: int, heads: Heads) -> list[Call]:
        """A wrapper for each block table, as its plan belongs to one."""
        flashinfer = importlib.import_module("flashinfer")

        caches = bench.caches(block_size, heads)
        q = bench.values(batch, heads.num_heads, heads.head_dim)
        blocks = -(-context // block_size)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=bench.device) * blocks
        last = torch.full(
            (batch,), context - (blocks - 1) * block_size, dtype=torch.int32, device=bench.device
        )

        def call(table: Tensor) -> Call:
            workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=bench.device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=heads.num_heads >= 4 * heads.num_kv_heads
            )
            wrapper.plan(
                starts, table.flatten(), last, heads.num_heads, heads.num_kv_heads, heads.head_dim, block_size,
                q_data_type=bench.dtype, kv_data_type=bench.dtype,
            )  # fmt: skip
            return lambda: wrapper.run(q, caches)

        return [call(table) for table in tables(bench, batch, context, block_size, heads)[:8]]


RIVALS: tuple[Rival, ...] = (Contiguous(), Varlen(), FlashInfer(), Flex())


def pieces(bench: Bench, batch: int, context: int, heads: Heads) -> Sequence[tuple[Tensor, Tensor]]:
    """K and V [batch, num_kv_heads, context, head_dim] in one piece each, several that share no memory."""
    shape = (batch, heads.num_kv_heads, context, heads.head_dim)
    flat = [cache.flatten() for cache in bench.caches(1, heads)]
    size = batch * context * heads.kv_values // 2
    number = min(rotations(2 * size * bench.dtype.itemsize, bench.device), len(flat[0]) // size)
    return [
        (
            flat[0][index * size : (index + 1) * size].view(shape),
            flat[1][index * size : (index + 1) * size].view(shape),
        )
        for index in range(number)
    ]


def tables(bench: Bench, batch: int, context: int, block_size: int, heads: Heads) -> list[Tensor]:
    """Random block tables for sequences of one length, one for each turn of a rotation."""
    num_blocks = len(bench.caches(block_size, heads)[0])
    size = batch * context * heads.kv_values * bench.dtype.itemsize
    return bench.tables([context] * batch, block_size, num_blocks, rotations(size, bench.device))
