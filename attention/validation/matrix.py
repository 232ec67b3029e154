"""The matrix: everything that paged attention is validated on, property by property.

All tables are shuffled, all slots without a token are not numbers, table entries behind the last block are -1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from attention.swap.swap_space import SwapSpace
from attention.validation.twin import Form, Problem, Twin

SHARPER = "queries x10"
"""The property whose bound is twice the error of torch's own attention, in float32 too."""

Found = Iterator[tuple[str, Problem]]


def matrix(dtype: torch.dtype, device: torch.device, *, small: bool = False) -> Found:
    """All problems with the property that each is for. To be solved one by one: the next may change the cache.

    `small` leaves one or two of each property, of short histories and narrow heads.
    """
    for name, form, query_lens, seq_lens in _batches(small):
        yield name, batch(form, query_lens, seq_lens, dtype, device)
    sizes = (16,) if small else (1, 5, 16, 64)
    for block_size in sizes:
        yield from _stories(_form(small, block_size=block_size, num_layers=2), dtype, device)


def batch(
    form: Form, query_lens: Sequence[int], seq_lens: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Problem:
    """Sequences of these lengths whose last tokens are queries."""
    num_blocks = sum(-(-length // form.block_size) for length in seq_lens) + 3
    twin = Twin(form, num_blocks, dtype, device, seed=len(seq_lens) + sum(seq_lens))
    seq_ids = twin.new(len(seq_lens))
    before = [length - query_len for query_len, length in zip(query_lens, seq_lens, strict=True)]
    old = [(seq_id, count) for seq_id, count in zip(seq_ids, before, strict=True) if count]
    if old:
        twin.append([seq_id for seq_id, _ in old], [count for _, count in old])
    return twin.append(seq_ids, list(query_lens))


def _form(small: bool, **options: float | None) -> Form:
    form = Form(num_heads=4, num_kv_heads=2, head_dim=32) if small else Form()
    return replace(form, **options)  # type: ignore[arg-type]


def _batches(small: bool) -> Iterator[tuple[str, Form, Sequence[int], Sequence[int]]]:
    """(property, form, query tokens, tokens) of batches that are written once."""
    for block_size in (1, 16) if small else (1, 2, 7, 16, 32, 100, 256):
        seq_lens = sorted({1, max(1, block_size - 1), block_size, block_size + 1, 2 * block_size + 3, 90})
        yield "block sizes", _form(small, block_size=block_size), [1] * len(seq_lens), seq_lens
        if block_size > 1:
            yield "block sizes", _form(small, block_size=block_size), [1, 5, 40], [1, block_size + 3, 90]
    for num_heads, num_kv_heads in (
        ((4, 4), (4, 1)) if small else ((1, 1), (8, 8), (8, 4), (12, 4), (6, 1), (32, 2))
    ):
        heads = _form(small, num_heads=num_heads, num_kv_heads=num_kv_heads)
        yield "GQA ratios", heads, [1, 1, 1], [1, 47, 130]
        yield "GQA ratios", heads, [3, 1, 20], [3, 47, 61]
    for head_dim in () if small else (32, 80, 128, 256):
        yield "head sizes", _form(small, head_dim=head_dim), [1, 1, 17], [1, 200, 50]
    seq_lens = [*range(1, 6 if small else 34), *(() if small else (500, 777, 2049))]
    yield "ragged lengths from 1", _form(small), [1] * len(seq_lens), seq_lens
    if not small:
        yield "ragged lengths from 1", _form(small, block_size=7), [1] * len(seq_lens), seq_lens
    for num_splits in (1, 3) if small else (1, 2, 7, 64):
        form = _form(small, num_kv_heads=1, num_splits=num_splits)
        yield "splits of a history", form, [1, 1, 1], [1, 90, 200 if small else 3000]
    chunks = ([5, 1, 17, 20], [5, 40, 33, 20])
    yield "prefill and chunks", _form(small), *chunks
    if not small:
        chunks = ([1, 130, 64, 1, 33, 16, 200], [1, 130, 320, 700, 34, 16, 777])
        for block_size in (1, 16, 48):
            yield "prefill and chunks", _form(small, block_size=block_size), *chunks
    for window in (5,) if small else (1, 7, 16, 64, 5000):
        form = _form(small, sliding_window=window)
        yield "sliding window", form, [1] * 4, [1, 16, 17, 70]
        yield "sliding window", form, [3, 1, 40], [3, 60, 70]
    capped: tuple[tuple[float, int | None], ...] = (
        ((5.0, None),) if small else ((5.0, None), (30.0, None), (0.5, 20))
    )
    for soft_cap, seen in capped:
        form = _form(small, soft_cap=soft_cap, sliding_window=seen)
        name = "soft-cap" if seen is None else "soft-cap in a window"
        yield name, form, [1] * 3, [1, 33, 70 if small else 600]
        yield name, form, [30, 1, 7], [30, 50, 70]
    for name, sharpness in (("queries x3", 3.0), (SHARPER, 10.0)):
        # the largest error of a handful of rows is luck, and here it is held against that of torch: many rows
        form = _form(small, sharpness=sharpness)
        seq_lens = list(range(3, 100, 8) if small else range(7, 600, 9))
        yield name, form, [1] * len(seq_lens), seq_lens
        yield name, form, [20, 30, 40], [20, 90, 130]
        if not small:
            form = replace(form, num_heads=16, num_kv_heads=4, head_dim=128)
            yield name, form, [1] * 8, [100, 500, 1000, 1500, 2000, 2500, 3000, 4000]
            yield name, form, [64, 100, 1], [64, 400, 900]


def _stories(form: Form, dtype: torch.dtype, device: torch.device) -> Found:
    """A family of sequences that share, part, leave for the host, come back, and are computed again."""
    size = form.block_size
    twin = Twin(form, 40 + 100 // size * 4, dtype, device)
    (parent,) = twin.new()
    twin.append([parent], 2 * size)
    family = [parent, twin.fork(parent), twin.fork(parent)]
    yield "shared blocks", twin.append(family, [1, size // 2 + 1, 2])
    family += [twin.fork(family[1]), twin.fork(family[2])]
    yield "after copy-on-write", twin.append(family, 1)
    twin.free([family.pop(1)])
    yield "after copy-on-write", twin.append(family, [1, 2, 3, 1])
    stranger = twin.new()
    yield "shared blocks", twin.append([*stranger, *family], 1)
    space = SwapSpace(twin.cache, num_host_blocks=twin.num_blocks)
    space.swap_out(family[:3])
    twin.spoil()
    twin.append(stranger, 2 * size)  # in blocks that just became free
    space.swap_in(family[:3])
    yield "after swap", twin.append([*stranger, *family], 1)
    yield "after swap", twin.append(family, [2, 1, size, 1])
    family[1] = twin.recompute(family[1], chunk=size + 1)
    twin.append(stranger, 1)
    yield "after recomputing", twin.append([*stranger, *family], [1, 1, 4, 1, 2])
