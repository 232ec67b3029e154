"""A benchmark of attention: each implementation beside each rival, over batch, context, block size and heads.

Contestants of a case are timed in turn, round by round, so that what slows the machine slows all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from attention.calibration.measuring import Call, Stopwatch, alternated, bandwidths, copier, find_device
from attention.calibration.rivals import RIVALS, Rival, pieces
from attention.calibration.trials import Bench, Heads, capturable, default_dtype, ragged
from attention.functional import IMPLEMENTATIONS

GQA, MHA = Heads(32, 8, 128), Heads(32, 32, 128)
BLOCK_SIZE = 16
ROUNDS = {"cpu": 5, "cuda": 7}
PAIRS = 11
POOL_BYTES = {"cpu": 300 << 20, "cuda": 18 << 30}
"""K and V, a little more than the largest case has."""
SLOW_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Implementations that copy what they read, or compute it in float32, are left out above this."""


@dataclass(frozen=True, slots=True)
class Case:
    """Decodes (`query_len` 1) or prompts of equally long sequences; `context` counts the query tokens too."""

    heads: Heads
    batch: int
    context: int
    block_size: int
    query_len: int = 1

    @property
    def flops(self) -> int:
        """FLOPs of the visible (query, key) pairs."""
        before = self.context - self.query_len
        pairs = self.query_len * before + self.query_len * (self.query_len + 1) // 2
        return self.batch * pairs * self.heads.pair_flops

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of K and V."""
        return self.batch * self.context * self.heads.kv_values * itemsize

    def floor_bytes(self, itemsize: int) -> int:
        """All bytes that a decode has to move: K and V, block ids for every KV head, queries and outputs."""
        ids = self.batch * -(-self.context // self.block_size) * 4 * self.heads.num_kv_heads
        queries = 2 * self.batch * self.heads.num_heads * self.heads.head_dim * itemsize
        return self.kv_bytes(itemsize) + ids + queries


@dataclass(slots=True)
class Result:
    """Seconds of every contestant that took part in a case, and ratios first / other of medians by round."""

    case: Case
    laps: dict[str, list[float]] = field(default_factory=dict)

    def seconds(self, name: str) -> float | None:
        """The median of a contestant, None if it did not take part."""
        return statistics.median(self.laps[name]) if name in self.laps else None

    def ratio(self, name: str, other: str) -> float | None:
        """How many times as fast as `other` a contestant is: the median over rounds."""
        if name not in self.laps or other not in self.laps:
            return None
        pairs = zip(self.laps[name], self.laps[other], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)


class AttentionBenchmark:
    """All that `kvsim bench attention` measures, on one device.

    `absent` tells in words, by name, who does not take part and why; it grows as cases are run.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = find_device(device)
        self.dtype = default_dtype(self.device)
        self.copy_bandwidth, self.read_bandwidth = bandwidths(self.device)
        self.bench = Bench(self.device, self.dtype, POOL_BYTES[self.device.type])
        self.fused = capturable(self.device)
        self.absent: dict[str, str] = {}
        if not self.fused:
            self._refuse_triton()

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    @property
    def bandwidth(self) -> float:
        """The better of the two measured bandwidths, bytes per second."""
        return max(self.copy_bandwidth, self.read_bandwidth)

    @property
    def best(self) -> str:
        """The implementation that `auto` takes."""
        return "triton" if self.fused else "torch"

    def copy_against_attention(self) -> tuple[float, float, float]:
        """32 decodes of about 1,000 tokens, 32/8 heads of 128: seconds of a copy of as many bytes as the K and V
        read, of attention, and the median ratio of pairs of them.
        """
        seq_lens = ragged(32, 1000)
        num_bytes = sum(seq_lens) * GQA.kv_values * self.itemsize
        attention = Stopwatch(self.bench.attention(seq_lens, BLOCK_SIZE, GQA), self.device, self.fused)
        return alternated(Stopwatch([copier(num_bytes, self.device)], self.device), attention, PAIRS)

    def runs_of_blocks(self, run_blocks: int) -> dict[str, float]:
        """The same decodes over small blocks in runs of so many, without and with the hint, and over large blocks.

        Median seconds by name.
        """
        seq_lens, size = ragged(32, 1000), BLOCK_SIZE
        ways = {
            f"blocks of {size}": self.bench.attention(
                seq_lens, size, GQA, None, "auto", run_blocks, told=False
            ),
            f"in runs of {run_blocks}": self.bench.attention(seq_lens, size, GQA, None, "auto", run_blocks),
            f"blocks of {size * run_blocks}": self.bench.attention(seq_lens, size * run_blocks, GQA),
        }
        watches = {name: Stopwatch(calls, self.device, self.fused) for name, calls in ways.items()}
        laps: dict[str, list[float]] = {name: [] for name in watches}
        for _ in range(PAIRS):
            for name, watch in watches.items():
                laps[name].append(watch.lap())
        return {name: statistics.median(each) for name, each in laps.items()}

    def run(self, case: Case, rivals: Sequence[Rival] = RIVALS[:-1]) -> Result:
        """All contestants of a case, in turn; of the rivals those given (`Flex` compiles, which takes long)."""
        watches = dict(self._watches(case, rivals))
        result = Result(case, {name: [] for name in watches})
        for _ in range(ROUNDS[self.device.type]):
            for name, watch in watches.items():
                result.laps[name].append(watch.lap())
        return result

    def _watches(self, case: Case, rivals: Sequence[Rival]) -> Iterator[tuple[str, Stopwatch]]:
        seq_lens = [case.context] * case.batch
        query_lens = [case.query_len] * case.batch if case.query_len > 1 else None
        small = case.kv_bytes(self.itemsize) <= SLOW_BYTES[self.device.type] and case.query_len <= 2048
        for name in IMPLEMENTATIONS:
            if name != "auto" and name not in self.absent and (name == self.best or small):
                calls = self.bench.attention(seq_lens, case.block_size, case.heads, query_lens, name)
                yield name, Stopwatch(calls, self.device, name == "triton")
        if case.query_len > 1:
            yield "SDPA", Stopwatch(self._causal(case), self.device)
            return
        for rival in rivals:
            why = rival.refusal(self.bench, case.block_size)
            if why is None:
                try:
                    made = rival.calls(self.bench, case.batch, case.context, case.block_size, case.heads)
                    yield rival.name, Stopwatch(made, self.device, rival.capturable)
                    continue
                except Exception as error:  # theirs to raise what they like; the table says so
                    told = str(error).strip().splitlines() or [""]
                    why = f"{type(error).__name__}: {told[0][:120]} (block {case.block_size})"
            self.absent.setdefault(rival.name, why)

    def _causal(self, case: Case) -> list[Call]:
        """Plain causal SDPA on contiguous K and V; heads are repeated beforehand where there is context before."""
        from torch.nn.attention.bias import causal_lower_right

        attend = torch.nn.functional.scaled_dot_product_attention
        q = self.bench.values(case.batch, case.heads.num_heads, case.query_len, case.heads.head_dim)
        k, v = pieces(self.bench, case.batch, case.context, case.heads)[0]
        grouped = case.heads.num_heads != case.heads.num_kv_heads
        if case.query_len == case.context:
            return [lambda: attend(q, k, v, is_causal=True, enable_gqa=grouped)]
        group = case.heads.num_heads // case.heads.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mask = causal_lower_right(case.query_len, case.context)
        return [lambda: attend(q, k, v, attn_mask=mask)]

    def _refuse_triton(self) -> None:
        from attention.kernels.launch import refusal

        self.absent["triton"] = refusal(GQA.head_dim, self.dtype, self.device) or "it runs in the interpreter"


