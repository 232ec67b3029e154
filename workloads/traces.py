"""Trace formats: recorded requests, read in blocks of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sim.errors import UserError
from sim.registry import Registry
from workloads.files import Block

Content = list[tuple[int, ...]]

trace_format: Registry[type[TraceFormat]] = Registry("trace format")


@dataclass(frozen=True, slots=True)
class TraceRows:
    """Requests that follow each other in a trace, one entry each.

    arrival_time: ns on the trace's own clock. content: ids that name what each prompt is made of, or None.
    """

    arrival_time: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    content: Content | None = None

    def __len__(self) -> int:
        return len(self.arrival_time)

    def part(self, start: int, stop: int) -> TraceRows:
        """The rows from `start` up to `stop`."""
        return TraceRows(
            self.arrival_time[start:stop],
            self.prompt_tokens[start:stop],
            self.output_tokens[start:stop],
            None if self.content is None else self.content[start:stop],
        )

    def at(self, times: NDArray[np.int64]) -> TraceRows:
        """The same requests at other times."""
        return TraceRows(times, self.prompt_tokens, self.output_tokens, self.content)

    def followed_by(self, later: TraceRows) -> TraceRows:
        """These rows and the later ones."""
        both = self.content is not None and later.content is not None
        return TraceRows(
            np.concatenate((self.arrival_time, later.arrival_time)),
            np.concatenate((self.prompt_tokens, later.prompt_tokens)),
            np.concatenate((self.output_tokens, later.output_tokens)),
            [*(self.content or ()), *(later.content or ())] if both else None,
        )


class TraceFormat(ABC):
    """A reader of trace files; its keyword-only parameters are its YAML fields."""

    absolute: ClassVar[bool] = False
    """True if the trace's clock starts long before its first request: at a date, or at midnight."""
    content_grain: int = 0
    """Tokens that an id of the content stands for."""

    @abstractmethod
    def read(self, path: Path) -> Iterator[TraceRows]:
        """The trace's requests in order of arrival, never all in memory.

        Prompts and outputs have at least 1 token. Raises UserError with `file:line` for what is not as the
        format promises.
        """


def checked(parts: Iterable[tuple[Block, TraceRows]], *, drop_empty: bool = False) -> Iterator[TraceRows]:
    """Rows, once it is clear that they are in order of arrival and that prompts are not empty.

    An output of 0 tokens counts as 1, as the prompt's computation yields one; with `drop_empty` it marks a
    failed request, which is left out. Raises UserError.
    """
    latest = np.iinfo(np.int64).min
    for block, rows in parts:
        times = rows.arrival_time
        late = np.flatnonzero(times[1:] < times[:-1]) + 1
        if times[0] < latest or late.size:
            row = 0 if times[0] < latest else int(late[0])
            early = (int(times[row - 1]) if row else latest) - int(times[row])
            raise UserError(
                f"{block.where(row)}: not in order: got an arrival {early / 1e9:g} s before that of the row "
                "above, expected rows in order of arrival"
            )
        latest = int(times[-1])
        if drop_empty:
            kept = np.flatnonzero(rows.output_tokens)
        else:
            kept = np.arange(len(rows))
        blank = np.flatnonzero(rows.prompt_tokens[kept] == 0)
        if blank.size:
            raise UserError(
                f"{block.where(int(kept[blank[0]]))}: got a prompt of 0 tokens, expected at least 1"
            )
        if not kept.size:
            continue
        content = rows.content
        if kept.size < len(rows) and content is not None:
            content = [content[row] for row in kept.tolist()]
        yield TraceRows(
            times[kept], rows.prompt_tokens[kept], np.maximum(rows.output_tokens[kept], 1), content
        )


def spread(parts: Iterable[TraceRows], quantum: int) -> Iterator[TraceRows]:
    """Rows whose clock ticks once in `quantum` ns, those of one tick spread evenly over it in their order.

    A tick ends early where the next one begins. With a quantum of 0 nothing moves.
    """
    if not quantum:
        yield from parts
        return
    held: TraceRows | None = None  # of the tick that may go on
    for rows in parts:
        if held is not None:
            rows = held.followed_by(rows)
        begins = np.flatnonzero(np.diff(rows.arrival_time, prepend=rows.arrival_time[0] - 1))
        last = int(begins[-1])
        held = rows.part(last, len(rows))
        if last:
            yield rows.part(0, last).at(_spread(rows.arrival_time, begins, quantum))
    if held is not None:
        yield held.at(_evenly(held.arrival_time, quantum))


def _spread(times: NDArray[np.int64], begins: NDArray[np.intp], quantum: int) -> NDArray[np.int64]:
    """Times before the last of the ticks that begin at these rows, spread."""
    counts = np.diff(begins)
    widths = np.minimum(np.diff(times[begins]), quantum)
    ranks = np.arange(begins[-1]) - np.repeat(begins[:-1], counts)
    shifts: NDArray[np.int64] = ranks * np.repeat(widths, counts) // np.repeat(counts, counts)
    return times[: begins[-1]] + shifts


def _evenly(times: NDArray[np.int64], quantum: int) -> NDArray[np.int64]:
    return times + np.arange(len(times)) * quantum // len(times)
