"""Peers that can be run beside kvsim, where they are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import time
from pathlib import Path

REQUESTS = 10_000
RATE = 27.0


def aisimulate(folder: Path) -> tuple[str, float] | None:
    """Version and CPU seconds of AISimulate's engine on the benchmark's workload, None if it is not installed.

    The engine comes with `pip install ai-dynamo-runtime`; blocks, step times and limits are those of the
    benchmark, prefix caching is off.
    """
    try:
        core = importlib.import_module("dynamo._core")
        version = importlib.metadata.version("ai-dynamo-runtime")
    except ImportError:
        return None
    trace = _mooncake_trace(folder / "trace.jsonl")
    engine = {
        "block_size": 16,
        "num_gpu_blocks": 16_384,
        "enable_prefix_caching": False,
        "timing_model": {"type": "fixed", "prefill_ms": 10.0, "decode_ms": 10.0},
    }
    start = time.process_time()
    core.run_mocker_trace_replay([str(trace)], trace_block_size=16, extra_engine_args={"engine": engine})
    return version, time.process_time() - start


def _mooncake_trace(path: Path) -> Path:
    """The benchmark's workload as a trace in Mooncake's format, every block's content its own."""
    from workloads.arrivals import Poisson
    from workloads.lengths import Lognormal
    from workloads.streams import Streams
    from workloads.synthetic import Synthetic

    requests = Synthetic(
        Streams(0),
        8192,
        num_requests=REQUESTS,
        arrivals=Poisson(rate=RATE),
        lengths=Lognormal(prompt_median=150, prompt_sigma=1.0, output_median=200, output_sigma=0.8),
    ).requests()
    blocks = 0
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            count = -(-request.prompt_tokens // 16)
            row = {
                "timestamp": request.arrival_time // 1_000_000,
                "input_length": request.prompt_tokens,
                "output_length": request.output_tokens,
                "hash_ids": list(range(blocks, blocks + count)),
            }
            file.write(json.dumps(row) + "\n")
            blocks += count
    return path
