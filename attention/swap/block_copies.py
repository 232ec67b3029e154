"""Copies of KV blocks between a device and host memory: few, long, and beside the compute on a GPU.

A block is small (64 KiB a layer for 16 tokens of 8 heads of 128 in two bytes), far below what fills a PCIe link, so
blocks are gathered into one staging tensor on the device, and neighbours in host memory travel in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from attention.in_flight import Event

STAGING_BYTES = {"cuda": 256 << 20, "cpu": 2 << 20}
"""What is gathered at most, unless one block is larger: on a GPU much, for few copies; on a CPU what caches hold."""


class Done:
    """The event of copies that were over when they were started."""

    def query(self) -> bool:
        """They are."""
        return True


class CopyStream:
    """A GPU stream for copies, ordered against compute by events; on the CPU everything is in order by itself.

    Compute is the stream that is current where these functions are called, copies run on `stream`, by default the
    one that is current where the object is made.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._copies = stream
        if stream is None and device.type == "cuda":
            self._copies = torch.cuda.current_stream(device)

    @classmethod
    def beside(cls, device: torch.device) -> CopyStream:
        """One of its own, on a GPU."""
        gpu = device.type == "cuda"
        return cls(device, torch.cuda.Stream(device) if gpu else None)  # type: ignore[no-untyped-call]

    def running(self) -> AbstractContextManager[object]:
        """What is started inside runs on the copy stream."""
        return nullcontext() if self._copies is None else torch.cuda.stream(self._copies)

    def submit(self, work: Callable[[], object]) -> None:
        """Start work behind what was submitted before."""
        with self.running():
            work()

    def keep(self, *tensors: Tensor) -> None:
        """Memory of these tensors, made elsewhere, is not reused while copies of this stream use it."""
        if self._copies is not None:
            for tensor in tensors:
                tensor.record_stream(self._copies)

    def staged(self, values: Iterable[Tensor]) -> Iterable[Tensor]:
        """Values on their way: all at once beside compute on a GPU, one after the other in a CPU's own cache."""
        return values if self._copies is None else list(values)

    def record(self) -> Event:
        """What is behind all that was submitted until now."""
        return Done() if self._copies is None else self._copies.record_event()

    def wait(self, event: Event) -> None:
        """What is submitted from now on waits for an event of another stream."""
        if self._copies is not None:
            self._copies.wait_event(event)  # type: ignore[arg-type]

    def wait_for_compute(self) -> None:
        """What is submitted from now on waits for the compute that was started until now."""
        if self._copies is not None:
            self._copies.wait_event(torch.cuda.current_stream(self._device).record_event())

    def hold(self, event: Event) -> None:
        """Compute started from now on waits for an event of this stream."""
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(event)  # type: ignore[arg-type]

    def hold_compute(self) -> None:
        """Compute started from now on waits for all that was submitted until now."""
        self.hold(self.record())

    def synchronize(self) -> None:
        """The caller waits for all that was submitted."""
        if self._copies is not None:
            self._copies.synchronize()


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
