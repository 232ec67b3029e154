"""Storage tiers: memories behind the device that keep blocks of cached prefixes, each over a link of its own."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from typing import Annotated

from sim.errors import IntegrityError, UserError
from sim.eviction import Eviction, belady, lru
from sim.eviction import eviction as evictions
from sim.hardware import Device
from sim.link import Link
from sim.registry import NonNegativeFloat, PositiveFloat, PositiveInt, Registry

PCIE_4 = 25e9
"""Bytes per second that large copies reach over PCIe 4.0 x16, where no device is known."""


class Entry:
    """A block in a tier: its key, where it is, when it is all there (ns), and what an eviction order looks at."""

    __slots__ = (
        "created", "key", "order", "pins", "priority", "ready", "slot", "tier", "used", "uses"
    )  # fmt: skip

    def __init__(self, key: Hashable, now: int, priority: int) -> None:
        self.key = key
        self.tier: StorageTier | None = None
        self.slot = -1
        self.ready = 0
        self.created = self.used = now
        self.uses = 0
        self.priority = priority
        self.pins = 0  # admissions that are about to load it
        self.order: tuple[int, ...] = ()  # by which it stands on the heap: never behind its true one


class StorageTier:
    """One memory of blocks behind the device, with an eviction order of its own and a link in both directions.

    Its slots are numbered from 0, one for each block. A transfer takes `latency_us` and the time of its bytes, however
    many blocks it moves, as they travel together.
    """

    def __init__(
        self,
        kind: str,
        block_bytes: float,
        *,
        name: str | None,
        capacity_gb: float | None,
        num_blocks: int | None,
        read_bytes_per_s: float,
        write_bytes_per_s: float,
        latency_us: float,
        eviction: Eviction,
    ) -> None:
        if eviction is belady:
            raise UserError("belady knows all requests beforehand, and what a tier is asked depends on the device")
        if num_blocks is None:
            if capacity_gb is None or not block_bytes:
                raise UserError("a capacity in GB needs a model: name one, for example opt-13b, or give num_blocks")
            num_blocks = int(capacity_gb * 1e9 // block_bytes)
        if num_blocks < 1:
            raise UserError(f"{capacity_gb:g} GB hold no block of {block_bytes:,.0f} bytes, expected one at least")
        self.name = name or kind
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.link = Link(self)
        self.entries: dict[int, Entry] = {}  # by slot
        self.reads: list[Entry] = []  # of the step that is planned
        self.writes: list[tuple[Entry, int | None]] = []  # likewise, with the block if it comes from the device
        self.read_blocks = self.written_blocks = self.dropped_blocks = self.hit_tokens = 0
        self._latency = latency_us / 1e6
        self._read_block = block_bytes / read_bytes_per_s
        self._write_block = block_bytes / write_bytes_per_s
        self._order = eviction
        self._emptied: list[int] = []  # slots that were used before
        self._heap: list[tuple[tuple[int, ...], int, Entry]] = []  # entries of it may be out of date
        self._pushes = 0

    def swap_seconds(self, out_blocks: int, in_blocks: int) -> float:
        """Seconds that a transfer takes which writes so many blocks, and one that reads so many."""
        seconds = 0.0
        if out_blocks:
            seconds += self._latency + out_blocks * self._write_block
        if in_blocks:
            seconds += self._latency + in_blocks * self._read_block
        return seconds

    @property
    def full(self) -> bool:
        """Whether a further block needs the place of another."""
        return len(self.entries) == self.num_blocks

    def add(self, entry: Entry) -> None:
        """Give a block a slot; there has to be one."""
        entry.slot = self._emptied.pop() if self._emptied else len(self.entries)
        entry.tier = self
        self.entries[entry.slot] = entry
        self._push(entry)

    def remove(self, entry: Entry) -> None:
        """Take a block's slot back."""
        del self.entries[entry.slot]
        self._emptied.append(entry.slot)
        entry.tier = None

    def use(self, entry: Entry, now: int, priority: int) -> None:
        """A block is read."""
        entry.used = now
        entry.uses += 1
        entry.priority = max(entry.priority, priority)
        if self._order(entry) < entry.order:  # one that moves back is moved when it comes up
            self._push(entry)

    def evict(self) -> Entry | None:
        """Take the slot of the block that goes first; None if all are about to be read."""
        pinned: list[Entry] = []
        victim = None
        while self._heap and victim is None:
            stood, _, entry = heapq.heappop(self._heap)
            if entry.tier is not self or stood != entry.order:
                continue  # gone, or moved forward since
            if entry.pins:
                pinned.append(entry)
            elif self._order(entry) == stood:
                victim = entry
            else:
                self._push(entry)
        for entry in pinned:
            self._push(entry)
        if victim is not None:
            self.remove(victim)
        return victim

    def _push(self, entry: Entry) -> None:
        if len(self._heap) > 4 * len(self.entries) + 64:
            standing = {each: each.order for _, _, each in self._heap if each.tier is self}
            self._heap = [(order, number, each) for number, (each, order) in enumerate(standing.items())]
            self._pushes = max(self._pushes, len(self._heap))
            heapq.heapify(self._heap)
        entry.order = self._order(entry)
        self._pushes += 1
        heapq.heappush(self._heap, (entry.order, self._pushes, entry))

    def check_integrity(self) -> None:
        """Recount the slots. Raises IntegrityError with the equation that failed."""
        count = len(self.entries)
        if count > self.num_blocks:
            raise IntegrityError(f"{self.name}: blocks({count}) > capacity({self.num_blocks})")
        if sorted([*self.entries, *self._emptied]) != list(range(count + len(self._emptied))):
            raise IntegrityError(f"{self.name}: used({count}) and emptied({len(self._emptied)}) slots overlap")
        for slot, entry in self.entries.items():
            if entry.tier is not self or entry.slot != slot:
                raise IntegrityError(f"{self.name}, slot {slot}: its block says slot {entry.slot}")
        standing = {entry.slot for order, _, entry in self._heap if entry.tier is self and order == entry.order}
        if standing != self.entries.keys():
            raise IntegrityError(f"{self.name}: blocks that can be evicted({len(standing)}) != blocks({count})")


