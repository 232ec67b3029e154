"""Tuning: times candidate configurations on the GPU at hand and writes the table that the kernels choose from.

`python -m attention.calibration.tuning --out FILE`. Each candidate runs over several shapes, many calls in one CUDA
graph, on caches that rotate beyond the L2; the best is the one with the least mean logarithm of time. Candidates are
compiled beforehand in several processes, which share Triton's cache on disk. The file holds the shipped entries and the
measured ones; put in the place of configurations.json, it counts from the next start on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from attention.calibration.measuring import Call, bandwidths, rotations, seconds
from attention.calibration.trials import Bench, Heads
from attention.call import AttentionCall
from attention.kernels.configurations import SHIPPED, Configuration, Key, configuration, key_of
from attention.kernels.launch import attend, refusal

SHARED_MEMORY = 232448
QUERY_HEADS = 32
CACHE_BYTES = 4 << 30

Timer = Callable[[Configuration], float]


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch of equal sequences: so many tokens each, of which the last `queries` are query tokens."""

    batch: int
    context: int
    queries: int = 1


SHAPES = {
    "decode": (Shape(1, 32768), Shape(8, 4096), Shape(32, 4096), Shape(128, 1024)),
    "prefill": (Shape(1, 8192, 8192), Shape(8, 1024, 1024), Shape(4, 8192, 512)),
}


def candidates(kind: str, head_dim: int, item_size: int) -> Iterator[Configuration]:
    """What is worth a try: what fits into shared memory, with at least 16 bytes a thread to load per tile."""
    full = item_size == 4
    tiles = (16, 32) if full else (32, 64, 128)
    rows = (
        (16, 32) if kind == "prefill" and full else (64, 128) if kind == "prefill" else (16 if full else 64,)
    )
    for tile, row, warps, stages in itertools.product(tiles, rows, (4, 8), (2, 3, 4, 5)):
        held = 2 * (stages - 1) * tile + row * (2 if kind == "prefill" else 1)
        if held * head_dim * item_size > SHARED_MEMORY or tile * head_dim * item_size < 512 * warps:
            continue
        if kind == "prefill" and row == 128 and warps == 4 and head_dim >= 128:  # spills
            continue
        yield Configuration(tile, row, warps, stages, 3 if kind == "decode" else 1)


def trial(bench: Bench, key: Key, shape: Shape, configuration: Configuration) -> list[Call]:
    """Calls of one shape with one configuration, over block tables that rotate beyond the L2."""
    heads = Heads(QUERY_HEADS, QUERY_HEADS // key.group, key.head_dim)
    k_cache, v_cache = bench.caches(key.block_size, heads)
    lengths = [shape.context] * shape.batch
    size = shape.batch * shape.context * heads.kv_values * bench.dtype.itemsize
    tables = bench.tables(lengths, key.block_size, len(k_cache), rotations(size, bench.device))
    q = bench.values(shape.batch * shape.queries, heads.num_heads, heads.head_dim)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=bench.device) * shape.queries
    call = AttentionCall(
        q=q, k_cache=k_cache, v_cache=v_cache, block_tables=tables[0],
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=bench.device),
        query_start_loc=starts if shape.queries > 1 else None, max_query_len=shape.queries,
        max_seq_len=shape.context, scale=1 / math.sqrt(heads.head_dim), sliding_window=None, soft_cap=None,
        num_splits=None, return_lse=False,
    )  # fmt: skip
    given = {"decode": configuration, "prefill": configuration}

    def one(table: torch.Tensor) -> Call:
        return lambda: attend(replace(call, block_tables=table), given)

    return [one(table) for table in tables]


