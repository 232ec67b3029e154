"""Traces in CSV files: plain ones, Azure's, BurstGPT's, Vidur's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sim.registry import NonNegativeFloat
from sim.units import SECOND, to_ns
from workloads.columns import ARRIVAL, OUTPUT, PROMPT, TOKENS, Clock, Column, UtcStamp, chosen, named
from workloads.csv_table import read_csv
from workloads.files import Block
from workloads.traces import TraceFormat, TraceRows, checked, spread, trace_format


@trace_format("csv")
class Csv(TraceFormat):
    """Any CSV file with a header and columns for arrival time, prompt tokens and output tokens.

    Columns are found under the names in use (arrival_time_s, prompt_tokens, output_tokens; arrived_at,
    num_prefill_tokens, num_decode_tokens; timestamp, input_length, output_length; ...), others are ignored.
    Times are in seconds unless the name ends in _ms, _us or _ns.

    Fields:
        time_column: Column of arrival times, if it goes by another name.
        prompt_column: Column of prompt tokens, if it goes by another name.
        output_column: Column of output tokens, if it goes by another name.
    """

    def __init__(
        self,
        *,
        time_column: str | None = None,
        prompt_column: str | None = None,
        output_column: str | None = None,
    ) -> None:
        self.columns = (
            chosen(ARRIVAL, time_column, "time_column"),
            chosen(PROMPT, prompt_column, "prompt_column"),
            chosen(OUTPUT, output_column, "output_column"),
        )

    def read(self, path: Path) -> Iterator[TraceRows]:
        """The rows, times as they stand."""
        return checked(_rows(path, self.columns))


@trace_format("vidur")
class Vidur(TraceFormat):
    """Vidur's traces (Agrawal et al., MLSys 2024): arrived_at (s), num_prefill_tokens, num_decode_tokens."""

    columns = (
        named("the arrival time", "arrived_at", Clock(SECOND)),
        named("prompt tokens", "num_prefill_tokens", TOKENS),
        named("output tokens", "num_decode_tokens", TOKENS),
    )

    def read(self, path: Path) -> Iterator[TraceRows]:
        """The rows, times as they stand."""
        return checked(_rows(path, self.columns))


@trace_format("azure")
class Azure(TraceFormat):
    """Azure's LLM inference traces of 2023 and 2024: TIMESTAMP (UTC), ContextTokens, GeneratedTokens.

    Patel et al., Splitwise, ISCA 2024; Stojkovic et al., DynamoLLM, HPCA 2025. The first request arrives at
    0.
    """

    absolute = True
    columns = (
        named("the arrival time", "TIMESTAMP", UtcStamp()),
        named("prompt tokens", "ContextTokens", TOKENS),
        named("output tokens", "GeneratedTokens", TOKENS),
    )

    def read(self, path: Path) -> Iterator[TraceRows]:
        """The rows, times since 1970."""
        return checked(_rows(path, self.columns))


@trace_format("burstgpt")
class BurstGpt(TraceFormat):
    """BurstGPT's traces, all versions: Timestamp (s since a midnight), Request tokens, Response tokens, ...

    Wang et al., BurstGPT, 2024. Requests that failed, with 0 response tokens, are left out. The first request
    that is left arrives at 0.

    Fields:
        spread_ms: Spread the arrivals of one timestamp evenly over this time; timestamps are whole seconds.
    """

    absolute = True
    columns = (
        named("the arrival time", "Timestamp", Clock(SECOND)),
        named("prompt tokens", "Request tokens", TOKENS),
        named("output tokens", "Response tokens", TOKENS),
    )

    def __init__(self, *, spread_ms: NonNegativeFloat = 0.0) -> None:
        self.quantum = to_ns(spread_ms / 1e3)

    def read(self, path: Path) -> Iterator[TraceRows]:
        """The rows, times since midnight."""
        return spread(checked(_rows(path, self.columns), drop_empty=True), self.quantum)


def _rows(path: Path, columns: Sequence[Column]) -> Iterator[tuple[Block, TraceRows]]:
    for block, (times, prompts, outputs) in read_csv(path, columns):
        yield block, TraceRows(times, prompts, outputs)
