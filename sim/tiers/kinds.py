"""Kinds of tiers: the host's memory, a flash drive, a store on other machines, with published figures as defaults."""

from __future__ import annotations

from typing import Annotated

from sim.hardware import Device
from sim.prefixes.eviction import Eviction, lru
from sim.prefixes.eviction import eviction as evictions
from sim.registry import NonNegativeFloat, PositiveFloat, PositiveInt, Registry
from sim.tiers.storage_tier import StorageTier

PCIE_4 = 25e9
"""Bytes per second that large copies reach over PCIe 4.0 x16, where no device is known."""

tier: Registry[type[StorageTier]] = Registry("tier")


@tier("host")
class HostTier(StorageTier):
    """Memory of the host, behind the device's own link; K and V of each layer lie by themselves.

    Fields:
        name: What its figures are called by.
        capacity_gb: Bytes that it keeps; by default an eighth of the 2 TB of a DGX A100, which has eight devices.
        num_blocks: Blocks that it keeps, in place of capacity_gb.
        bandwidth_gb_per_s: Of each direction; by default 0.75 of the device's datasheet.
        latency_us: Fixed time of a transfer.
        eviction: Which block goes first when it is full.
    """

    whole = False

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
