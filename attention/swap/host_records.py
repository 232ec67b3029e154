"""Host records: KV blocks in host memory, whole or quantised, and the copies that bring them there and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attention.cache import PagedKVCache
from attention.in_flight import Event, Fence
from attention.swap.block_copies import CopyStream, batches, from_host, index, runs, staging_bytes, to_host
from attention.swap.quantization import Quantization, QuantizationError, Quantized

Streams = tuple[CopyStream, CopyStream]
"""Where copies run to the host, and to the device: a link carries both directions at once."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A transfer that was submitted: when its sources are read, when its targets are written, what it took.

    `error` is that of quantising, if it is measured.
    """

    read: Fence
    written: Fence
    num_copies: int
    error: QuantizationError | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What is staged at once: some blocks of one group of layers. `begins` and `ends` its group's transfer."""

    group: int
    layers: slice
    blocks: slice
    begins: bool
    ends: bool


class Staged(deque[Tensor]):
    """Pieces on their way, the first to come first.

    `last` keeps what the piece before was made of until there is another: memory that is given back to the system
    and asked for anew for every piece is a fifth of the time of a quantised swap on a CPU.
    """

    last: tuple[object, ...] = ()


class HostRecords:
    """Host memory for blocks of a cache, pinned where there is a GPU, and a copy stream for each direction.

    A record is the K and V of one block in `layers_per_copy` layers; neighbouring records of the same layers
    travel in one copy. Layers go in the order in which a model needs them, each group with events of its own.

    Args:
        cache: Whose blocks.
        num_blocks: Blocks in host memory.
        quantization: How K and V are kept; None keeps them to the bit.
        staging: Bytes of the device's memory for what is gathered.
        layers_per_copy: Layers in a record.
        streams: Where copies run.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        num_blocks: int,
        quantization: Quantization | None,
        staging: int | None,
        layers_per_copy: int,
        streams: Streams | None,
    ) -> None:
        self.quantization = quantization
        self._cache = cache
        device, gpu = cache.k.device, cache.k.device.type == "cuda"
        self._staging = staging or staging_bytes(device)
        self._size = layers_per_copy
        self._groups = [
            slice(first, min(first + layers_per_copy, cache.num_layers))
            for first in range(0, cache.num_layers, layers_per_copy)
        ]
        self._out, self._in = streams or (CopyStream.beside(device), CopyStream.beside(device))
        for stream in (self._out, self._in):
            stream.keep(cache.k, cache.v)
        self._records = [
            torch.empty(
                num_blocks,
                record_bytes(cache, quantization, group.stop - group.start),
                dtype=torch.uint8,
                pin_memory=gpu,
            )
            for group in self._groups
        ]

    def gather(
        self, sources: Sequence[int], targets: Sequence[int], reads: Sequence[Fence], writes: Sequence[Fence],
        counts: Sequence[int] | None,
    ) -> Copied:  # fmt: skip
        """Copy blocks of the device to the host, behind the compute that was started before.

        Args:
            sources: Blocks of the device.
            targets: Blocks of the host.
            reads: What must be over before the sources are read.
            writes: What must be over before the targets are written.
            counts: Written slots of each source; with them the error of quantising is measured, which waits.
        """
        stream, staged = self._out, Staged()
        gathered, landed = list[Event](), list[Event]()
        errors = list[QuantizationError]()
        num_copies = 0
        stream.wait_for_compute()
        for window in self._windows(len(sources)):
            for piece in window:
                self._wait(stream, piece, reads)
                stream.submit(partial(self._gather, piece, sources, staged))
                if piece.ends:
                    gathered.append(stream.record())
            for piece in window:
                self._wait(stream, piece, writes)
                stream.submit(partial(self._send, piece, targets, staged, counts, errors))
                num_copies += len(runs(targets[piece.blocks]))
                if piece.ends:
                    landed.append(stream.record())
        if counts is not None and self.quantization is not None:
            stream.synchronize()
        fences = Fence(stream, gathered, self._size), Fence(stream, landed, self._size)
        return Copied(*fences, num_copies, QuantizationError.worst(errors))

    def scatter(
        self, sources: Sequence[int], targets: Sequence[int], reads: Sequence[Fence], writes: Sequence[Fence]
    ) -> Copied:
        """Copy blocks of the host to the device; arguments as `gather`.

        The way over the link may overlap with compute that was started before, as much as is staged; only
        scattering into the cache waits for it.
        """
        stream, staged = self._in, Staged()
        fetched, landed = list[Event](), list[Event]()
        num_copies = 0
        for window in self._windows(len(sources)):
            for piece in window:
                self._wait(stream, piece, reads)
                stream.submit(partial(self._fetch, piece, sources, staged))
                num_copies += len(runs(sources[piece.blocks]))
                if piece.ends:
                    fetched.append(stream.record())
            if window[0].group == 0:
                stream.wait_for_compute()  # which may still read what these blocks held before
            for piece in window:
                self._wait(stream, piece, writes)
                stream.submit(partial(self._place, piece, targets, staged))
                if piece.ends:
                    landed.append(stream.record())
        return Copied(Fence(stream, fetched, self._size), Fence(stream, landed, self._size), num_copies)

    def synchronize(self) -> None:
        """Wait until all copies are done."""
        for stream in (self._out, self._in):
            stream.synchronize()

    # Pieces

    def _windows(self, num_blocks: int) -> Iterator[list[Piece]]:
        """Pieces in the order of layers, as many at once as the staging memory takes, at least one."""
        window: list[Piece] = []
        room = self._staging
        for group, layers in enumerate(self._groups):
            size = 2 * self._cache.k[layers, 0].nbytes
            for blocks in batches(num_blocks, size, self._staging):
                piece = Piece(group, layers, blocks, blocks.start == 0, blocks.stop == num_blocks)
                taken = size * (blocks.stop - blocks.start)
                if window and taken > room:
                    yield window
                    window, room = [], self._staging
                window.append(piece)
                room -= taken
        if window:
            yield window

    def _wait(self, stream: CopyStream, piece: Piece, fences: Sequence[Fence]) -> None:
        """The first piece of some layers waits for other copies of them."""
        if piece.begins:
            for fence in fences:
                stream.wait(fence.event(piece.layers.stop - 1))

    # Copies, which run on a stream

    def _gather(self, piece: Piece, sources: Sequence[int], staged: Staged) -> None:
        """Stage blocks in one piece, `[num_blocks, 2, num_layers, block_size, num_kv_heads, head_dim]`."""
        numbers = index(sources[piece.blocks], self._cache.k.device)
        num_layers, _, *block = self._cache.k[piece.layers].shape
        values = self._cache.k.new_empty(len(numbers), 2, num_layers, *block)
        for number, cache in enumerate((self._cache.k, self._cache.v)):
            values[:, number] = cache[piece.layers].index_select(1, numbers).transpose(0, 1)
        staged.append(values)

    def _send(
        self, piece: Piece, targets: Sequence[int], staged: Staged, counts: Sequence[int] | None,
        errors: list[QuantizationError],
    ) -> None:  # fmt: skip
        """Encode what was staged first, and copy it to the host."""
        host, values = self._records[piece.group], staged.popleft()
        if self.quantization is None:
            to_host(values.view(torch.uint8).flatten(1), host, targets[piece.blocks])
            return
        quantized = self.quantization.quantize(values)
        records = self.quantization.pack(quantized)
        to_host(records, host, targets[piece.blocks])
        staged.last = values, quantized, records
        if counts is not None:
            written = torch.tensor(counts[piece.blocks], device=values.device)
            errors.append(self._measured(values, quantized, written))

    def _fetch(self, piece: Piece, sources: Sequence[int], staged: Staged) -> None:
        """Stage records of the host on the device."""
        host, blocks = self._records[piece.group], sources[piece.blocks]
        records = torch.empty(len(blocks), host.shape[1], dtype=torch.uint8, device=self._cache.k.device)
        from_host(host, records, blocks)
        staged.append(records)

    def _place(self, piece: Piece, targets: Sequence[int], staged: Staged) -> None:
        """Decode the records that were staged first, and put them into blocks of the cache."""
        records = staged.popleft()
        values = self._decoded(piece.layers, records)
        numbers = index(targets[piece.blocks], values.device)
        for number, cache in enumerate((self._cache.k, self._cache.v)):
            cache[piece.layers].transpose(0, 1).index_copy_(0, numbers, values[:, number])
        staged.last = values, records

    def _decoded(self, layers: slice, records: Tensor) -> Tensor:
        """What was gathered, but for the error of quantising."""
        num_layers, _, block_size, num_kv_heads, head_dim = self._cache.k[layers].shape
        rows = (len(records), 2, num_layers, block_size, num_kv_heads)
        dtype = self._cache.k.dtype
        if self.quantization is None:
            return records.view(dtype).view(*rows, head_dim)
        quantized = self.quantization.unpack(records, rows, head_dim, dtype)
        return self.quantization.dequantize(quantized, head_dim, dtype)

    def _measured(self, staged: Tensor, quantized: Quantized, counts: Tensor) -> QuantizationError:
        """The error over written tokens: `counts` `[num_blocks]` are those at the beginning of each block."""
        assert self.quantization is not None
        mask = torch.arange(staged.shape[3], device=staged.device) < counts[:, None]
        parts = (quantized.codes.view(torch.uint8), quantized.scales, staged)  # float8 is indexed as bytes
        codes, scales, rows = (part.movedim(3, 1)[mask] for part in parts)
        codes = codes.view(quantized.codes.dtype)
        return self.quantization.measure(rows, Quantized(codes, scales))


def record_bytes(cache: PagedKVCache, quantization: Quantization | None, num_layers: int) -> int:
    """Bytes of the K and V of one block in so many layers, with the scales if quantised."""
    _, _, block_size, num_kv_heads, head_dim = cache.k.shape
    if quantization is None:
        return 2 * num_layers * block_size * num_kv_heads * head_dim * cache.k.itemsize
    return num_layers * quantization.bytes_per_block(block_size, num_kv_heads, head_dim, cache.k.dtype)
