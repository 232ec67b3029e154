"""`kvsim demo`: a short tour on the terminal. Paged against contiguous, block tables, sharing, correctness."""

from __future__ import annotations

import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.text import aligned

if TYPE_CHECKING:
    from attention.generation.tour import Picture

Part = tuple[list[str], bool]
"""Lines to print, and whether all that they say is as it should be."""

EXPERIMENT = """\
# Reservations against paging, small enough for a tour.
name: demo
model: opt-13b
device: a100-40gb
kv_memory: 12 GiB
workload:
  num_requests: 300
  arrivals: {kind: poisson, rate: 2.0}
  lengths: {kind: sharegpt}
timing: {kind: roofline, step_overhead_ms: 20}
sweep:
  zip:
    allocator: [{kind: contiguous, reserve: max}, {kind: contiguous, reserve: oracle}, {kind: paged, block_size: 16}]
    scheduler: [{kind: orca}, {kind: orca}, {kind: vllm_v0}]
"""
NAMES = ("reserve the maximum", "reserve the true length", "pages of 16 slots")
SHARES = {"token_states": "#", "reserved": "=", "internal": "x", "external": "/", "free": "."}
COLUMNS, BAR = 80, 50


def run_demo() -> int:
    """Print the tour; 0 if everything that it compares holds, else 1."""
    begin = time.perf_counter()
    parts: list[tuple[str, Callable[[], Part]]] = [
        ("Memory: paged against contiguous, simulated", _memory),
        ("Block tables: forks share, writes copy", _tables),
        ("Decoding with sharing, for real", _decoding),
        ("Correctness: paged attention against the formula", _correctness),
    ]
    failed = []
    for number, (title, part) in enumerate(parts, 1):
        print(f"\n{number}. {title}\n", flush=True)
        lines, holds = part()
        print("\n".join(_fitted(lines)), flush=True)
        if not holds:
            failed.append(title)
    print(f"\n{time.perf_counter() - begin:.0f} s. " + (_told(failed) or "Everything compared holds."))
    return 1 if failed else 0


def _fitted(lines: Sequence[str]) -> Iterator[str]:
    """Lines for a narrow terminal; those of tables and drawings are short enough as they are."""
    for line in lines:
        yield from textwrap.wrap(line, COLUMNS) if len(line) > COLUMNS else [line]


def _told(failed: Sequence[str]) -> str:
    return f"Failed: {'; '.join(failed)}." if failed else ""


def _memory() -> Part:
    from experiments.config import load
    from experiments.sweep import run_sweep

    with tempfile.TemporaryDirectory(prefix="kvsim-demo-") as folder:
        file = Path(folder, "demo.yaml")
        file.write_text(EXPERIMENT, encoding="utf-8")
        outcome = run_sweep(load(file), Path(folder, "results"), processes=1)
    if outcome.failures:
        return [f"failed: {failure.message}" for failure in outcome.failures], False
    rows = outcome.rows
    settings = "OPT-13B on one A100-40GB, 12 GiB of KV cache, ShareGPT-like requests, 2 per s."
    lines = [settings, "", *_figures(rows), "", "Slots of the cache while requests wait:", ""]
    for name, row in zip(NAMES, rows, strict=True):
        lines.append(f"{name:<24}|{_bar(row)}|")
    legend = "  ".join(f"{sign} {share.replace('_', ' ')}" for share, sign in SHARES.items())
    first, last = rows[0], rows[-1]
    batch = last["mean_running"] / first["mean_running"]
    faster = last["request_throughput"] / first["request_throughput"]
    checked = sum(row["probe_steps"] for row in rows)
    worst = max(row["probe_max_error"] or 0.0 for row in rows)
    return [
        *lines,
        legend.rjust(len(lines[-1])),
        "",
        f"Paging runs {batch:.1f} times as many requests at once and finishes {faster:.1f} times as many.",
        f"On {checked} steps real attention ran through the simulated tables: error {worst:.1e}.",
    ], all(row["requests_finished"] for row in rows)


