"""`kvsim bench policies`: sequences per CPU second of engines and of techniques, beside vLLM V0 over plain pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.bench.sim import run
from experiments.text import table

SEQUENCES = 10_000
RATE = 27.0

CHAT = (
    "workload.system_prompts={count: 64}",
    "workload.session={kind: conversation}",
    "workload.arrivals.rate=7",
)
"""Conversations behind shared system prompts, as many requests a second."""

HOST = ("tiers=[{kind: host, num_blocks: 65536}]",)
BEYOND = ("tiers=[{kind: host, num_blocks: 8192}, {kind: nvme, num_blocks: 65536}]",)
"""A host so small that nearly all that it gets goes on."""

GPT_OSS = ("model=gpt-oss-20b", "device=h100-80gb")
OPT = ("model=opt-13b", "device=a100-80gb")

SMALL = ("num_blocks=262144",)
"""As many slots in blocks of one."""

SHORT = ("num_blocks=2200",)
"""Memory that makes one request in three give way."""


@dataclass(frozen=True, slots=True)
class Case:
    """A server and its load; of requests with several branches so many fewer come."""

    memory: str
    scheduler: str
    load: str = "lognormal"
    sets: tuple[str, ...] = ()
    branches: int = 1

    def settings(self) -> tuple[str, ...]:
        """As of `kvsim run --set`."""
        return (
            f"allocator={{kind: {self.memory}}}",
            f"scheduler={{kind: {self.scheduler}}}",
            *(() if self.branches == 1 else (f"workload.arrivals.rate={RATE / self.branches:g}",)),
            *self.sets,
        )


CASES = (
    Case("paged", "vllm_v0"),
    Case("paged, prefix_caching: true", "vllm_v0"),
    Case("prefix", "vllm_v1"),
    Case("prefix", "aisimulate"),
    Case("prefix", "sarathi"),
    Case("prefix, windows: [null, 1024]", "vllm_v1"),
    Case("prefix", "vllm_v1", "lognormal, gpt-oss-20b", GPT_OSS),
    Case("jenga", "vllm_v1", "lognormal, gpt-oss-20b", GPT_OSS),
    Case("radix, block_size: 16", "sglang"),
    Case("radix", "sglang", sets=SMALL),
    Case("token", "lightllm", sets=SMALL),
    Case("paged", "trtllm"),
    Case("nano_vllm", "nano_vllm"),
    Case("vattention", "vllm_v0", sets=OPT),
    Case("multi_size", "vllm_v0"),
    Case("adaptive", "vllm_v0"),
    Case("multi_size, prefix_caching: true", "vllm_v1"),
    Case("adaptive, prefix_caching: true", "vllm_v1"),
    Case("prefix", "vllm_v1", "lognormal, a host tier", HOST),
    Case("prefix", "vllm_v1", "lognormal, host and NVMe", BEYOND),
    Case("prefix", "vllm_v1", "conversations", CHAT),
    Case("radix, block_size: 16", "sglang", "conversations", CHAT),
    Case("prefix", "vllm_v1", "conversations, a host tier", (*CHAT, *HOST)),
    *(
        Case("paged", "vllm_v0", f"{name} of {width}", (f"workload.sampling={{{field}: {width}}}",), width)
        for name, field in (("samples", "n"), ("beams", "beam_width"))
        for width in (2, 4, 6)
    ),
    *(
        Case("paged", f"vllm_v0, preemption: {mode}", "short of memory", SHORT)
        for mode in ("recompute", "swap", "hybrid", "partial")
    ),
    Case(
        "paged", "vllm_v0, preemption: swap", "short of memory, asynchronous, int8",
        (*SHORT, *OPT, "transfers={asynchronous: true, quantization: int8}"),
    ),
)  # fmt: skip


def bench_policies(folder: Path) -> str:
    """The table; prefix caching is on wherever an allocator has it."""
    rows = []
    first = 0.0
    for number, case in enumerate(CASES):
        figures = run(folder / str(number), SEQUENCES // case.branches, RATE, case.settings())
        cpu = float(figures["cpu_s"])
        first = first or cpu
        rows.append(
            [
                case.memory,
                case.scheduler,
                case.load,
                f"{figures['mean_running']:.0f}",
                f"{figures['prefix_hit_rate']:.2f}",
                f"{figures['preemptions']:,}",
                f"{cpu:.2f}",
                f"{SEQUENCES / cpu:,.0f}",
                f"{first / cpu:.2f}",
            ]
        )
    header = [
        "memory", "scheduler", "load", "batch", "hits", "preemptions", "CPU s", "sequences/CPU-s", "speed ratio",
    ]  # fmt: skip
    return table(f"whole runs of {SEQUENCES:,} sequences, {RATE:g} a second", header, rows)
