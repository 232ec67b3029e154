"""`kvsim bench policies`: requests per CPU second of engines with their memory, beside vLLM V0's over plain pages."""

from __future__ import annotations

from pathlib import Path

from experiments.bench_sim import run
from experiments.text import table

REQUESTS = 10_000
RATE = 27.0

CHAT = (
    "workload.system_prompts={count: 64}",
    "workload.session={kind: conversation}",
    "workload.arrivals.rate=7",
)
"""Conversations behind shared system prompts, as many requests a second."""

GPT_OSS = ("model=gpt-oss-20b", "device=h100-80gb")

SMALL = ("num_blocks=262144",)
"""As many slots in blocks of one."""

CASES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("paged", "block_size: 16", "vllm_v0", ()),
    ("paged", "block_size: 16, prefix_caching: true", "vllm_v0", ()),
    ("prefix", "block_size: 16", "vllm_v1", ()),
    ("prefix", "block_size: 16", "aisimulate", ()),
    ("prefix", "block_size: 16", "sarathi", ()),
    ("prefix", "block_size: 16, windows: [null, 1024]", "vllm_v1", ()),
    ("prefix", "block_size: 16", "vllm_v1", GPT_OSS),
    ("jenga", "block_size: 16", "vllm_v1", GPT_OSS),
    ("radix", "block_size: 16", "sglang", ()),
    ("radix", "block_size: 1", "sglang", SMALL),
    ("token", "", "lightllm", SMALL),
    ("paged", "block_size: 16", "trtllm", ()),
    ("nano_vllm", "block_size: 16", "nano_vllm", ()),
    ("vattention", "", "vllm_v0", ("model=opt-13b", "device=a100-80gb")),
    ("prefix", "block_size: 16", "vllm_v1", CHAT),
    ("radix", "block_size: 16", "sglang", CHAT),
)

LOADS = {CHAT: "conversations", GPT_OSS: "lognormal, gpt-oss-20b"}


def bench_policies(folder: Path) -> str:
    """The table; prefix caching is on wherever an allocator has it."""
    rows = []
    first = 0.0
    for number, (allocator, fields, scheduler, sets) in enumerate(CASES):
        kind = f"allocator={{kind: {allocator}{', ' * bool(fields)}{fields}}}"
        chosen = (kind, f"scheduler={{kind: {scheduler}}}", *sets)
        figures = run(folder / str(number), REQUESTS, RATE, chosen)
        cpu = float(figures["cpu_s"])
        first = first or cpu
        load = LOADS.get(sets, "lognormal")
        rows.append(
            [
                f"{allocator}{': ' * bool(fields)}{fields}",
                scheduler,
                load,
                f"{figures['mean_running']:.0f}",
                f"{figures['prefix_hit_rate']:.2f}",
                f"{cpu:.2f}",
                f"{REQUESTS / cpu:,.0f}",
                f"{first / cpu:.2f}",
            ]
        )
    header = ["memory", "scheduler", "load", "batch", "hits", "CPU s", "requests/CPU-s", "speed ratio"]
    return table(f"whole runs of {REQUESTS:,} requests, {RATE:g} a second", header, rows)
