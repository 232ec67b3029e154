"""Copies of KV blocks between a device and host memory: few, long, and beside the compute on a GPU.

A block is small (64 KiB a layer for 16 tokens of 8 heads of 128 in two bytes), far below what fills a PCIe link, so
blocks are gathered into one staging tensor on the device, and neighbours in host memory travel in one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

STAGING_BYTES = {"cuda": 256 << 20, "cpu": 2 << 20}
"""What is gathered at most, unless one block is larger: on a GPU much, for few copies; on a CPU what caches hold."""


class CopyStream:
    """A GPU stream for copies, ordered against compute by events; on the CPU everything is in order by itself.

    Compute is the stream that is current where the object is made: make one for each transfer.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._compute = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._copies = stream or self._compute

    def running(self) -> AbstractContextManager[object]:
        """What is started inside runs on the copy stream."""
        return nullcontext() if self._copies is None else torch.cuda.stream(self._copies)

    def staged(self, values: Iterable[Tensor]) -> Iterable[Tensor]:
        """Values on their way: all at once beside compute on a GPU, one after the other in a CPU's own cache."""
        return values if self._copies is None else list(values)

    def wait_for_compute(self) -> None:
        """Copies started from now on wait for the compute that was started until now."""
        if self._copies is not None and self._compute is not None:
            self._copies.wait_event(self._compute.record_event())

    def hold_compute(self) -> None:
        """Compute started from now on waits for the copies that were started until now."""
        if self._copies is not None and self._compute is not None:
            self._compute.wait_event(self._copies.record_event())


def runs(blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Stretches of consecutive blocks: (first place in the list, first block, number of blocks)."""
    found: list[tuple[int, int, int]] = []
    for place, block in enumerate(blocks):
        if found:
            start, first, count = found[-1]
            if block == first + count:
                found[-1] = (start, first, count + 1)
                continue
        found.append((place, block, 1))
    return found


def to_host(staged: Tensor, host: Tensor, blocks: Sequence[int]) -> int:
    """Copy `staged` `[num_blocks, ...]` to these blocks of `host`; the number of copies that it took."""
    stretches = runs(blocks)
    for place, first, count in stretches:
        host[first : first + count].copy_(staged[place : place + count], non_blocking=True)
    return len(stretches)


def from_host(host: Tensor, staged: Tensor, blocks: Sequence[int]) -> int:
    """Copy these blocks of `host` into `staged` `[num_blocks, ...]`; the number of copies that it took."""
    stretches = runs(blocks)
    for place, first, count in stretches:
        staged[place : place + count].copy_(host[first : first + count], non_blocking=True)
    return len(stretches)


def staging_bytes(device: torch.device) -> int:
    """How much is gathered on a device, unless somebody says otherwise."""
    return STAGING_BYTES.get(device.type, STAGING_BYTES["cuda"])


def batches(num_blocks: int, bytes_per_block: int, staging_bytes: int) -> Iterator[slice]:
    """The blocks in turns, each as many as fit into the staging memory, at least one."""
    size = max(1, staging_bytes // max(1, bytes_per_block))
    for start in range(0, num_blocks, size):
        yield slice(start, min(start + size, num_blocks))


def index(blocks: Sequence[int], device: torch.device) -> Tensor:
    """Block numbers `[num_blocks]` on the device, sent without waiting for it."""
    numbers = torch.tensor(blocks, dtype=torch.int64)
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
