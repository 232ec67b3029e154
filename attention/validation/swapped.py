"""What must hold of swapped sequences: back to the bit, or within the bound of their quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attention.swap.grids import GRIDS
from attention.swap.quantization import Quantization
from attention.swap.swap_space import SwapSpace
from attention.validation.twin import Form, Twin

FORM = Form(block_size=8, num_heads=4, num_kv_heads=2, head_dim=32, num_layers=2)


def swapped(
    dtype: torch.dtype, device: torch.device, among: Mapping[str, Callable[..., Any]]
) -> Iterator[tuple[str, str, float, float]]:
    """(property, implementation, error, bound) of sequences that left for the host and came back elsewhere."""
    twin, family, space = _away(dtype, device, None)
    problem = twin.append(family, [1, 3, 1])
    before = {name: attend(**problem.arguments) for name, attend in among.items()}
    _there_and_back(twin, family, space)
    again = twin.again(family, problem)
    for name, attend in among.items():
        after = attend(**again.arguments)
        yield "after swap, the same to the bit", name, _difference(after, before[name]), 0.0
    for seq_id in family:
        for layer in twin.layers:
            stored = stored_rows(twin, seq_id, layer)
            kept = torch.stack(twin.histories[seq_id][layer])
            yield "swapped K and V, the same to the bit", "-", _difference(stored, kept), 0.0
    for name in GRIDS:
        try:
            quantization = Quantization.named(name)
        except ValueError:  # torch has no such type
            continue
        twin, family, space = _away(dtype, device, quantization)
        _there_and_back(twin, family, space)
        for seq_id in family:
            for layer in twin.layers:
                kept = torch.stack(twin.histories[seq_id][layer])
                errors = (stored_rows(twin, seq_id, layer).double() - kept.double()).abs()
                bounds = quantization.bound(kept, quantization.quantize(kept))
                place = int((errors / bounds).nan_to_num(torch.inf).argmax())
                pair = float(errors.flatten()[place]), float(bounds.flatten()[place])
                yield f"swapped K and V in {name}", "-", *pair


def stored_rows(twin: Twin, seq_id: int, layer: int) -> Tensor:
    """K and V of a sequence in the cache, `[2, seq_len, num_kv_heads, head_dim]`."""
    blocks = twin.cache.block_table(seq_id)
    twin.cache.in_flight.hold(read=blocks)
    table = torch.tensor(blocks, dtype=torch.int64, device=twin.device)
    both = torch.stack([cache[layer][table].flatten(0, 1) for cache in (twin.cache.k, twin.cache.v)])
    return both[:, : twin.cache.length(seq_id)]


def _away(
    dtype: torch.dtype, device: torch.device, quantization: Quantization | None
) -> tuple[Twin, list[int], SwapSpace]:
    """Sequences that share blocks, one of which was copied on write, and room to swap them."""
    twin = Twin(FORM, 40, dtype, device)
    (parent,) = twin.new()
    twin.append([parent], 50)
    family = [parent, twin.fork(parent), twin.fork(parent)]
    twin.append(family, [2, 9, 1])
    return twin, family, SwapSpace(twin.cache, 40, quantization=quantization)


def _there_and_back(twin: Twin, family: list[int], space: SwapSpace) -> None:
    """Others take, and free what is free is spoiled, before the family comes back."""
    tables = [twin.cache.block_table(seq_id) for seq_id in family]
    space.swap_out(family)
    twin.spoil()
    twin.append(twin.new(), 8 * FORM.block_size)
    space.swap_in(family[::-1])
    assert tables != [twin.cache.block_table(seq_id) for seq_id in family]


def _difference(got: Tensor, expected: Tensor) -> float:
    if torch.equal(got, expected):
        return 0.0
    return float((got.double() - expected.double()).abs().nan_to_num(torch.inf).max())
