"""Configurations of the attention kernels: tile, warps and pipeline stages, looked up in a shipped table.

The table, `configurations.json`, is filled by `python -m attention.calibration.tuning`. Nothing is timed while
attention runs: an autotuner in the hot path would break captured graphs and make timings differ from run to run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("configurations.json")

BLOCK_SIZES = (1, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Configuration:
    """How one kernel is cut and compiled.

    tile: tokens of K and V per iteration, a power of two of at least 16.
    rows: (query token, query head) pairs per program, a power of two of at least 16; for decoding at most this many.
    num_warps, num_stages: as Triton takes them; K and V get num_stages - 1 buffers.
    programs_per_sm: programs that run on one multiprocessor at a time, from which the splits of decoding follow.
    """

    tile: int
    rows: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2


@dataclass(frozen=True, slots=True)
class Key:
    """What a configuration is chosen by.

    kind: decode or prefill. head_dim: the next power of two, from 16. dtype: float32, float16 or bfloat16.
    group: query heads per KV head, as the next power of two. block_size: the largest of BLOCK_SIZES that is not
    larger. Not the batch and not the lengths: they change at every step.
    """

    kind: str
    head_dim: int
    dtype: str
    group: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table: a configuration for the keys that have the fields given, and any others."""

    given: Mapping[str, str | int]
    configuration: Configuration

    def fits(self, key: Key) -> bool:
        """Whether it may be used for this key."""
        return all(getattr(key, name) == value for name, value in self.given.items())


def key_of(kind: str, head_dim: int, dtype: str, group: int, block_size: int) -> Key:
    """The key of a shape, bucketed."""
    bucket = max(size for size in BLOCK_SIZES if size <= block_size)
    return Key(kind, max(16, power_of_two(head_dim)), dtype, power_of_two(group), bucket)


def configuration(key: Key) -> Configuration:
    """That of the entry that gives most fields of the key, the first of equals. Raises LookupError without any."""
    fitting = [entry for entry in shipped() if entry.fits(key)]
    if not fitting:
        raise LookupError(f"{SHIPPED.name}: got no entry for {key}, expected one at least of its kind")
    return max(fitting, key=lambda entry: len(entry.given)).configuration


@functools.cache
def shipped() -> tuple[Entry, ...]:
    """The shipped table."""
    return read(SHIPPED)


def read(path: Path) -> tuple[Entry, ...]:
    """A table from its file; other fields of a row, such as a measured time, are notes."""
    rows = json.loads(path.read_text(encoding="utf-8"))["configurations"]
    return tuple(Entry(_part(row, Key), Configuration(**_part(row, Configuration))) for row in rows)


def _part(row: dict[str, Any], kind: type) -> dict[str, Any]:
    return {field.name: row[field.name] for field in fields(kind) if field.name in row}


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()
