"""Launch: paged attention by the Triton kernels, and in words where they cannot run.

Nothing of Triton is imported before the first launch. No launch looks at a value on the device: it can be captured
in a CUDA graph, and a graph stays right for other lengths within the tables.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attention.call import AttentionCall
from attention.kernels import plan
from attention.kernels.configurations import Configuration, configuration, key_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Given = Mapping[str, Configuration] | None
LOG2_E = math.log2(math.e)
INTERPRETED_SMS = 132
"""Multiprocessors that the interpreter plays, those of an H100."""


def refusal(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot run for this head size and dtype on this device, in words; None where they can."""
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"its kernels take head sizes from 16 to 256 in steps of 8, got {head_dim}"
    if dtype not in DTYPES:
        return f"its kernels take {', '.join(map(str, DTYPES))}, got {dtype}"
    return absence(device)


def absence(device: torch.device) -> str | None:
    """Why no kernel, for whatever shape, can run on this device, in words; None where they can."""
    if not _installed():
        return "triton is not installed; the extra kvsim[triton] installs it"
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda":
        return f"it needs a GPU (or TRITON_INTERPRET=1, slow, for tests), got tensors on {device}"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, which runs kernels on tensors of the CPU, got tensors on a GPU"
    if torch.version.hip is not None:
        return "its kernels are made for GPUs of NVIDIA, got one of AMD"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its kernels need a GPU of compute capability 8.0 or later, got {major}.{minor}"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; it must be so before their modules are imported."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def attend(call: AttentionCall, configurations: Given = None) -> tuple[Tensor, Tensor | None]:
    """Attention as the call says, on its device.

    Sequences with one query token go through the split decode kernel, the others through the prefill kernel; a
    batch that may have both launches both, and each leaves the other's sequences alone. Rows of q that belong to
    no sequence are left undefined. `configurations`, by kind, replace those of the shipped table.

    Returns (out, lse): out as q, contiguous; lse `[num_tokens, num_heads]`, float32, or None where not asked for.
    """
    call = _dense(call)
    num_tokens, num_heads, head_dim = call.q.shape
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=call.q.dtype, device=call.q.device)
    lse = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=call.q.device)
    if num_tokens and len(call.seq_lens):
        with on(call.q.device):
            if call.query_start_loc is None or call.max_query_len <= 1:
                _decode(call, out, lse, configurations)
            else:
                uniform = num_tokens == len(call.seq_lens) * call.max_query_len  # then nobody has one token
                if not uniform:
                    _decode(call, out, lse, configurations)
                _prefill(call, out, lse, configurations, mixed=not uniform)
    return out, lse if call.return_lse else None


