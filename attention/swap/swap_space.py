"""A swap space: host memory for the KV blocks of sequences that a paged cache has no room for at present."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from attention.cache import CachedSequence, PagedKVCache
from attention.in_flight import InFlight
from attention.swap.host_records import Copied, HostRecords, Streams, record_bytes
from attention.swap.quantization import Quantization, QuantizationError
from sim.pools.block_pool import BlockPool


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

    On a GPU copies run beside compute, each direction on a stream of its own, and nothing here waits for them.
    A step that reads a sequence waits for its swap-in, layer by layer; other steps do not, so that a swap-in may be
    submitted long before anybody needs it. Blocks that are copied are not free until they are (`InFlight` says who
    else waits). With `layers_per_copy=1` a step's first layer waits for a first layer's K and V only; all layers
    together make fewer, longer copies. On a CPU every copy is done at once.

    Sequences that are swapped together keep sharing what they share; what they share with others is copied. All
    or nothing: a swap that raises has changed nothing.

    Args:
        cache: Whose sequences are swapped.
        num_host_blocks: Blocks of the host pool.
        quantization: `int8`, `int4`, `fp8` or a `Quantization`: how K and V are kept in the host pool; None keeps
            them as they are, to the bit.
        measure: Compare what is quantised with its bound at every swap-out. Waits for the device.
        staging_bytes: Memory of the device that a swap takes for gathering K and V; by default 256 MiB on a GPU.
        layers_per_copy: Layers that travel together and that compute waits for together; by default all.
        streams: Where copies run, to the host and to the device; by default streams of their own on a GPU.

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
        layers_per_copy: int | None = None,
        streams: Streams | None = None,
    ) -> None:
        if num_host_blocks < 0:
            raise ValueError(f"num_host_blocks: got {num_host_blocks}, expected an integer >= 0")
        if layers_per_copy is not None and layers_per_copy < 1:
            raise ValueError(f"layers_per_copy: got {layers_per_copy}, expected an integer >= 1")
        self.cache = cache
        self.pool = BlockPool(num_host_blocks, tier="host")
        self.quantization = (
            Quantization.named(quantization) if isinstance(quantization, str) else quantization
        )
        self.measure = measure
        self.staging_bytes = staging_bytes
        self._swapped: dict[int, CachedSequence] = {}
        self.layers_per_copy = layers_per_copy
        self._streams = streams
        self._in_flight = InFlight(self.pool)
        self._records: HostRecords | None = None

    @property
    def num_free(self) -> int:
        """Host blocks that nobody holds, and that no copy reads."""
        self._in_flight.settle()
        return self.pool.num_free

    @property
    def seq_ids(self) -> list[int]:
        """Sequences that are swapped out."""
        return list(self._swapped)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a host block: K and V of all layers, with the scales if quantised."""
        return record_bytes(self.cache, self.quantization, self.cache.num_layers)

    def block_table(self, seq_id: int) -> list[int]:
        """The host blocks of a swapped sequence in order."""
        return list(self._taken([seq_id])[0].blocks)

    def swap_out(self, seq_ids: Sequence[int]) -> Swap:
        """Move sequences to the host and give their blocks on the device back, as they are copied.

        Until `swap_in` the cache refuses them. Raises OutOfBlocks if the host pool has too few free blocks, and
        ValueError for sequences that the cache does not have or that stand twice.
        """
        _check_different(seq_ids)
        tables = [self.cache.block_table(seq_id) for seq_id in seq_ids]
        lengths = [self.cache.length(seq_id) for seq_id in seq_ids]
        sources = list(dict.fromkeys(block for table in tables for block in table))
        self._in_flight.make_room(len(sources))
        targets = sorted(self.pool.take(len(sources)))  # neighbours in the pool travel together
        moved = dict(zip(sources, targets, strict=True))
        copied = None
        if sources:
            counts = _written(tables, lengths, self.cache.block_size)
            with self._undone(self.pool, targets):
                copied = self._host().gather(
                    sources,
                    targets,
                    self.cache.in_flight.before_reading(sources),
                    self._in_flight.before_writing(targets),
                    [counts[block] for block in sources] if self.measure else None,
                )
        self.pool.share(_further(tables, moved))
        self.cache.allocator.share(sources)  # held until they are copied
        self.cache.detach(seq_ids, "swapped out")
        for seq_id, table, length in zip(seq_ids, tables, lengths, strict=True):
            self._swapped[seq_id] = CachedSequence([moved[block] for block in table], length)
        if copied is not None:
            self._in_flight.arrive(copied.written, targets)
            self.cache.in_flight.leave(copied.read, sources)
        return self._told(len(sources), copied)

    def swap_in(self, seq_ids: Sequence[int]) -> Swap:
        """Bring sequences back, in whatever blocks of the device are free; these are taken at once.

        The sequences may run from now on: only a step that reads them waits, in every layer for this layer's
        copies. `cache.arrived` tells whether it would. Raises OutOfBlocks if the device has too few blocks, and
        ValueError for sequences that are not swapped out or that stand twice.
        """
        _check_different(seq_ids)
        swapped = self._taken(seq_ids)
        for seq_id in seq_ids:
            if seq_id not in self.cache.detached:
                raise ValueError(f"seq_ids: got {seq_id}, which the cache has dropped by a reset")
        tables = [sequence.blocks for sequence in swapped]
        sources = sorted({block for table in tables for block in table})
        self.cache.in_flight.make_room(len(sources))
        targets = self.cache.allocator.allocate(len(sources))
        moved = dict(zip(sources, targets, strict=True))
        copied = None
        if sources:
            with self._undone(self.cache.allocator.pool, targets):
                copied = self._host().scatter(
                    sources,
                    targets,
                    self._in_flight.before_reading(sources),
                    self.cache.in_flight.before_writing(targets),
                )
        self.cache.allocator.share(_further(tables, moved))
        self.pool.share(sources)  # held until they are copied
        for seq_id, sequence in zip(seq_ids, swapped, strict=True):
            self.cache.attach(
                seq_id, CachedSequence([moved[block] for block in sequence.blocks], sequence.length)
            )
            self._release(seq_id)
        if copied is not None:
            self.cache.in_flight.arrive(copied.written, targets)
            self._in_flight.leave(copied.read, sources)
        return self._told(len(sources), copied)

    def drop(self, seq_ids: Sequence[int]) -> None:
        """Forget swapped sequences: killed before they came back, or recomputed instead."""
        _check_different(seq_ids)
        self._taken(seq_ids)
        for seq_id in seq_ids:
            self.cache.detached.pop(seq_id, None)
            self._release(seq_id)

    def synchronize(self) -> None:
        """Wait until all copies are done, and free what they held."""
        if self._records is not None:
            self._records.synchronize()
        self._in_flight.settle()
        self.cache.in_flight.settle()

    def _host(self) -> HostRecords:
        """The host's memory and the streams; made at the first swap."""
        if self._records is None:
            self._records = HostRecords(
                self.cache,
                self.pool.num_blocks,
                self.quantization,
                self.staging_bytes,
                self.layers_per_copy or self.cache.num_layers,
                self._streams,
            )
        return self._records

    @contextmanager
    def _undone(self, pool: BlockPool, taken: Sequence[int]) -> Iterator[None]:
        """Blocks taken for copies that fail are free again, when those that were started are done."""
        try:
            yield
        except BaseException:
            try:
                self.synchronize()
            finally:
                pool.release(taken)
            raise

    def _told(self, num_blocks: int, copied: Copied | None) -> Swap:
        if copied is None:
            return Swap(0, 0, 0)
        return Swap(num_blocks, num_blocks * self.bytes_per_block, copied.num_copies, copied.error)

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
