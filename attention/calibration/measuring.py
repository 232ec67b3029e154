"""Measuring: seconds of calls on one CPU thread or on a GPU, and the bandwidths of the device's memory.

On a CPU what counts is the CPU time of the process, so that a busy machine does not show; on a GPU many calls in
one CUDA graph between two events, so that launches from Python do not show. Always after a warm-up, and always the
median. Calls are taken in turn from a list: whoever gives several that touch different memory, together more than
the caches hold, measures memory and not the cache (`rotations`).
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sim.errors import UserError

Call = Callable[[], object]

ROUNDS = 7
LAP_S = {"cpu": 2e-3, "cuda": 2e-4}
"""A round takes at least so long, as many calls as that needs."""
CALLS_IN_GRAPH = 20
LONG_LAP_S = 0.05
"""A GPU's round is of `CALLS_IN_GRAPH` calls, unless they take longer than this."""
MAX_CALLS = 4096
MAX_ROTATIONS = 64
CPU_CACHE_BYTES = 64 << 20
"""Larger caches than this are those of a whole host, and others live in them too."""


def find_device(name: str = "auto") -> torch.device:
    """The device of that name: auto is the GPU if there is one. Raises UserError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in LAP_S:
            raise RuntimeError(f"this is a {device.type} device")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device: got {name!r}, expected auto, cpu, or a GPU as cuda or cuda:1: {reason}"
        ) from None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def device_name(device: torch.device) -> str:
    """The device as a table names it: the GPU's name, or the processor's and that it is one thread."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, one thread"


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before the device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [1 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return min(CPU_CACHE_BYTES, max(sizes))


def rotations(working_set: int, device: torch.device) -> int:
    """How many different working sets of so many bytes exceed the cache twice; 1 if one alone does."""
    return min(MAX_ROTATIONS, max(1, math.ceil(2 * cache_bytes(device) / max(1, working_set))))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Stopwatch:
    """Calls, warmed up, that can be timed again and again.

    `capturable` False keeps them out of a CUDA graph: calls that wait for the device or move memory to the host.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, capturable: bool = True) -> None:
        self.calls = list(calls)
        self.device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._next = 0
        if device.type == "cpu":
            with one_thread():
                self.calls[0]()
                first = self._cpu_lap(1)
        else:
            self._warm_up()
            first = max(1e-9, self._events(1))
        wanted = math.ceil(LAP_S[device.type] / max(first, 1e-9))
        if device.type == "cuda":
            wanted = max(wanted, min(CALLS_IN_GRAPH, math.ceil(LONG_LAP_S / first)))
        self.number = min(MAX_CALLS, wanted)
        if device.type == "cuda" and capturable:
            self.number = max(
                len(self.calls), self.number
            )  # a graph repeats its calls, and they are all in it
            self._capture()

    def lap(self) -> float:
        """Seconds of a call, the mean of one round."""
        if self.device.type == "cpu":
            with one_thread():
                return self._cpu_lap(self.number)
        return self._events(self.number)

    def median(self, rounds: int = ROUNDS) -> float:
        """Seconds of a call, the median of some rounds."""
        return statistics.median(self.lap() for _ in range(rounds))

    def _cpu_lap(self, number: int) -> float:
        turns = self._turns(number)
        start = time.process_time()
        for call in turns:
            call()
        return (time.process_time() - start) / number

    def _turns(self, number: int) -> list[Call]:
        """The next calls, where the last round stopped."""
        first, self._next = self._next, (self._next + number) % len(self.calls)
        return [self.calls[(first + index) % len(self.calls)] for index in range(number)]

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                for call in self.calls[:3]:
                    call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)

    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in self._turns(self.number):
                    call()
            graph.replay()
            torch.cuda.synchronize(self.device)
        self._graph = graph

    def _events(self, number: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        turns = self._turns(number) if self._graph is None else []
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)
            start.record()
            if self._graph is not None:
                self._graph.replay()
            for call in turns:
                call()
            end.record()
            torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) / 1e3 / number


def seconds(
    calls: Sequence[Call], device: torch.device, rounds: int = ROUNDS, capturable: bool = True
) -> float:
    """Seconds of a call: the median of some rounds, each over all `calls` in turn."""
    return Stopwatch(calls, device, capturable).median(rounds)


def alternated(first: Stopwatch, second: Stopwatch, pairs: int = 11) -> tuple[float, float, float]:
    """Medians of two things timed in turn, and the median of the ratios first / second of each pair."""
    laps = [(first.lap(), second.lap()) for _ in range(pairs)]
    return (
        statistics.median(a for a, _ in laps),
        statistics.median(b for _, b in laps),
        statistics.median(a / b for a, b in laps),
    )


def copier(num_bytes: int, device: torch.device) -> Call:
    """A copy of so many bytes between two tensors that exist already; it moves twice as many."""
    source = torch.zeros(num_bytes // 4, device=device).fill_(1.0)
    target = torch.empty_like(source).fill_(0.0)
    return lambda: target.copy_(source)


def reader(num_bytes: int, device: torch.device) -> Call:
    """A sum over so many bytes, which reads them once and writes next to nothing."""
    source: Tensor = torch.zeros(num_bytes // 4, device=device).fill_(1.0)
    out = torch.zeros((), device=device)
    return lambda: torch.sum(source, dim=0, out=out)


def bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes moved per second by a large copy (each byte is read and written) and by a large read."""
    size = 1 << 30 if device.type == "cuda" else 256 << 20
    copy = seconds([copier(size, device)], device)
    read = seconds([reader(size, device)], device)
    return 2 * size / copy, size / read
