"""Small tiers for tests: memories of a few blocks behind small allocators."""

from __future__ import annotations

from sim import Transfers
from sim.prefixes.eviction import eviction
from sim.tiers.kinds import tier
from sim.tiers.tiered_store import TieredStore
from tests.sim.test_oracle import DEVICE, MODEL, build

BLOCK_BYTES = 1e6

TIERS = {
    "host": [("host", 12)],
    "large host": [("host", 1000)],
    "tiny host, nvme": [("host", 2), ("nvme", 9)],
    "three": [("host", 5), ("nvme", 9), ("remote", 30)],
    "one block each": [("host", 1), ("nvme", 1), ("remote", 1)],
}


def made(kind: str, blocks: int, order: str = "lru", **fields):
    """A tier of so many blocks of a megabyte; 1 GB/s moves one in a millisecond."""
    return tier[kind](BLOCK_BYTES, None, num_blocks=blocks, eviction=eviction[order], **fields)


def store(tiers: str, order: str = "lru", gb_per_s: float = 1.0, **fields) -> TieredStore:
    """A store over tiers of one speed in all directions."""
    speeds = {"bandwidth_gb_per_s": gb_per_s}
    writes = {"nvme": {"write_bandwidth_gb_per_s": gb_per_s}}
    return TieredStore(
        [made(kind, blocks, order, **speeds, **writes.get(kind, {})) for kind, blocks in TIERS[tiers]],
        **fields,
    )


def tiered(allocator_name: str, scheduler_kind: str, slots: int, tiers: str, fields, **policy):
    """An allocator with tiers behind it, and a scheduler over it."""
    memory, over = build(allocator_name, scheduler_kind, slots, **policy)
    memory.open_tiers(store(tiers, **fields))
    return memory, over


def transfers(memory, **fields) -> Transfers:
    """The cost of moving blocks of a tiny model."""
    return Transfers(MODEL, DEVICE, memory.block_size, **fields)
