"""The index of a tiered store: which run holds a block, by the key of the block."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Ordered
from operator import eq

from sim.prefixes.keys import owner
from sim.tiers.storage_tier import Run, StorageTier

Piece = tuple[Run, int, int]
"""A run, the first of its blocks that is meant, and their number."""


class RunIndex:
    """Runs by keys: by each of them, or at once where the keys of a run are a stretch that one request alone has.

    A run whose `keys` are a range is found by the request and is looked into; as it says itself which keys it has,
    nothing is named anew when its end is parted from it.
    """

    __slots__ = ("_own", "_shared", "changes")

    def __init__(self) -> None:
        self.changes = 0  # goes up whenever something else may be found than before, or elsewhere
        self._shared: dict[Hashable, Run] = {}
        self._own: dict[int, list[Run]] = {}

    def __iter__(self) -> Iterator[Hashable]:
        yield from self._shared
        for runs in self._own.values():
            for run in runs:
                yield from run.keys

    def __len__(self) -> int:
        return len(self._shared) + sum([len(run.keys) for runs in self._own.values() for run in runs])

    def get(self, key: Hashable) -> Run | None:
        """The run that holds the block of this key."""
        run = self._shared.get(key)
        if run is None and self._own and isinstance(key, int) and key < 0:
            for each in self._own.get(owner(key), ()):
                if key in each.keys:
                    return each
        return run

    def tier(self, key: Hashable) -> StorageTier | None:
        """Where the block of this key is."""
        run = self.get(key)
        return None if run is None else run.tier

    def pieces(self, keys: Ordered[Hashable]) -> Iterator[Piece]:
        """The runs that hold these keys, up to the first that is not there."""
        at = 0
        while at < len(keys):
            run = self.get(keys[at])
            if run is None:
                return
            first = run.keys.index(keys[at])
            there = [*run.keys[first : first + len(keys) - at]]
            asked = [*keys[at : at + len(there)]]
            count = len(there) if there == asked else [*map(eq, there, asked)].index(False)
            yield run, first, count
            at += count

    def leading(self, keys: Ordered[Hashable]) -> int:
        """How many of the keys are there, up to the first that is not."""
        return sum([count for _, _, count in self.pieces(keys)])

    def has_any(self, keys: Ordered[Hashable]) -> bool:
        """Whether any of the keys is there."""
        if self._shared and not self._shared.keys().isdisjoint(keys):
            return True
        if not self._own:
            return False
        if isinstance(keys, range):
            own = self._own.get(owner(keys[0]), ())
            return any(run.keys[0] <= keys[-1] and keys[0] <= run.keys[-1] for run in own)  # type: ignore[operator]
        return any(self.get(key) is not None for key in keys if isinstance(key, int) and key < 0)

    def name(self, run: Run) -> Run:
        """Let a run be found by its keys; the run."""
        keys = run.keys
        self.changes += 1
        if isinstance(keys, range):
            runs = self._own.setdefault(owner(keys[0]), [])
            runs.append(run)
        else:
            shared = self._shared
            for key in keys:  # faster than update: the keys are spread over a large dict
                shared[key] = run
        return run

    def drop(self, run: Run, keys: Ordered[Hashable]) -> None:
        """These keys at the end of a run are not found any more; a run that is in no tier is not found at all."""
        self.changes += 1
        if isinstance(keys, range):
            if run.tier is None:
                runs = self._own[owner(keys[0])]
                runs.remove(run)
                if not runs:
                    del self._own[owner(keys[0])]
        else:
            shared = self._shared
            for key in keys:
                del shared[key]
