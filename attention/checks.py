"""Checks of arguments: every mistake names the argument, what it got, and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.runs import breach

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)

Shape = tuple[int | str, ...]
"""Sizes of a tensor; a name stands for any."""


def check_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    """Raises ValueError unless the tensor has this shape."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [{', '.join(map(str, shape))}]")


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises ValueError unless both are a cache of the same shape, dtype and device."""
    check_shape("k_cache", k_cache, ("num_blocks", "block_size", "num_kv_heads", "head_dim"))
    if k_cache.dtype not in DTYPES:
        raise ValueError(f"k_cache: got {k_cache.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if not all(k_cache.shape[1:]):
        raise ValueError(f"k_cache: got shape {list(k_cache.shape)}, expected sizes of at least 1")
    check_like("v_cache", v_cache, tuple(k_cache.shape), k_cache)


def check_like(name: str, tensor: Tensor, shape: Shape, cache: Tensor) -> None:
    """Raises ValueError unless values have this shape and the dtype and device of a cache."""
    check_shape(name, tensor, shape)
    if tensor.dtype != cache.dtype:
        raise ValueError(f"{name}: got {tensor.dtype}, expected {cache.dtype} as k_cache")
    _check_device(name, tensor, cache)


def check_index(name: str, tensor: Tensor, shape: Shape, cache: Tensor) -> None:
    """Raises ValueError unless integers have this shape and the device of a cache."""
    check_shape(name, tensor, shape)
    if tensor.dtype not in INTEGERS:
        raise ValueError(f"{name}: got {tensor.dtype}, expected torch.int32 or torch.int64")
    _check_device(name, tensor, cache)


def _check_device(name: str, tensor: Tensor, cache: Tensor) -> None:
    if tensor.device != cache.device:
        raise ValueError(f"{name}: got it on {tensor.device}, expected it on {cache.device} as k_cache")


def check_tables(block_tables: Tensor, seq_lens: Tensor, k_cache: Tensor) -> None:
    """Raises ValueError if a history leaves its table, or a table entry that is read leaves the cache."""
    num_blocks, block_size = k_cache.shape[:2]
    room = block_tables.shape[1] * block_size
    row = first(seq_lens.lt(0) | seq_lens.gt(room))
    if row is not None:
        raise ValueError(
            f"seq_lens[{row[0]}]: got {int(seq_lens[row])}, expected 0 to {room}, "
            f"{block_tables.shape[1]} blocks of {block_size} slots"
        )
    columns = torch.arange(block_tables.shape[1], device=block_tables.device)
    used = columns * block_size < seq_lens[:, None]
    place = first(used & (block_tables.lt(0) | block_tables.ge(num_blocks)))
    if place is not None:
        raise ValueError(
            f"block_tables[{place[0]}, {place[1]}]: got {int(block_tables[place])}, "
            f"expected 0 to {num_blocks - 1}"
        )


def check_runs(block_tables: Tensor, seq_lens: Tensor, k_cache: Tensor, run: int) -> None:
    """Raises ValueError if a table is not made of aligned runs of so many blocks."""
    place = breach(block_tables, seq_lens, k_cache, run) if run > 1 else None
    if place is not None:
        row, column = place
        begin = column // run * run
        raise ValueError(
            f"block_tables[{row}, {column}]: got {int(block_tables[row, column])}, expected an aligned run of {run} "
            f"blocks (run_blocks) from {int(block_tables[row, begin])} at [{row}, {begin}] on"
        )


def check_queries(query_start_loc: Tensor, seq_lens: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless the rows of q are shared out to the sequences, each at most as long as it is."""
    ends = int(query_start_loc[0]), int(query_start_loc[-1])
    if ends != (0, num_tokens):
        raise ValueError(
            f"query_start_loc: got {ends[0]} to {ends[1]}, expected 0 to {num_tokens}, the tokens of q"
        )
    lengths = query_start_loc.diff()
    row = first(lengths.lt(0) | lengths.gt(seq_lens))
    if row is not None:
        raise ValueError(
            f"query_start_loc[{row[0]}:{row[0] + 2}]: got {int(lengths[row])} query tokens, "
            f"expected 0 to {int(seq_lens[row])}, as seq_lens[{row[0]}]"
        )


def check_slots(slot_mapping: Tensor, k_cache: Tensor) -> None:
    """Raises ValueError for slots outside the cache, and for one that is told twice; -1 is allowed."""
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    row = first(slot_mapping.lt(-1) | slot_mapping.ge(num_slots))
    if row is not None:
        raise ValueError(
            f"slot_mapping[{row[0]}]: got slot {int(slot_mapping[row])}, expected -1 to {num_slots - 1}"
        )
    ordered = slot_mapping.sort().values
    row = first((ordered[1:] == ordered[:-1]) & ordered[1:].ge(0))
    if row is not None:
        raise ValueError(f"slot_mapping: got slot {int(ordered[row])} twice, expected different slots")


def check_bound(name: str, bound: int | None, actual: int) -> int:
    """An upper bound, which is the actual value where none was given. Raises ValueError if it is none."""
    if bound is None:
        return actual
    if bound < actual:
        raise ValueError(f"{name}: got {bound}, expected at least {actual}")
    return bound


def first(wrong: Tensor) -> tuple[int, ...] | None:
    """Where the first true value is."""
    if not wrong.any():
        return None
    return tuple(torch.nonzero(wrong)[0].tolist())
