"""`kvsim bench sim`: requests and steps per CPU second, beside a bare SimPy loop; memory and start-up."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from collections.abc import Sequence as Ordered
from pathlib import Path
from typing import Any

from experiments.bench.peers import RATE as PEER_RATE
from experiments.bench.peers import REQUESTS as PEER_REQUESTS
from experiments.bench.peers import aisimulate
from experiments.text import table

CASES = (("batch near 100, 27 requests/s", 27.0), ("batch near 20, 7 requests/s", 7.0))
REQUESTS = 100_000
ROUNDS = 3

EXPERIMENT = """
name: bench
num_blocks: 16384
max_model_len: 8192
workload:
  num_requests: {requests}
  arrivals: {{kind: poisson, rate: {rate}}}
  lengths: {{kind: lognormal, prompt_median: 150, prompt_sigma: 1.0, output_median: 200, output_sigma: 0.8}}
allocator: {{kind: paged, block_size: 16}}
scheduler: {{kind: vllm_v0}}
timing: {{kind: fixed, prefill_ms: 10, decode_ms: 10}}
"""


def bench_sim(folder: Path) -> str:
    """All tables; every ratio is taken between runs that alternate in this process."""
    rows = []
    for name, rate in CASES:
        runs, ratios = [], []
        for number in range(ROUNDS):
            figures = run(folder / f"{rate}-{number}", REQUESTS, rate)
            runs.append(figures)
            ratios.append(figures["cpu_s"] / bare_loop(int(figures["steps"]), REQUESTS))
        middle = sorted(runs, key=lambda figures: figures["cpu_s"])[len(runs) // 2]
        cpu, steps = middle["cpu_s"], int(middle["steps"])
        rows.append(
            [
                name,
                f"{middle['mean_running']:.1f}",
                f"{steps:,}",
                f"{cpu:.2f}",
                f"{REQUESTS / cpu:,.0f}",
                f"{steps / cpu:,.0f}",
                f"{statistics.median(ratios):.1f}",
            ]
        )
    header = ["case", "batch", "steps", "CPU s", "requests/CPU-s", "steps/CPU-s", "x bare SimPy loop"]
    title = f"whole runs of {REQUESTS:,} requests with default recording, median of {ROUNDS}"
    return "\n".join([table(title, header, rows), _peer_table(folder), _process_table(folder)])


def _peer_table(folder: Path) -> str:
    peer = aisimulate(folder)
    if peer is None:
        return "AISimulate's engine is not installed (pip install ai-dynamo-runtime): no comparison\n"
    version, theirs = peer
    ours = run(folder / "peer", PEER_REQUESTS, PEER_RATE)["cpu_s"]
    rows = [
        [name, f"{cpu:.2f}", f"{PEER_REQUESTS / cpu:,.0f}", f"{theirs / cpu:.2f}"]
        for name, cpu in (("kvsim", ours), (f"AISimulate engine {version}, compiled", theirs))
    ]
    title = f"{PEER_REQUESTS:,} requests at {PEER_RATE:g}/s"
    return table(title, ["simulator", "CPU s", "requests/CPU-s", "speed ratio"], rows)


def run(folder: Path, requests: int, rate: float, sets: Ordered[str] = ()) -> dict[str, Any]:
    """One run, everything recorded and written; the summary's figures. `sets` are as of `kvsim run --set`."""
    from experiments.config import load
    from experiments.sweep import run_sweep

    folder.mkdir(parents=True)
    config = folder / "bench.yaml"
    config.write_text(EXPERIMENT.format(requests=requests, rate=rate))
    outcome = run_sweep(load(config, sets, probe=False), folder, processes=1)
    for failure in outcome.failures:
        raise RuntimeError(failure.message)
    return outcome.rows[0]


def bare_loop(steps: int, arrivals: int) -> float:
    """CPU seconds of SimPy alone: one timeout for every engine step and one for every arrival."""
    import simpy

    env = simpy.Environment()

    def timeouts(count: int, delay: int) -> Generator[simpy.Event, Any, None]:
        for _ in range(count):
            yield env.timeout(delay)

    env.process(timeouts(steps, 10_000_000))
    env.process(timeouts(arrivals, 10_000_000 * steps // arrivals))
    start = time.process_time()
    env.run()
    return time.process_time() - start


def _process_table(folder: Path) -> str:
    config = folder / "million.yaml"
    config.write_text(EXPERIMENT.format(requests=1_000_000, rate=27.0))
    million = ["run", str(config), "--no-probe", "--no-plots", "--jobs", "1", "--out", str(folder)]
    rows = []
    for name, arguments in (
        ("kvsim --help", ["--help"]),
        ("a million requests, --no-probe --no-plots", million),
    ):
        cpu, peak = _process(arguments)
        rows.append([name, f"{cpu:.2f}", f"{peak / 2**20:.0f}"])
    return table("whole processes", ["command", "CPU s", "peak RSS, MiB"], rows)


def _process(arguments: list[str]) -> tuple[float, int]:
    """CPU seconds and peak memory in bytes of a command of ours and of all that it starts."""
    program = (
        "import resource, subprocess, sys\n"
        "code = subprocess.run([sys.executable, '-m', 'experiments', *sys.argv[1:]], stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(code.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss)\n"
    )
    root = Path(__file__).resolve().parents[2]
    told = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    if told[0] != "0":
        raise RuntimeError(f"kvsim {' '.join(arguments)} exited with {told[0]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return float(told[1]), int(told[2]) * unit