def timer(bench: Bench, key: Key) -> Timer:
    """Geometric mean of the seconds per call over the shapes of the kind; infinite for what does not run."""
    token = 2 * QUERY_HEADS // key.group * key.head_dim * bench.dtype.itemsize
    shapes = [shape for shape in SHAPES[key.kind] if shape.batch * shape.context * token <= CACHE_BYTES]

    def measure(candidate: Configuration) -> float:
        try:
            times = [seconds(trial(bench, key, shape, candidate), bench.device) for shape in shapes]
        except Exception as error:  # such as Triton's OutOfResources, which is no error of ours
            print(f"  {candidate}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            return math.inf
        return math.exp(sum(map(math.log, times)) / len(times))

    return measure


def best(key: Key, tried: Sequence[Configuration], measure: Timer) -> tuple[Configuration, float, float]:
    """(fastest, its time, time of what is shipped): tiles and warps first, then programs per multiprocessor."""
    shipped = configuration(key)
    times = {candidate: measure(candidate) for candidate in dict.fromkeys([shipped, *tried])}
    fastest = min(times, key=times.__getitem__)
    if key.kind == "decode":
        for programs in (1, 2, 3, 4, 6):
            candidate = replace(fastest, programs_per_sm=programs)
            if candidate not in times:
                times[candidate] = measure(candidate)
        fastest = min(times, key=times.__getitem__)
    return fastest, times[fastest], times[shipped]


def compile_ahead(key: Key, candidate: Configuration) -> None:
    """Fill Triton's cache on disk; what does not compile is left for the timer to name."""
    bench = Bench(torch.device("cuda"), getattr(torch, key.dtype), 256 << 20)
    shapes = [Shape(1, 1024), Shape(512, 1)] if key.kind == "decode" else [Shape(1, 2, 2)]
    for shape in shapes:  # decode with splits, and without
        with contextlib.suppress(Exception):
            trial(bench, key, shape, candidate)[0]()


def merged(table: dict[str, Any], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A table with measured rows in the place of those with the same key."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(field.name) for field in fields(Key))

    new = {key(row) for row in measured}
    return table | {
        "configurations": [row for row in table["configurations"] if key(row) not in new] + list(measured)
    }


def written(table: dict[str, Any]) -> str:
    """A table as its file has it: one row a line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in table["configurations"])
    about = json.dumps(table.get("about", ""))
    return f'{{\n  "about": {about},\n  "configurations": [\n{rows}\n  ]\n}}\n'


def run(arguments: argparse.Namespace) -> int:
    """Tune everything asked for, within the time given; the file is written after every key."""
    reason = refusal(128, torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason is not None or not torch.cuda.is_available():
        print(f"tuning: {reason or 'it needs a GPU, and kernels that are not interpreted'}", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.seconds
    name = torch.cuda.get_device_name()
    copied, read = bandwidths(torch.device("cuda"))
    print(f"{name}: copies {copied / 1e12:.2f} TB/s, reads {read / 1e12:.2f} TB/s", flush=True)
    shapes = itertools.product(
        arguments.dtypes, arguments.head_dims, arguments.block_sizes, arguments.kinds, arguments.groups
    )
    keys = [key_of(kind, head_dim, dtype, group, block) for dtype, head_dim, block, kind, group in shapes]
    table = json.loads(SHIPPED.read_text(encoding="utf-8"))
    measured: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=spawn) as pool:
        for key in keys:
            if time.monotonic() > end:
                print(f"time is up: {len(keys) - len(measured)} of {len(keys)} keys are left as they are")
                break
            dtype = getattr(torch, key.dtype)
            tried = list(candidates(key.kind, key.head_dim, dtype.itemsize))
            list(pool.map(compile_ahead, [key] * len(tried), tried))
            bench = Bench(torch.device("cuda"), dtype, CACHE_BYTES)
            fastest, took, before = best(key, tried, timer(bench, key))
            print(f"{key}: {fastest}: {took * 1e6:.1f} us, shipped {before * 1e6:.1f} us", flush=True)
            notes = {"microseconds": round(took * 1e6, 1), "device": name}
            measured.append(asdict(key) | asdict(fastest) | notes)
            arguments.out.write_text(written(merged(table, measured)), encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m attention.calibration.tuning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table, written after every key")
    parser.add_argument("--kinds", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--groups", nargs="+", type=int, default=[4, 1, 8], help="query heads per KV head")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[16, 1, 32, 64, 128, 256])
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no key after so long")
    parser.add_argument(
        "--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile"
    )
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
