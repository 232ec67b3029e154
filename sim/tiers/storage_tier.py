"""Storage tiers: memories behind the device that keep blocks of cached prefixes, each over a link of its own."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from collections.abc import Sequence as Ordered
from operator import sub
from typing import ClassVar

from sim.errors import IntegrityError, UserError
from sim.link import Link
from sim.prefixes.eviction import Eviction, belady


class Run:
    """Blocks that came to a tier together, from the beginning of a prompt to its end.

    The order of eviction looks at all of them as one, and of equals the last of them goes first. `slots` are where
    they are in their tier, `keys` a range where they follow on one another, `ready` is when they are all there (ns).
    """

    __slots__ = (
        "created", "keys", "number", "order", "priority", "ready", "slots", "tier", "used", "uses"
    )  # fmt: skip

    def __init__(self, keys: Ordered[Hashable], number: tuple[int, int], now: int, priority: int) -> None:
        self.keys = keys
        self.slots: list[int] = []
        self.number = (
            number  # when it came, and how far from the beginning of what came then it begins, negative
        )
        self.tier: StorageTier | None = None
        self.ready = 0
        self.created = self.used = now
        self.uses = 0
        self.priority = priority
        self.order: tuple[int, ...] = ()  # by which it stands on the heap: never behind its true one

    def part(self, begin: int) -> Run:
        """Take the blocks from there on off; the run that they are then."""
        number, offset = self.number
        other = Run(self.keys[begin:], (number, offset - begin), self.created, self.priority)
        other.slots = self.slots[begin:]
        other.tier, other.ready, other.used, other.uses = self.tier, self.ready, self.used, self.uses
        self.keys = self.keys[:begin]
        del self.slots[begin:]
        return other


class Copies:
    """Copies of a planned transfer, by stretches of slots that follow one another; `price` is the seconds of one."""

    __slots__ = ("_last", "price", "stretches")

    def __init__(self, price: float = 0.0) -> None:
        self.price = price
        self.stretches = 0
        self._last = -2

    def add(self, slots: Ordered[int]) -> None:
        """These slots are moved behind the others."""
        steps = [*map(sub, slots, [self._last, *slots])]
        self.stretches += len(steps) - steps.count(1)
        self._last = slots[-1]

    @property
    def seconds(self) -> float:
        """What they take."""
        return self.stretches * self.price

    def clear(self) -> None:
        """They are submitted."""
        self.stretches = 0
        self._last = -2

    def copy(self) -> Copies:
        """The same, to add to."""
        other = Copies(self.price)
        other.stretches, other._last = self.stretches, self._last
        return other


class StorageTier:
    """One memory of blocks behind the device, with an eviction order of its own and a link in both directions.

    Its slots are numbered from 0, one for each block. A transfer takes `latency_us`, the time of its bytes, and that of
    its copies: blocks in slots that follow one another go in one, or in one for each piece where the tier keeps blocks
    in pieces as the device does, K and V of each layer by themselves. How they lie on the device does not matter: a
    kernel gathers them there and spreads them, as in SGLang's HiCache and LMCache. A copy takes what one takes in a
    swap (`price_copies`).
    """

    whole: ClassVar[bool] = True
    """Whether a block is kept in one piece."""

    def __init__(
        self,
        kind: str,
        block_bytes: float,
        *,
        name: str | None,
        capacity_gb: float,
        num_blocks: int | None,
        read_bytes_per_s: float,
        write_bytes_per_s: float,
        latency_us: float,
        eviction: Eviction,
    ) -> None:
        if eviction is belady:
            raise UserError(
                "belady knows all requests beforehand, and what a tier is asked depends on the device"
            )
        if num_blocks is None:
            if not block_bytes:
                raise UserError(
                    "a capacity in GB needs a model: name one, for example opt-13b, or give num_blocks"
                )
            num_blocks = int(capacity_gb * 1e9 // block_bytes)
        if num_blocks < 1:
            raise UserError(
                f"{capacity_gb:g} GB hold no block of {block_bytes:,.0f} bytes, expected one at least"
            )
        self.name = name or kind
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.link = Link(self)
        self.num_used = 0
        self.runs: set[Run] = set()
        self.reads: list[tuple[Run, int]] = []  # of the step that is planned, with the number of blocks
        self.writes: list[tuple[Run, int, list[int]]] = []  # likewise, and a place for its end
        self.read_blocks = self.written_blocks = self.hit_tokens = 0
        self.out = Copies()  # of `writes`
        self.back = Copies()  # of `reads`
        self._latency = latency_us / 1e6
        self._read_block = block_bytes / read_bytes_per_s
        self._write_block = block_bytes / write_bytes_per_s
        self._order = eviction
        self._emptied: list[int] = []  # slots that were used before
        self._heap: list[tuple[tuple[int, ...], tuple[int, int], int, Run]] = []  # entries may be out of date
        self._pushes = 0

    def swap_seconds(self, out_blocks: int, in_blocks: int) -> float:
        """Seconds of a transfer which writes so many blocks, and of one that reads so many, their copies aside."""
        seconds = 0.0
        if out_blocks:
            seconds += self._latency + out_blocks * self._write_block
        if in_blocks:
            seconds += self._latency + in_blocks * self._read_block
        return seconds

    def price_copies(self, out: float, back: float, pieces: int) -> None:
        """Take the seconds of a copy in either direction, and the pieces of a block on the device."""
        number = 1 if self.whole else pieces
        self.out.price, self.back.price = out * number, back * number

    def add(self, run: Run) -> None:
        """Give a run slots; there have to be as many."""
        count = len(run.keys)
        run.slots = self._emptied[-count:]
        del self._emptied[-count:]
        fresh = self.num_used + len(self._emptied) + len(run.slots)
        run.slots += range(fresh, fresh + count - len(run.slots))
        run.tier = self
        self.runs.add(run)
        self.num_used += count
        self.push(run)

    def remove(self, run: Run) -> None:
        """Take a run's slots back."""
        self._emptied += run.slots
        self.num_used -= len(run.slots)
        self.runs.discard(run)
        run.tier = None

    def part(self, run: Run, begin: int) -> Run:
        """Take the blocks from there on off a run; both stay."""
        other = run.part(begin)
        self.runs.add(other)
        self.push(other)
        return other

    def use(self, run: Run, now: int, priority: int) -> None:
        """A run is read."""
        run.used = now
        run.uses += 1
        run.priority = max(run.priority, priority)
        if self._order(run) < run.order:  # one that moves back is moved when it comes up
            self.push(run)

    def evict(self, count: int) -> list[Run]:
        """The `count` blocks that go first, as runs in that order; `slots` are where they were."""
        victims = []
        while count:
            run = self._first()
            if len(run.keys) > count:
                run = run.part(len(run.keys) - count)
            self.remove(run)
            count -= len(run.keys)
            victims.append(run)
        return victims

    def drop(self, count: int) -> list[tuple[Run, Ordered[Hashable]]]:
        """`evict` for good: the runs that are gone or lost their ends, and the keys of what is gone."""
        gone = []
        while count:
            run = self._first()
            keys = run.keys
            left = len(keys) - count
            if left > 0:
                run.keys, keys = keys[:left], keys[left:]
                self._emptied += run.slots[left:]
                del run.slots[left:]
                self.num_used -= count
                count = 0
            else:
                self.remove(run)
                count = -left
            gone.append((run, keys))
        return gone

    def _first(self) -> Run:
        """The run whose blocks go first."""
        heap = self._heap
        while True:
            stood, _, _, run = heap[0]
            if run.tier is self and stood == run.order:
                if self._order(run) == stood:
                    return run
                heapq.heappop(heap)
                self.push(run)
            else:  # gone, or moved forward since
                heapq.heappop(heap)

    def push(self, run: Run) -> None:
        """Let a run stand on the heap as it is now."""
        run.order = self._order(run)
        self._pushes += 1
        heapq.heappush(self._heap, (run.order, run.number, self._pushes, run))
        if len(self._heap) > 4 * len(self.runs) + 64:
            self._heap = [(each.order, each.number, 0, each) for each in self.runs]
            heapq.heapify(self._heap)

    def check_integrity(self) -> None:
        """Recount the slots. Raises IntegrityError with the equation that failed."""
        slots = [slot for run in self.runs for slot in run.slots]
        if len(slots) != self.num_used or len(slots) > self.num_blocks:
            raise IntegrityError(
                f"{self.name}: slots({len(slots)}) != used({self.num_used}) of {self.num_blocks}"
            )
        if sorted([*slots, *self._emptied]) != list(range(len(slots) + len(self._emptied))):
            raise IntegrityError(
                f"{self.name}: used({len(slots)}) and emptied({len(self._emptied)}) slots overlap"
            )
        standing = {run for order, _, _, run in self._heap if order == run.order}
        for run in self.runs:
            if run.tier is not self or len(run.keys) != len(run.slots) or run not in standing:
                raise IntegrityError(f"{self.name}: a run of {len(run.keys)} keys has {len(run.slots)} slots")