tier: Registry[type[StorageTier]] = Registry("tier")


@tier("host")
class HostTier(StorageTier):
    """Memory of the host, behind the device's own link.

    Fields:
        name: What its figures are called by.
        capacity_gb: Bytes that it keeps; the default is an eighth of what a server of eight devices has (DGX A100: 2 TB).
        num_blocks: Blocks that it keeps, in place of capacity_gb.
        bandwidth_gb_per_s: Of each direction; by default that of `transfers`, 0.75 of the device's datasheet.
        latency_us: Fixed time of a transfer.
        eviction: Which block goes first when it is full.
    """

    def __init__(
        self,
        block_bytes: float,
        device: Device | None,
        *,
        name: str | None = None,
        capacity_gb: PositiveFloat = 256.0,
        num_blocks: PositiveInt | None = None,
        bandwidth_gb_per_s: PositiveFloat | None = None,
        latency_us: NonNegativeFloat = 10.0,
        eviction: Annotated[Eviction, evictions] = lru,
    ) -> None:
        if bandwidth_gb_per_s is not None:
            bandwidth = bandwidth_gb_per_s * 1e9
        else:
            bandwidth = 0.75 * device.host_bytes_per_s * device.count if device is not None else PCIE_4
        super().__init__(
            "host", block_bytes, name=name, capacity_gb=capacity_gb, num_blocks=num_blocks,
            read_bytes_per_s=bandwidth, write_bytes_per_s=bandwidth, latency_us=latency_us, eviction=eviction,
        )  # fmt: skip


@tier("nvme")
class NvmeTier(StorageTier):
    """A flash drive of the host; by default one of PCIe 4.0 (Samsung PM9A3, U.2: 6.5 GB/s read, 3.5 written).

    Fields:
        name: What its figures are called by.
        capacity_gb: Bytes that it keeps; the default is one drive of 3.84 TB, which a DGX H100 has for each device.
        num_blocks: Blocks that it keeps, in place of capacity_gb.
        bandwidth_gb_per_s: What is read.
        write_bandwidth_gb_per_s: What is written.
        latency_us: Fixed time of a transfer; that of a read from flash.
        eviction: Which block goes first when it is full.
    """

    def __init__(
        self,
        block_bytes: float,
        device: Device | None,
        *,
        name: str | None = None,
        capacity_gb: PositiveFloat = 3840.0,
        num_blocks: PositiveInt | None = None,
        bandwidth_gb_per_s: PositiveFloat = 6.5,
        write_bandwidth_gb_per_s: PositiveFloat = 3.5,
        latency_us: NonNegativeFloat = 100.0,
        eviction: Annotated[Eviction, evictions] = lru,
    ) -> None:
        super().__init__(
            "nvme", block_bytes, name=name, capacity_gb=capacity_gb, num_blocks=num_blocks,
            read_bytes_per_s=bandwidth_gb_per_s * 1e9, write_bytes_per_s=write_bandwidth_gb_per_s * 1e9,
            latency_us=latency_us, eviction=eviction,
        )  # fmt: skip


@tier("remote")
class RemoteTier(StorageTier):
    """A store on other machines, behind a network of 100 Gb/s (Mooncake, FAST 2025, and LMCache have such stores).

    Fields:
        name: What its figures are called by.
        capacity_gb: Bytes that it keeps.
        num_blocks: Blocks that it keeps, in place of capacity_gb.
        bandwidth_gb_per_s: Of each direction.
        latency_us: Fixed time of a transfer; a round trip inside a data centre.
        eviction: Which block goes first when it is full.
    """

    def __init__(
        self,
        block_bytes: float,
        device: Device | None,
        *,
        name: str | None = None,
        capacity_gb: PositiveFloat = 10000.0,
        num_blocks: PositiveInt | None = None,
        bandwidth_gb_per_s: PositiveFloat = 12.5,
        latency_us: NonNegativeFloat = 500.0,
        eviction: Annotated[Eviction, evictions] = lru,
    ) -> None:
        super().__init__(
            "remote", block_bytes, name=name, capacity_gb=capacity_gb, num_blocks=num_blocks,
            read_bytes_per_s=bandwidth_gb_per_s * 1e9, write_bytes_per_s=bandwidth_gb_per_s * 1e9,
            latency_us=latency_us, eviction=eviction,
        )  # fmt: skip


def leading(keys: Iterable[Hashable], entries: dict[Hashable, Entry]) -> list[Entry]:
    """The blocks with these keys up to the first that no tier has."""
    found = []
    for key in keys:
        entry = entries.get(key)
        if entry is None:
            break
        found.append(entry)
    return found
