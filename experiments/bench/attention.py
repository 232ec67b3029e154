"""`kvsim bench attention`: paged attention beside the device's bandwidth and beside others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.text import table

if TYPE_CHECKING:
    from attention.calibration.benchmark import AttentionBenchmark, Case, Result
    from attention.calibration.overlap import SwapOverlap

GOAL_CPU = 0.40
GOAL_GPU, FLOOR_S, ABOVE_FLOOR_S = 0.90, 45e-6, 8e-6
GOAL_PREFILL = 0.60
RUN_BLOCKS = 8


def bench_attention(folder: Path) -> str:
    """All tables, on the GPU if there is one; ratios are taken between calls that alternate."""
    from attention.calibration.benchmark import AttentionBenchmark, decode_cases, flex_cases, prefill_cases
    from attention.calibration.measuring import device_name
    from attention.calibration.overlap import SwapOverlap
    from attention.calibration.rivals import RIVALS

    bench = AttentionBenchmark()
    kind = bench.device.type
    told = [_goal_line(bench)] if kind == "cpu" else []
    told.append(
        f"{device_name(bench.device)}, {str(bench.dtype).removeprefix('torch.')}: copy "
        f"{bench.copy_bandwidth / 1e9:,.1f} GB/s (read + written), read {bench.read_bandwidth / 1e9:,.1f} GB/s\n"
    )
    decodes = [bench.run(case) for case in decode_cases(kind)]
    prefills = [bench.run(case) for case in prefill_cases(kind)]
    flex = [bench.run(case, RIVALS) for case in flex_cases(kind)]
    told.append(_decode_table(bench, "decode", decodes))
    if kind == "cuda":
        told.append(_floor_table(bench, decodes))
    told.append(_decode_table(bench, "decode, with flex_attention", flex))
    told.append(_runs_table(bench.runs_of_blocks(RUN_BLOCKS)))
    told.append(_prefill_table(bench, prefills))
    told.append(_overlap_table(SwapOverlap(bench.device)))
    told += [f"{name} takes no part: {why}" for name, why in bench.absent.items()]
    return "\n".join(told) + "\n"


def _goal_line(bench: AttentionBenchmark) -> str:
    copy, attention, ratio = bench.copy_against_attention()
    return (
        f"copy of the K and V / attention, 32 decodes of about 1,000 tokens: {ratio:.2f} "
        f"({copy * 1e3:.1f} ms / {attention * 1e3:.1f} ms, process time, one thread, median of 11 pairs; goal >= "
        f"{GOAL_CPU:.2f})\n"
    )


def _shape(case: Case) -> list[str]:
    return [str(case.heads), str(case.batch), f"{case.context:,}", str(case.block_size)]


def _decode_table(bench: AttentionBenchmark, title: str, results: list[Result]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result.laps))
    rivals = [name for name in names if name not in ("reference", "torch", "triton")]
    rows = []
    for result in results:
        ours = result.seconds(bench.best) or 0.0
        read = result.case.kv_bytes(bench.itemsize) / ours
        rows.append(
            [
                *_shape(result.case),
                *(_time(result.seconds(name)) for name in names),
                f"{read / 1e9:,.1f}",
                f"{read / bench.copy_bandwidth:.2f}",
                f"{read / bench.read_bandwidth:.2f}",
                *(_ratio(result.ratio(bench.best, name)) for name in rivals),
            ]
        )
    header = ["heads", "batch", "context", "block", *names, "GB/s", "of copy", "of read"]
    header += [f"/ {name}" for name in rivals]
    told = (
        f"{title}, milliseconds; K and V read per second by {bench.best}, shares of the device's bandwidths"
    )
    return table(told + ", speed over others'", header, rows)


def _floor_table(bench: AttentionBenchmark, results: list[Result]) -> str:
    rows = []
    for result in results:
        seconds = result.seconds(bench.best) or 0.0
        floor = result.case.floor_bytes(bench.itemsize) / bench.bandwidth
        met = floor / seconds >= GOAL_GPU if floor >= FLOOR_S else seconds <= floor + ABOVE_FLOOR_S
        rows.append(
            [
                *_shape(result.case),
                f"{seconds * 1e6:.1f}",
                f"{floor * 1e6:.1f}",
                f"{floor / seconds:.2f}",
                f"{(seconds - floor) * 1e6:+.1f}",
                "yes" if met else "NO",
            ]
        )
    header = ["heads", "batch", "context", "block", "us", "floor us", "share", "over us", "met"]
    goal = f">= {GOAL_GPU:.2f} of it where the floor is >= 45 us, elsewhere floor + 8 us"
    return table(f"{bench.best} decode against the bandwidth's floor; goal {goal}", header, rows)


def _runs_table(seconds: dict[str, float]) -> str:
    first = next(iter(seconds.values()))
    rows = [[name, _time(each), f"{first / each:.2f}"] for name, each in seconds.items()]
    title = "the same K and V in small blocks, in small blocks whose runs are told (run_blocks), and in large ones"
    return table(
        f"{title}; 32 decodes of about 1,000 tokens, milliseconds", ["tables of", "time", "speed"], rows
    )


def _prefill_table(bench: AttentionBenchmark, results: list[Result]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result.laps))
    rows = []
    for result in results:
        case = result.case
        rows.append(
            [
                str(case.heads),
                str(case.batch),
                f"{case.query_len:,}",
                f"{case.context:,}",
                *(_time(result.seconds(name)) for name in names),
                f"{case.flops / (result.seconds(bench.best) or 1) / 1e12:,.3g}",
                _ratio(result.ratio(bench.best, "SDPA")),
            ]
        )
    header = ["heads", "batch", "tokens", "context", *names, "TFLOP/s", "/ SDPA"]
    title = f"prefill, milliseconds; speed of {bench.best}, over that of SDPA on contiguous K and V (goal on a GPU"
    return table(f"{title} >= {GOAL_PREFILL:.2f})", header, rows)


def _overlap_table(overlap: SwapOverlap) -> str:
    seconds = overlap.seconds()
    step = seconds["step of those that stay"]
    rows = [[name, _time(each), f"{each / step:.2f}"] for name, each in seconds.items()]
    title = f"a decode step beside a swap-in of {overlap.num_bytes / 1e6:,.0f} MB, milliseconds"
    if overlap.device.type == "cpu":
        title += "; to overlap them needs a GPU: here they take turns on one thread, process time"
    return table(title, ["way", "time", "of a step"], rows)


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
