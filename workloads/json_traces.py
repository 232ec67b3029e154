"""Traces in JSON lines: Mooncake's, Bailian's, and plain ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim.errors import UserError
from sim.registry import NonNegativeFloat, PositiveInt
from sim.units import SECOND, to_ns
from workloads.columns import ARRIVAL, OUTPUT, PROMPT, TOKENS, Clock, Column, named
from workloads.files import Block
from workloads.json_lines import Objects, member, read_json_lines
from workloads.traces import Content, TraceFormat, TraceRows, checked, spread, trace_format

HASHES = "hash_ids"
LENGTHS = (named("prompt tokens", "input_length", TOKENS), named("output tokens", "output_length", TOKENS))


@trace_format("mooncake")
class Mooncake(TraceFormat):
    """Mooncake's traces: timestamp (ms), input_length, output_length, hash_ids (Qin et al., FAST 2025).

    An id stands for a block of the prompt and all that precedes it; equal leading ids are an equal prefix.
    Other tools write the same format with smaller blocks.

    Fields:
        block_size: Tokens that a hash id stands for; the last one may stand for fewer.
        spread_ms: Spread the arrivals of one timestamp evenly over this time; those of the published traces
            tick once in 3000 ms.
    """

    columns = (named("the arrival time", "timestamp", Clock(1_000_000)), *LENGTHS)

    def __init__(self, *, block_size: PositiveInt = 512, spread_ms: NonNegativeFloat = 0.0) -> None:
        self.content_grain = block_size
        self.quantum = to_ns(spread_ms / 1e3)

    def read(self, path: Path) -> Iterator[TraceRows]:
        """The rows, times as they stand."""
        return spread(checked(_rows(path, self.columns, self.content_grain)), self.quantum)


@trace_format("bailian", "qwen")
class Bailian(TraceFormat):
    """Traces of Qwen on Alibaba's Bailian: timestamp (s), input_length, output_length, hash_ids, ...

    Wang et al., KVCache Cache in the Wild, USENIX ATC 2025.

    Fields:
        block_size: Tokens that a hash id stands for; the last one may stand for fewer.
    """

    columns = (named("the arrival time", "timestamp", Clock(SECOND)), *LENGTHS)

    def __init__(self, *, block_size: PositiveInt = 16) -> None:
        self.content_grain = block_size

    def read(self, path: Path) -> Iterator[TraceRows]:
        """The rows, times as they stand."""
        return checked(_rows(path, self.columns, self.content_grain))


@trace_format("jsonl", "llmservingsim")
class JsonLines(TraceFormat):
    """Any file of a JSON object a line with arrival time, prompt tokens and output tokens.

    hash_ids are read where the first line has them. Members are found under the names that the csv format
    knows, such as input_toks, output_toks, arrival_time_ns of LLMServingSim. Times are in seconds unless the
    name ends in _ms, _us or _ns.

    Fields:
        block_size: Tokens that a hash id stands for; the last one may stand for fewer.
    """

    columns = (ARRIVAL, PROMPT, OUTPUT)

    def __init__(self, *, block_size: PositiveInt = 16) -> None:
        self.content_grain = block_size

    def read(self, path: Path) -> Iterator[TraceRows]:
        """The rows, times as they stand."""
        return checked(_rows(path, self.columns, self.content_grain, required=False))


def _rows(
    path: Path, columns: Sequence[Column], grain: int, *, required: bool = True
) -> Iterator[tuple[Block, TraceRows]]:
    """Rows of the columns arrival, prompt, output, and the content where it is required or there."""
    for block, objects, (times, prompts, outputs) in read_json_lines(path, columns):
        required = required or HASHES in objects[0]
        content = _content(block, objects, prompts, grain) if required else None
        yield block, TraceRows(times, prompts, outputs, content)


def _content(block: Block, objects: Objects, prompts: NDArray[np.int64], grain: int) -> Content:
    """The hash ids of every row, one for each `grain` tokens of its prompt. Raises UserError."""
    lists = member(block, objects, HASHES)
    if set(map(type, lists)) == {list} and set(map(type, chain.from_iterable(lists))) <= {int}:
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        # Some recorders leave the last, partial block without an id.
        if ((counts >= prompts // grain) & (counts <= -(-prompts // grain))).all():
            return list(map(tuple, lists))
    for row, (ids, tokens) in enumerate(zip(lists, prompts.tolist(), strict=True)):
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise UserError(
                f"{block.where(row)}: {HASHES}: got {_short(ids)}, expected a list of whole numbers"
            )
        expected = -(-tokens // grain)
        if not tokens // grain <= len(ids) <= expected:
            raise UserError(
                f"{block.where(row)}: {HASHES}: got {len(ids)} ids, expected {expected}: "
                f"one for each {grain} (block_size) of {tokens} tokens"
            )
    raise AssertionError("a bad row is in the block")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
