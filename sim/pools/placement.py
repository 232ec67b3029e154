"""Where a contiguous chunk goes: buddy, first fit, best fit."""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

from sim.errors import IntegrityError


class Placement(Protocol):
    """Free chunks of a range of slots; gives one and takes it back."""

    num_free: int

    def rounded(self, size: int) -> int:
        """Slots that a reservation of this size really takes."""

    def largest(self) -> int:
        """Size of the largest free chunk."""

    def take(self, size: int) -> int:
        """First slot of a chunk of `rounded(size)` slots. Raises IntegrityError if none is free."""

    def give(self, base: int, size: int) -> None:
        """Take back the chunk at `base` that was given for this size."""

    def too_small(self, size: int) -> int:
        """Slots in free chunks that cannot hold a reservation of this size."""

    def chunks(self) -> list[tuple[int, int]]:
        """(base, size) of the free chunks by address."""


class Buddy:
    """Buddy system (Knowlton 1965): chunks are powers of two, halved on demand and merged with their buddy.

    A range that is no power of two starts as the powers of its binary form, largest first: 15,728 slots are
    8192 + 4096 + 2048 + 1024 + 256 + 64 + 32 + 16. With `most` no chunk is larger than that power of two.
    """

    def __init__(self, num_slots: int, most: int | None = None) -> None:
        self.num_free = num_slots
        self._free: list[dict[int, None]] = [{} for _ in range(num_slots.bit_length())]
        if most is not None:
            del self._free[most.bit_length() :]
        base = 0
        for order in reversed(range(len(self._free))):
            while num_slots - base >= 1 << order:
                self._free[order][base] = None
                base += 1 << order

    @staticmethod
    def rounded(size: int) -> int:
        """The next power of two."""
        return 1 << (size - 1).bit_length()

    def largest(self) -> int:
        """Size of the largest free chunk."""
        return next((1 << order for order in reversed(range(len(self._free))) if self._free[order]), 0)

    def take(self, size: int) -> int:
        """The chunk freed last among the smallest that fit, its lower half where it is split."""
        base = self.find(size)
        if base is None:
            raise IntegrityError(f"no free chunk of {size} slots")
        return base

    def find(self, size: int) -> int | None:
        """`take` that returns None where there is no such chunk."""
        wanted = (size - 1).bit_length()
        for order in range(wanted, len(self._free)):
            if self._free[order]:
                base, _ = self._free[order].popitem()
                break
        else:
            return None
        while order > wanted:
            order -= 1
            self._free[order][base + (1 << order)] = None
        self.num_free -= 1 << wanted
        return base

    def give(self, base: int, size: int) -> None:
        """Merge with free buddies as far as possible."""
        order = (size - 1).bit_length()
        self.num_free += 1 << order
        largest = len(self._free) - 1
        while order < largest and (base ^ 1 << order) in self._free[order]:
            del self._free[order][base ^ 1 << order]
            base &= ~(1 << order)
            order += 1
        self._free[order][base] = None

    def too_small(self, size: int) -> int:
        """Slots in chunks below the rounded size."""
        return sum([len(free) << order for order, free in enumerate(self._free[: (size - 1).bit_length()])])

    def chunks(self) -> list[tuple[int, int]]:
        """(base, size) of the free chunks by address."""
        return sorted((base, 1 << order) for order, bases in enumerate(self._free) for base in bases)


class FirstFit:
    """The lowest free chunk that is large enough; neighbours merge (Knuth, TAOCP 1, 2.5)."""

    def __init__(self, num_slots: int) -> None:
        self.num_free = num_slots
        self._bases = [0]
        self._sizes = [num_slots]

    @staticmethod
    def rounded(size: int) -> int:
        """The size itself."""
        return size

    def largest(self) -> int:
        """Size of the largest free chunk."""
        return max(self._sizes, default=0)

    def _choose(self, size: int) -> int | None:
        return next((index for index, free in enumerate(self._sizes) if free >= size), None)

    def take(self, size: int) -> int:
        """The start of the chosen chunk; its rest stays free."""
        index = self._choose(size)
        if index is None:
            raise IntegrityError(f"no free chunk of {size} slots")
        base = self._bases[index]
        if self._sizes[index] == size:
            del self._bases[index], self._sizes[index]
        else:
            self._bases[index] += size
            self._sizes[index] -= size
        self.num_free -= size
        return base

    def give(self, base: int, size: int) -> None:
        """Merge with the free neighbours."""
        bases, sizes = self._bases, self._sizes
        self.num_free += size
        index = bisect_left(bases, base)
        if index < len(bases) and base + size == bases[index]:
            size += sizes[index]
            del bases[index], sizes[index]
        if index and bases[index - 1] + sizes[index - 1] == base:
            sizes[index - 1] += size
        else:
            bases.insert(index, base)
            sizes.insert(index, size)

    def too_small(self, size: int) -> int:
        """Slots in chunks below this size."""
        return sum([free for free in self._sizes if free < size])

    def chunks(self) -> list[tuple[int, int]]:
        """(base, size) of the free chunks by address."""
        return list(zip(self._bases, self._sizes, strict=True))


class BestFit(FirstFit):
    """The smallest free chunk that is large enough, the lowest of equals; neighbours merge."""

    def _choose(self, size: int) -> int | None:
        fitting = [(free, index) for index, free in enumerate(self._sizes) if free >= size]
        return min(fitting)[1] if fitting else None


PLACEMENTS: dict[str, type[Buddy] | type[FirstFit]] = {
    "buddy": Buddy,
    "first_fit": FirstFit,
    "best_fit": BestFit,
}
