"""`kvsim hit-rate`: what prefix caches of several sizes would find in a trace, by order of eviction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.text import table
from sim.errors import UserError
from sim.prefixes.eviction import eviction
from sim.prefixes.hit_rate import hit_rate, infinite_hit_rate
from sim.registry import UnknownKind
from workloads.traces import trace_format

CAPACITIES = (1_000, 5_000, 10_000, 20_000, 30_000, 50_000, 100_000)
EVICTIONS = ("lru", "fifo", "lfu", "belady")


def run_hit_rate(trace: Path, kind: str, capacities: Sequence[int], evictions: Sequence[str]) -> str:
    """A row for each order of eviction, a column for each capacity in blocks of the trace's own size."""
    try:
        orders = {name: eviction[name] for name in evictions or EVICTIONS}
        reader = trace_format[kind]()
    except UnknownKind as error:
        raise UserError(str(error)) from error
    except TypeError as error:
        raise UserError(f"trace format {kind} names no content, expected one with hash ids") from error
    sizes = capacities or CAPACITIES
    prompts: list[tuple[int, ...]] = []
    for part in reader.read(trace):
        if part.content is None:
            raise UserError(f"{trace}: trace format {kind} names no content, expected one with hash ids")
        prompts += part.content
    rows = [
        [name, *(f"{hit_rate(prompts, capacity, order):.4f}" for capacity in sizes)]
        for name, order in orders.items()
    ]
    title = (
        f"prefix hit rate by blocks of {reader.content_grain} tokens, {len(prompts):,} requests, "
        f"infinite cache {infinite_hit_rate(prompts):.4f}"
    )
    return table(title, ["eviction", *(f"{capacity:,}" for capacity in sizes)], rows)