def decode_cases(kind: str) -> list[Case]:
    """The decode table of a sort of device."""
    if kind == "cpu":
        return [
            Case(heads, batch, context, block_size)
            for heads, batch, context in ((GQA, 1, 1024), (GQA, 32, 1024), (GQA, 4, 8192), (MHA, 8, 1024))
            for block_size in (1, 16, 128)
        ]
    cases = [
        Case(heads, batch, context, BLOCK_SIZE)
        for heads in (GQA, MHA)
        for batch in (1, 4, 16, 64, 256)
        for context in (1024, 4096, 16384, 32768)
    ]
    cases += [Case(GQA, 64, 4096, block_size) for block_size in (1, 8, 32, 64, 128, 256)]
    return [case for case in cases if case.kv_bytes(2) <= 18 << 30]


def prefill_cases(kind: str) -> list[Case]:
    """The prefill table of a sort of device."""
    shapes = [(1, 256, 256), (1, 128, 1024), (2, 512, 512)]
    if kind == "cuda":
        shapes = [(1, 2048, 2048), (1, 8192, 8192), (8, 2048, 2048), (1, 2048, 16384), (16, 512, 4096)]
    return [
        Case(heads, batch, context, BLOCK_SIZE, query)
        for heads in (GQA, MHA)
        for batch, query, context in shapes
    ]


def flex_cases(kind: str) -> list[Case]:
    """Where flex_attention takes part: it compiles for every shape."""
    if kind == "cpu":
        return [Case(GQA, 32, 1024, BLOCK_SIZE)]
    return [Case(GQA, batch, context, BLOCK_SIZE) for batch, context in ((1, 32768), (16, 4096), (64, 4096))]
