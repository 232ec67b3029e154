"""A swap space: host memory for the KV blocks of sequences that a paged cache has no room for at present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.cache import CachedSequence, PagedKVCache
from attention.swap.block_copies import CopyStream, batches, from_host, index, staging_bytes, to_host
from attention.swap.quantization import Quantization, QuantizationError, Quantized
from sim.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class Swap:
    """What a swap moved: blocks (a shared one once), bytes over the link, and copies that it took.

    `error` is that of quantising, over the written tokens, if the swap space measures it.
    """

    num_blocks: int
    num_bytes: int
    num_copies: int
    error: QuantizationError | None = None


class SwapSpace:
    """Blocks in host memory, pinned where there is a GPU, that sequences of one cache swap out to.

    A block is kept as one record, the K and V of all layers one behind the other, so a copy moves all layers of
    all neighbours. On a GPU copies have a stream of their own: compute goes on while blocks travel, freed blocks
    may be written as soon as they are gathered, and compute started after a swap-in waits for it.

    Sequences that are swapped together keep sharing what they share; what they share with others is copied. All
    or nothing: a swap that raises has changed nothing.

    Args:
        cache: Whose sequences are swapped.
        num_host_blocks: Blocks of the host pool.
        quantization: `int8`, `int4`, `fp8` or a `Quantization`: how K and V are kept in the host pool; None keeps
            them as they are, to the bit.
        measure: Compare what is quantised with its bound at every swap-out. Waits for the device.
        staging_bytes: Memory of the device that a swap takes for gathering K and V; by default 256 MiB on a GPU.

    Raises ValueError for sizes and quantisations that do not fit.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        num_host_blocks: int,
        *,
        quantization: str | Quantization | None = None,
        measure: bool = False,
        staging_bytes: int | None = None,
    ) -> None:
        if num_host_blocks < 0:
            raise ValueError(f"num_host_blocks: got {num_host_blocks}, expected an integer >= 0")
        self.cache = cache
        self.pool = BlockPool(num_host_blocks, tier="host")
        self.quantization = (
            Quantization.named(quantization) if isinstance(quantization, str) else quantization
        )
        self.measure = measure
        self.staging_bytes = staging_bytes
        self._swapped: dict[int, CachedSequence] = {}
        self._records: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def num_free(self) -> int:
        """Host blocks that nobody holds."""
        return self.pool.num_free

    @property
    def seq_ids(self) -> list[int]:
        """Sequences that are swapped out."""
        return list(self._swapped)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a host block: K and V of all layers, with the scales if quantised."""
        num_layers, _, block_size, num_kv_heads, head_dim = self.cache.k.shape
        if self.quantization is None:
            return 2 * num_layers * block_size * num_kv_heads * head_dim * self.cache.k.itemsize
        return num_layers * self.quantization.bytes_per_block(
            block_size, num_kv_heads, head_dim, self.cache.k.dtype
        )

    def block_table(self, seq_id: int) -> list[int]:
        """The host blocks of a swapped sequence in order."""
        return list(self._taken([seq_id])[0].blocks)

    def swap_out(self, seq_ids: Sequence[int]) -> Swap:
        """Move sequences to the host and give their blocks on the device back.

        Until `swap_in` the cache refuses them. Raises OutOfBlocks if the host pool has too few free blocks, and
        ValueError for sequences that the cache does not have or that stand twice.
        """
        _check_different(seq_ids)
        tables = [self.cache.block_table(seq_id) for seq_id in seq_ids]
        lengths = [self.cache.length(seq_id) for seq_id in seq_ids]
        sources = list(dict.fromkeys(block for table in tables for block in table))
        targets = sorted(self.pool.take(len(sources)))  # neighbours in the pool travel together
        moved = dict(zip(sources, targets, strict=True))
        try:
            swap = self._gather(sources, targets, _written(tables, lengths, self.cache.block_size))
        except BaseException:
            self.pool.release(targets)
            raise
        self.pool.share(_further(tables, moved))
        self.cache.detach(seq_ids, "swapped out")
        for seq_id, table, length in zip(seq_ids, tables, lengths, strict=True):
            self._swapped[seq_id] = CachedSequence([moved[block] for block in table], length)
        return swap

    def swap_in(self, seq_ids: Sequence[int]) -> Swap:
        """Bring sequences back, in whatever blocks of the device are free.

        Raises OutOfBlocks if the device has too few, and ValueError for sequences that are not swapped out or
        that stand twice.
        """
        _check_different(seq_ids)
        swapped = self._taken(seq_ids)
        for seq_id in seq_ids:
            if seq_id not in self.cache.detached:
                raise ValueError(f"seq_ids: got {seq_id}, which the cache has dropped by a reset")
        tables = [sequence.blocks for sequence in swapped]
        sources = sorted({block for table in tables for block in table})
        targets = self.cache.allocator.allocate(len(sources))
        moved = dict(zip(sources, targets, strict=True))
        try:
            swap = self._scatter(sources, targets)
        except BaseException:
            self.cache.allocator.free(targets)
            raise
        self.cache.allocator.share(_further(tables, moved))
        for seq_id, sequence in zip(seq_ids, swapped, strict=True):
            self.cache.attach(
                seq_id, CachedSequence([moved[block] for block in sequence.blocks], sequence.length)
            )
            self._release(seq_id)
        return swap

    def drop(self, seq_ids: Sequence[int]) -> None:
        """Forget swapped sequences: killed before they came back, or recomputed instead."""
        _check_different(seq_ids)
        self._taken(seq_ids)
        for seq_id in seq_ids:
            self.cache.detached.pop(seq_id, None)
            self._release(seq_id)

    def synchronize(self) -> None:
        """Wait until all copies are done; needed only by who reads or times the host's memory."""
        if self._stream is not None:
            self._stream.synchronize()

    # Copies

    def _gather(self, sources: list[int], targets: list[int], written: dict[int, int]) -> Swap:
        if not sources:
            return Swap(0, 0, 0)
        host, device = self._host(), self.cache.k.device
        copies = CopyStream(device, self._stream)
        copies.wait_for_compute()
        num_copies, error = 0, None
        with copies.running():
            for batch in self._batches(len(sources)):
                blocks = index(sources[batch], device)
                staged = self._staged(blocks)
                if batch.stop == len(sources):
                    copies.hold_compute()
                records, quantized = self._encode(staged)
                num_copies += to_host(records, host, targets[batch])
                if quantized is not None and self.measure:
                    counts = torch.tensor([written[block] for block in sources[batch]], device=device)
                    error = _worse(error, self._measured(staged, quantized, counts))
        return Swap(len(sources), len(sources) * self.bytes_per_block, num_copies, error)

    def _scatter(self, sources: list[int], targets: list[int]) -> Swap:
        if not sources:
            return Swap(0, 0, 0)
        host, device = self._host(), self.cache.k.device
        copies = CopyStream(device, self._stream)
        num_copies = 0
        with copies.running():
            for batch in self._batches(len(sources)):
                blocks = index(targets[batch], device)
                records = torch.empty(len(blocks), host.shape[1], dtype=torch.uint8, device=device)
                num_copies += from_host(host, records, sources[batch])
                copies.wait_for_compute()  # which may still read what these blocks held before
                staged = self._decode(records)
                for number, cache in enumerate((self.cache.k, self.cache.v)):
                    cache.transpose(0, 1).index_copy_(0, blocks, staged[:, number])
            copies.hold_compute()
        return Swap(len(sources), len(sources) * self.bytes_per_block, num_copies)

    def _staged(self, blocks: Tensor) -> Tensor:
        """Blocks as records, `[num_blocks, 2, num_layers, block_size, num_kv_heads, head_dim]`."""
        num_layers, _, *block = self.cache.k.shape
        staged = self.cache.k.new_empty(len(blocks), 2, num_layers, *block)
        for number, cache in enumerate((self.cache.k, self.cache.v)):
            staged[:, number] = cache.index_select(1, blocks).transpose(0, 1)
        return staged

    def _encode(self, staged: Tensor) -> tuple[Tensor, Quantized | None]:
        """Records `[num_blocks, bytes_per_block]` of bytes."""
        if self.quantization is None:
            return staged.view(torch.uint8).flatten(1), None
        quantized = self.quantization.quantize(staged)
        return self.quantization.pack(quantized), quantized

    def _decode(self, records: Tensor) -> Tensor:
        """What `_encode` was given, but for the error of quantising."""
        num_layers, _, block_size, num_kv_heads, head_dim = self.cache.k.shape
        rows = (len(records), 2, num_layers, block_size, num_kv_heads)
        dtype = self.cache.k.dtype
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

    def _batches(self, num_blocks: int) -> list[slice]:
        limit = self.staging_bytes or staging_bytes(self.cache.k.device)
        return list(batches(num_blocks, 2 * self.cache.k[:, 0].nbytes, limit))

    def _host(self) -> Tensor:
        """The host's memory, `[num_host_blocks, bytes_per_block]`; made at the first swap."""
        if self._records is None:
            gpu = self.cache.k.device.type == "cuda"
            self._records = torch.empty(
                self.pool.num_blocks, self.bytes_per_block, dtype=torch.uint8, pin_memory=gpu
            )
            self._stream = torch.cuda.Stream(self.cache.k.device) if gpu else None  # type: ignore[no-untyped-call]
        return self._records

    # Books

    def _taken(self, seq_ids: Sequence[int]) -> list[CachedSequence]:
        for seq_id in seq_ids:
            if seq_id not in self._swapped:
                known = ", ".join(map(str, list(self._swapped)[:8])) or "none, nothing is swapped out"
                raise ValueError(f"seq_ids: got {seq_id!r}, expected one of those swapped out: {known}")
        return [self._swapped[seq_id] for seq_id in seq_ids]

    def _release(self, seq_id: int) -> None:
        self.pool.release(self._swapped.pop(seq_id).blocks)


def _check_different(seq_ids: Sequence[int]) -> None:
    if len(set(seq_ids)) != len(seq_ids):
        raise ValueError(f"seq_ids: got {list(seq_ids)}, expected different sequences")


def _further(tables: Sequence[Sequence[int]], moved: dict[int, int]) -> list[int]:
    """The new block of every entry but the first that holds it: references beyond the first."""
    seen: set[int] = set()
    further = []
    for table in tables:
        for block in table:
            if block in seen:
                further.append(moved[block])
            seen.add(block)
    return further


def _written(tables: Sequence[Sequence[int]], lengths: Sequence[int], block_size: int) -> dict[int, int]:
    """Slots of each block that hold a token of some sequence."""
    written: dict[int, int] = {}
    for table, length in zip(tables, lengths, strict=True):
        for place, block in enumerate(table):
            count = min(block_size, length - place * block_size)
            written[block] = max(written.get(block, 0), count)
    return written


def _worse(first: QuantizationError | None, second: QuantizationError) -> QuantizationError:
    if first is None:
        return second
    return QuantizationError(
        max(first.max_error, second.max_error),
        max(first.max_bound, second.max_bound),
        max(first.share, second.share),
        first.num_values + second.num_values,
    )
