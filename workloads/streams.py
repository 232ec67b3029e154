"""Named random streams: independent generators that depend on the seed, the replication and a name only."""

from __future__ import annotations

from zlib import crc32

import numpy as np


class Streams:
    """Source of a generator for each purpose ("arrivals", "lengths", "sampling", ...).

    The same name always begins the same stream, whoever asks and in whatever order, so that all policies at
    one point of a sweep see the same requests. Streams of different names or replications are independent
    (numpy's `SeedSequence`). Raises ValueError if the seed or the replication is negative.

    >>> Streams(7)("lengths").integers(100) == Streams(7)("lengths").integers(100)
    True
    """

    __slots__ = ("replication", "seed")

    def __init__(self, seed: int, replication: int = 0) -> None:
        for name, value in (("seed", seed), ("replication", replication)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.seed = seed
        self.replication = replication

    def __call__(self, name: str) -> np.random.Generator:
        """The stream of that name, from its beginning."""
        key = (self.replication, crc32(name.encode()))
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key)))

    def __repr__(self) -> str:
        return f"Streams(seed={self.seed}, replication={self.replication})"