def _figures(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ["", "running", "requests/s", "s/token", "slots with a token"]
    body = [
        [
            name,
            f"{row['mean_running']:.1f}",
            f"{row['request_throughput']:.2f}",
            f"{row['normalized_latency_mean_s']:.2f}",
            f"{100 * row['token_states_share']:.1f} %",
        ]
        for name, row in zip(NAMES, rows, strict=True)
    ]
    return aligned([head, *body], [False, True, True, True, True])


def _bar(row: dict[str, Any]) -> str:
    """Shares of the cache as signs; each share ends where the sum of those up to it does."""
    bar, total = "", 0.0
    for share, sign in SHARES.items():
        total += row[f"{share}_share"]
        bar += sign * (round(BAR * total) - len(bar))
    return bar


def _tables() -> Part:
    from attention.generation.tour import fork_story

    lines = ["[3 ooo.]2 is block 3 with three tokens in four slots, held by 2 sequences.", ""]
    pictures = fork_story()
    for picture in pictures:
        lines += _drawn(picture)
    tables = pictures[-2].tables.values()
    needed, held = sum(map(len, tables)), len({held.block for table in tables for held in table})
    return [*lines, f"Before B ended, {held} blocks stood for {needed}."], held < needed


def _drawn(picture: Picture) -> list[str]:
    copies = f", {picture.copies} copied" if picture.copies else ""
    lines = [f"{picture.told} ({picture.num_free} blocks free{copies})"]
    for name, table in picture.tables.items():
        size = max(held.tokens for held in table)
        blocks = [
            f"[{held.block} {'o' * held.tokens}{'.' * (size - held.tokens)}]"
            + (str(held.holders) if held.holders > 1 else " ")
            for held in table
        ]
        lines.append(f"  {name}  {' '.join(blocks)}".rstrip())
    return [*lines, ""]


def _decoding() -> Part:
    from attention.generation.tour import LENGTHS, generations

    made = generations()
    head = ["", "dtype", "equal", "blocks saved", "at most", "copies", "forks", "kills"]
    rows = [
        [
            each.method,
            each.dtype,
            f"{each.equal}/{each.outputs}",
            f"{100 * each.sharing.saved_share:.1f} %",
            f"{each.sharing.peak_saved_blocks}",
            f"{each.sharing.copied_tokens // each.block_size}",
            f"{each.sharing.forks}",
            f"{each.sharing.kills}",
        ]
        for each in made
    ]
    prompts = ", ".join(map(str, LENGTHS[:-1])) + f" and {LENGTHS[-1]}"
    lines = [
        f"A small transformer (RoPE, GQA, SwiGLU; random weights) goes on from prompts of {prompts} "
        "tokens in one batch, over the paged cache and over a contiguous one that shares nothing.",
        "",
        *aligned([head, *rows], [False, False, *[True] * 6]),
        "",
    ]
    for each in made:
        for found in each.differences:
            lines.append(
                f"{each.method}: request {found.request}, branch {found.branch}, position {found.position}: "
                f"scores {found.gap:.1e} apart"
            )
    different, unexplained = (
        sum(len(each.differences) for each in made),
        sum(each.unexplained for each in made),
    )
    error = max(each.max_score_error for each in made)
    lines.append(
        f"{different} differences, {unexplained} not explained by scores less than 1e-4 apart in float32."
    )
    lines.append(f"Scores of equal outputs agree to {error:.1e}.")
    clones, copied = sum(each.clones for each in made), sum(each.sharing.copied_tokens for each in made)
    lines.append(f"Forks copied the K and V of {clones:,} tokens without paging, {copied:,} with it.")
    return lines, not unexplained and not any(each.blocks_left for each in made)


def _correctness() -> Part:
    from attention.generation.tour import attention_errors

    errors = attention_errors()
    head = ["slots a block", "heads/KV heads", "tokens", "largest error", "allowed", ""]
    rows = [
        [
            f"{each.block_size}",
            f"{each.num_heads}/{each.num_kv_heads}",
            " ".join(map(str, each.lengths)),
            f"{each.error:.1e}",
            f"{each.bound:.1e}",
            "ok" if each.error <= each.bound else "FAILED",
        ]
        for each in errors
    ]
    told = "Prompts and decodes in one batch, float32 against float64; free slots are NaN."
    return [told, "", *aligned([head, *rows], [True] * 5)], all(each.error <= each.bound for each in errors)