def _decode(call: AttentionCall, out: Tensor, lse: Tensor, given: Given) -> None:
    from attention.kernels.combine import combine_kernel
    from attention.kernels.decode import decode_kernel

    strides, layout = _layout(call)
    chosen, sizes = _chosen("decode", call, layout, given)
    _, num_heads, head_dim = call.q.shape
    num_seqs, max_blocks = call.block_tables.shape
    programs_per_seq = call.k_cache.shape[2] * -(-sizes["GROUP"] // sizes["HEADS"])
    window = call.sliding_window or 0
    splits = call.num_splits
    if splits is None:
        longest = min(call.max_seq_len, window or call.max_seq_len)
        sms = num_sms(call.q.device)
        splits = plan.num_splits(num_seqs * programs_per_seq, longest, sms, chosen.programs_per_sm)
    direct = splits == 1
    part_out, part_lse = out, lse
    if not direct:
        shape = num_seqs, num_heads, splits
        part_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=out.device)
        part_lse = torch.empty(shape, dtype=torch.float32, device=out.device)
    ragged = call.query_start_loc is not None
    starts = call.query_start_loc if ragged else call.seq_lens  # read only where ragged
    flags = {"RAGGED": ragged, "WINDOWED": window > 0, "LSE": call.return_lse}
    decode_kernel[(splits, programs_per_seq, num_seqs)](
        out, lse, part_out, part_lse, *_operands(call), starts, *_scales(call), window, splits, num_heads,
        max_blocks, *strides, **sizes, **layout, **flags, DIRECT=direct,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    if not direct:
        sizes = {name: sizes[name] for name in ("HEAD_DIM", "DIMS", "BLOCK_SIZE", "TILE")}
        combine_kernel[(num_heads, num_seqs)](
            out, lse, part_out, part_lse, call.seq_lens, starts, window, splits, max_blocks, **sizes, **flags,
            SPLITS=16, UPCAST=layout["UPCAST"], num_warps=4 if head_dim > 64 else 2,
        )  # fmt: skip


def _prefill(call: AttentionCall, out: Tensor, lse: Tensor, given: Given, *, mixed: bool) -> None:
    from attention.kernels.prefill import prefill_kernel

    strides, layout = _layout(call)
    chosen, sizes = _chosen("prefill", call, layout, given)
    num_tokens, num_heads, _ = call.q.shape
    num_seqs, max_blocks = call.block_tables.shape
    pieces = num_tokens // sizes["QUERIES"] + num_seqs
    programs_per_piece = call.k_cache.shape[2] * -(-sizes["GROUP"] // sizes["HEADS"])
    window = call.sliding_window or 0
    prefill_kernel[(pieces, programs_per_piece)](
        out, lse, *_operands(call), call.query_start_loc, *_scales(call), window, num_seqs, num_heads, max_blocks,
        *strides, **sizes, **layout, MIXED=mixed, WINDOWED=window > 0, LSE=call.return_lse,
        SEQS=128, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip


def _chosen(
    kind: str, call: AttentionCall, layout: dict[str, int | bool], given: Given
) -> tuple[Configuration, dict[str, int]]:
    """(configuration, sizes to compile for)."""
    _, block_size, num_kv_heads, head_dim = call.k_cache.shape
    group = call.q.shape[1] // num_kv_heads
    chosen = (given or plan.UNALIGNED)[kind]
    wide = (
        layout["STEP"] * call.q.element_size() == 16 and layout["K_DIM_STRIDE"] == layout["V_DIM_STRIDE"] == 1
    )
    if (
        given is None
        and wide
        and all(tensor.data_ptr() % 16 == 0 for tensor in (call.q, call.k_cache, call.v_cache))
    ):
        chosen = chosen_for(kind, head_dim, call.q.dtype, group, block_size, call.q.device)
    return chosen, plan.constants(kind, chosen, head_dim=head_dim, group=group, block_size=block_size)


@functools.lru_cache(maxsize=256)
def chosen_for(
    kind: str, head_dim: int, dtype: torch.dtype, group: int, block_size: int, device: torch.device
) -> Configuration:
    """The configuration of the shipped table that a call on this device runs with."""
    name = str(dtype).removeprefix("torch.")
    found = configuration(key_of(kind, head_dim, name, group, block_size))
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 232448)
    return plan.fitted(found, head_dim=head_dim, item_size=dtype.itemsize, shared_memory=shared_memory)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where Triton launches: it takes the current device, whatever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _dense(call: AttentionCall) -> AttentionCall:
    """The call with a scale above 0, dense rows of q and dense index tensors, all small; caches stay as they are."""
    q, tables, starts = call.q, call.block_tables, call.query_start_loc
    if call.scale <= 0:
        q = q * (-1 if call.scale else 0)
    return replace(
        call,
        q=q if q.stride(2) == 1 else q.contiguous(),
        scale=abs(call.scale) or 1.0,
        block_tables=tables if tables.stride(1) == 1 else tables.contiguous(),
        seq_lens=call.seq_lens.contiguous(),
        query_start_loc=None if starts is None else starts.contiguous(),
    )


def _operands(call: AttentionCall) -> tuple[Tensor, ...]:
    return call.q, call.k_cache, call.v_cache, call.block_tables, call.seq_lens


def _scales(call: AttentionCall) -> tuple[float, float]:
    """scale and soft_cap as `softmax.scores_of` takes them."""
    if call.soft_cap is None:
        return call.scale * LOG2_E, 0.0
    return call.scale / call.soft_cap, call.soft_cap * LOG2_E


def _layout(call: AttentionCall) -> tuple[list[int], dict[str, int | bool]]:
    """(strides as the kernels take them, constants that follow from strides, dtype and cap)."""
    strides = [*call.q.stride()[:2], *call.k_cache.stride()[:3], *call.v_cache.stride()[:3]]
    step = plan.step_of(strides, call.q.element_size())
    widest = max(
        sum((size - 1) * stride for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True))
        for cache in (call.k_cache, call.v_cache)
    )
    constants = {
        "STEP": step,
        "WIDE": widest >= 2**31,
        "K_DIM_STRIDE": call.k_cache.stride(3),
        "V_DIM_STRIDE": call.v_cache.stride(3),
        "CAPPED": call.soft_cap is not None,
        "UPCAST": call.q.dtype == torch.bfloat16 and interpreted(),
    }
    return [call.block_tables.stride(0), *(stride // step for stride in strides)], constants
