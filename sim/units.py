"""The one place that turns seconds into the clock's integer nanoseconds and back."""

from __future__ import annotations

SECOND = 1_000_000_000
FOREVER = 1 << 62
"""An instant or a number of steps that never comes (fits int64)."""


def to_ns(seconds: float) -> int:
    """Seconds as whole nanoseconds, ties to even."""
    return round(seconds * 1e9)


def to_seconds(ns: int) -> float:
    """Nanoseconds as seconds."""
    return ns / 1e9
