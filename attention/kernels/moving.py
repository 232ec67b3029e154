"""Launch of moves: `write` and `copy_blocks` of the functional layer on a GPU, without a look at any value.

Arguments are those of `attention.functional`, checked there. Everything may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attention.kernels import plan
from attention.kernels.configurations import power_of_two
from attention.kernels.launch import on

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TILE = 4096
"""Elements that a program moves at a time."""


def write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write K and V `[num_tokens, num_kv_heads, head_dim]` of tokens into their slots, in place, bit by bit.

    slot_mapping `[num_tokens]`; tokens whose slot is -1, or outside the cache, are dropped.
    """
    from attention.kernels.moves import write_kernel

    num_tokens, num_kv_heads, head_dim = k.shape
    if not k.numel():
        return
    if k.stride(2) != v.stride(2):
        k, v = k.contiguous(), v.contiguous()
    k, v, k_cache, v_cache = (bits(tensor) for tensor in (k, v, k_cache, v_cache))
    strides = [*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]]
    step = plan.step_of(strides, k.element_size())
    dims = power_of_two(head_dim)
    rows = min(power_of_two(num_kv_heads), max(1, TILE // dims))
    num_blocks, block_size = k_cache.shape[:2]
    with on(k.device):
        write_kernel[(num_tokens, -(-num_kv_heads // rows))](
            k, v, k_cache, v_cache, slot_mapping.contiguous(), num_blocks * block_size,
            *(stride // step for stride in strides), KV_HEADS=num_kv_heads, ROWS=rows, HEAD_DIM=head_dim, DIMS=dims,
            BLOCK_SIZE=block_size, STEP=step, FROM_DIM_STRIDE=k.stride(2), K_DIM_STRIDE=k_cache.stride(3),
            V_DIM_STRIDE=v_cache.stride(3), num_warps=4,
        )  # fmt: skip


def copy_blocks(caches: Sequence[Tensor], block_mapping: Tensor) -> None:
    """Copy blocks inside each cache `[num_blocks, ...]`, in place; block_mapping `[num_pairs, 2]`: source, target.

    Targets are different ones and none is a source: all pairs are copied at once. One launch does all tensors that
    are views of one storage at equal distances, such as the layers of a cache. Blocks outside a cache are skipped.
    Raises ValueError for a cache whose blocks are neither dense nor of three dimensions.
    """
    from attention.kernels.moves import copy_kernel

    if not len(block_mapping):
        return
    block_mapping = block_mapping.contiguous()
    for first, distance, count in runs([_rows(bits(cache)) for cache in caches if cache.numel()]):
        num_blocks, outer, inner, width = first.shape
        strides = [distance, *first.stride()[:3]]
        step = plan.step_of(strides, first.element_size())
        columns = min(power_of_two(width), TILE)
        rows = min(power_of_two(outer * inner), max(1, TILE // columns))
        with on(first.device):
            copy_kernel[(len(block_mapping), -(-outer * inner // rows), count)](
                first, block_mapping, num_blocks, outer * inner, inner, *(stride // step for stride in strides),
                WIDTH=width, ROWS=rows, COLUMNS=columns, STEP=step, DIM_STRIDE=first.stride(3), num_warps=4,
            )  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same size."""
    return tensor.view(BITS[tensor.element_size()])


def runs(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    """(first tensor, elements from one to the next, how many) of neighbours in one storage that are alike."""
    begin = 0
    while begin < len(tensors):
        first = tensors[begin]
        distance = 0
        end = begin + 1
        while end < len(tensors) and _alike(first, tensors[end]):
            gap = int(tensors[end].storage_offset()) - int(tensors[end - 1].storage_offset())
            if end > begin + 1 and gap != distance:
                break
            distance = gap
            end += 1
        yield first, distance, end - begin
        begin = end


def _alike(one: Tensor, other: Tensor) -> bool:
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype


def _rows(cache: Tensor) -> Tensor:
    """A cache of any shape as `[num_blocks, outer, inner, row]`."""
    if cache.dim() == 4:
        return cache
    if not cache[0].is_contiguous():
        raise ValueError(
            f"caches: got shape {list(cache.shape)} with strides {cache.stride()}, expected dense blocks"
        )
    return cache.as_strided((cache.shape[0], 1, 1, cache[0].numel()), (cache.stride(0), 0, 0, 1))
