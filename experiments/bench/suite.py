"""Benchmarks: `kvsim bench`, each a table with ratios."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from sim.errors import UserError
from sim.registry import nearest


def run_bench(name: str | None) -> int:
    """Run one benchmark, or all; 0 if done. Raises UserError for an unknown name."""
    from experiments.bench.attention import bench_attention
    from experiments.bench.beams import bench_beams
    from experiments.bench.paper import bench_paper
    from experiments.bench.policies import bench_policies
    from experiments.bench.sim import bench_sim

    benches: dict[str, Callable[[Path], str]] = {
        "sim": bench_sim,
        "policies": bench_policies,
        "paper": bench_paper,
        "attention": bench_attention,
        "beams": bench_beams,
    }
    if name is not None and name not in benches:
        near = nearest(name, list(benches))
        hint = f", did you mean {near!r}?" if near else ""
        raise UserError(f"unknown benchmark: got {name!r}, expected one of {', '.join(benches)}{hint}")
    for chosen in [name] if name else benches:
        with tempfile.TemporaryDirectory(prefix="kvsim-bench-") as folder:
            print(benches[chosen](Path(folder)), flush=True)
    return 0
