"""Swapping: KV blocks move to host memory and back, as functions over caches and for the sequences of a cache.

Preemption by swapping is that of vLLM (Kwon et al., 2023, section 4.5): all blocks of a sequence leave together
and come back together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.checks import INTEGERS, check_shape
from attention.swap.block_copies import CopyStream, batches, from_host, index, staging_bytes, to_host


def swap_out(
    caches: Sequence[Tensor],
    host_caches: Sequence[Tensor],
    block_mapping: Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Copy blocks of the device's caches into those of the host, the same blocks of each.

    On a GPU the copies run on `stream` behind the compute that was started before; compute started later waits
    until the blocks are gathered, so they may be written again at once. The host's numbers are there after
    `stream.synchronize()`, or for a `swap_in` on the same stream.

    Args:
        caches: Each `[num_blocks, block_size, num_kv_heads, head_dim]`: K and V of every layer, in any order.
        host_caches: As many, each `[num_host_blocks, ...]`, pinned if copies shall not hold up the host.
        block_mapping: `[n, 2]`, int32 or int64, best on the CPU: (block of the device, block of the host).
        stream: Where copies run; by default on the current stream.

    Raises ValueError for shapes and types that do not go together, blocks that are not there, and targets that
    stand twice.
    """
    pairs = _check(caches, host_caches, block_mapping, out=True)
    if not pairs:
        return
    device = caches[0].device
    copies = CopyStream(device, stream)
    copies.wait_for_compute()
    size = sum(cache[0].nbytes for cache in caches)
    for batch in batches(len(pairs), size, staging_bytes(device)):
        with copies.running():
            sources = index([source for source, _ in pairs[batch]], device)
            staged = copies.staged(cache.index_select(0, sources) for cache in caches)
        if batch.stop == len(pairs):
            copies.hold_compute()
        with copies.running():
            for values, host in zip(staged, host_caches, strict=True):
                to_host(values, host, [target for _, target in pairs[batch]])


def swap_in(
    caches: Sequence[Tensor],
    host_caches: Sequence[Tensor],
    block_mapping: Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Copy blocks of the host's caches into those of the device; arguments and errors as `swap_out`.

    `block_mapping` is (block of the host, block of the device). On a GPU the way over the link may overlap with
    compute that was started before; only the scattering into the caches waits for it, and compute started later
    waits for everything.
    """
    pairs = _check(caches, host_caches, block_mapping, out=False)
    if not pairs:
        return
    device = caches[0].device
    copies = CopyStream(device, stream)
    size = sum(cache[0].nbytes for cache in caches)
    for batch in batches(len(pairs), size, staging_bytes(device)):
        sources = [source for source, _ in pairs[batch]]
        with copies.running():
            staged = copies.staged(
                _fetched(cache, host, sources) for cache, host in zip(caches, host_caches, strict=True)
            )
        copies.wait_for_compute()
        with copies.running():
            targets = index([target for _, target in pairs[batch]], device)
            for values, cache in zip(staged, caches, strict=True):
                cache.index_copy_(0, targets, values)
    copies.hold_compute()


def _fetched(cache: Tensor, host: Tensor, blocks: Sequence[int]) -> Tensor:
    """Blocks of the host, on the device of a cache."""
    values = cache.new_empty((len(blocks), *cache.shape[1:]))
    from_host(host, values, blocks)
    return values


def _check(
    caches: Sequence[Tensor], host_caches: Sequence[Tensor], block_mapping: Tensor, *, out: bool
) -> list[tuple[int, int]]:
    """The pairs of the mapping, by their target, so that neighbours on the host's side stand together."""
    if len(caches) != len(host_caches):
        raise ValueError(f"host_caches: got {len(host_caches)}, expected {len(caches)} as caches")
    for number, (cache, host) in enumerate(zip(caches, host_caches, strict=True)):
        check_shape(f"host_caches[{number}]", host, ("num_host_blocks", *cache.shape[1:]))
        if host.dtype != cache.dtype:
            raise ValueError(f"host_caches[{number}]: got {host.dtype}, expected {cache.dtype} as the cache")
        if host.device.type != "cpu":
            raise ValueError(f"host_caches[{number}]: got it on {host.device}, expected it on cpu")
        if cache.device != caches[0].device:
            raise ValueError(f"caches[{number}]: got it on {cache.device}, expected {caches[0].device}")
    check_shape("block_mapping", block_mapping, ("n", 2))
    if block_mapping.dtype not in INTEGERS:
        raise ValueError(f"block_mapping: got {block_mapping.dtype}, expected torch.int32 or torch.int64")
    pairs: list[tuple[int, int]] = [(source, target) for source, target in block_mapping.tolist()]
    sides = (caches, host_caches) if out else (host_caches, caches)
    for column, side in enumerate(sides):
        limit = min((len(cache) for cache in side), default=0)
        for row, pair in enumerate(pairs):
            if not 0 <= pair[column] < limit:
                raise ValueError(
                    f"block_mapping[{row}, {column}]: got {pair[column]}, expected 0 to {limit - 1}"
                )
    if len({target for _, target in pairs}) < len(pairs):
        raise ValueError("block_mapping: a target stands twice")
    return sorted(pairs, key=lambda pair: pair[1 if out else 0])
