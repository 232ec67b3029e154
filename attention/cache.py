"""The paged KV cache: real tensors behind the simulator's own block pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attention.block_allocator import BlockAllocator
from attention.functional import copy_blocks
from attention.in_flight import Fence, InFlight
from attention.metadata import AttentionMetadata, CachedSequence
from sim.pools.block_pool import OutOfBlocks

__all__ = ["AttentionMetadata", "BlockAllocator", "CachedSequence", "OutOfBlocks", "PagedKVCache"]


class PagedKVCache:
    """K and V of many sequences in blocks, for all layers of a model that share the block tables.

    `k` and `v` are `[num_layers, num_blocks, block_size, num_kv_heads, head_dim]`. Where the heads are not told,
    the first use tells them (`bind`); then the tensors are made.

    Args:
        block_size: Tokens per block, as the allocator's.
        hidden_dim: Width of the model, as the allocator's.
        allocator: Hands out the blocks.
        num_layers: Layers that share the tables.
        num_kv_heads: Heads of K and V.
        head_dim: Width of a head.
        dtype: Of K and V.
        device: Where they lie.

    Raises ValueError for sizes that do not go together.
    """

    def __init__(
        self,
        block_size: int,
        hidden_dim: int,
        allocator: BlockAllocator,
        *,
        num_layers: int = 1,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("block_size", block_size), ("hidden_dim", hidden_dim)):
            if size != getattr(allocator, name):
                raise ValueError(f"{name}: got {size}, expected {getattr(allocator, name)} as the allocator")
        if num_layers < 1:
            raise ValueError(f"num_layers: got {num_layers}, expected an integer >= 1")
        if (num_kv_heads is None) != (head_dim is None):
            raise ValueError(
                f"num_kv_heads, head_dim: got {num_kv_heads}, {head_dim}, expected both or neither"
            )
        self.block_size = block_size
        self.hidden_dim = hidden_dim
        self.allocator = allocator
        self.num_layers = num_layers
        self.sequences: dict[int, CachedSequence] = {}
        self.detached: dict[int, str] = {}  # sequences that are elsewhere, and where
        self.in_flight = InFlight(allocator.pool)
        self._next_id = 0
        self._rows: list[int] = []
        self._tensors: tuple[Tensor, Tensor] | None = None
        if num_kv_heads is not None and head_dim is not None:
            self.bind(num_kv_heads, head_dim, dtype or torch.get_default_dtype(), device or "cpu")
        elif dtype is not None or device is not None:
            raise ValueError("dtype, device: got one, expected num_kv_heads and head_dim with it")

    # Tensors

    def bind(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make the tensors, or find that they are such. Raises ValueError where they are not."""
        shape = (self.num_layers, self.allocator.total_blocks, self.block_size, num_kv_heads, head_dim)
        if num_kv_heads < 1 or head_dim < 1 or self.hidden_dim % head_dim:
            raise ValueError(
                f"num_kv_heads, head_dim: got {num_kv_heads}, {head_dim}, expected heads of a width that "
                f"divides hidden_dim {self.hidden_dim}"
            )
        if self._tensors is None:
            self._tensors = (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
        wanted, made = torch.device(device), self.k
        same = wanted.type == made.device.type and wanted.index in (None, made.device.index)
        if tuple(made.shape) != shape or made.dtype != dtype or not same:
            raise ValueError(
                f"cache: got K and V of {list(made.shape[3:])} heads in {made.dtype} on {made.device}, "
                f"expected {list(shape[3:])} in {dtype} on {wanted}"
            )

    @property
    def k(self) -> Tensor:
        """K of all layers. Raises ValueError before the heads are known."""
        return self._bound()[0]

    @property
    def v(self) -> Tensor:
        """V of all layers. Raises ValueError before the heads are known."""
        return self._bound()[1]

    @property
    def layers(self) -> list[Tensor]:
        """The K and V cache of every layer, `[num_blocks, block_size, num_kv_heads, head_dim]` each."""
        return [*self.k.unbind(), *self.v.unbind()]

    def _bound(self) -> tuple[Tensor, Tensor]:
        if self._tensors is None:
            raise ValueError(
                "cache: its heads are not known before the first use; give num_kv_heads and head_dim"
            )
        return self._tensors

    # Sequences

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, and that no copy still reads."""
        self.in_flight.settle()
        return self.allocator.num_free

    @property
    def blocks_saved(self) -> int:
        """Blocks that the allocator would have to hand out more if nobody shared any."""
        return self.allocator.pool.extra_references

    def new(self) -> int:
        """An empty sequence; its id."""
        seq_id = self._next_id
        self._next_id += 1
        self.sequences[seq_id] = CachedSequence()
        return seq_id

    def fork(self, seq_id: int) -> int:
        """A sequence with the same tokens in the same blocks, copied where one of the two writes; its id."""
        parent = self._sequence(seq_id)
        self.allocator.share(parent.blocks)
        child = self.new()
        self.sequences[child] = CachedSequence(list(parent.blocks), parent.length)
        return child

    def free(self, seq_id: int) -> None:
        """Drop a sequence and its references."""
        self.allocator.free(self._sequence(seq_id).blocks)
        del self.sequences[seq_id]

    def reset(self) -> None:
        """Drop all sequences."""
        for seq_id in list(self.sequences):
            self.free(seq_id)
        self.detached.clear()
        self._rows.clear()

    def detach(self, seq_ids: Sequence[int], where: str) -> None:
        """Drop the references of sequences that are elsewhere now; until `attach` they are refused, saying so."""
        for seq_id in seq_ids:
            self.free(seq_id)
            self.detached[seq_id] = where

    def attach(self, seq_id: int, sequence: CachedSequence) -> None:
        """Put a detached sequence back, with blocks that were taken for it."""
        del self.detached[seq_id]
        self.sequences[seq_id] = sequence

    def arrived(self, seq_id: int) -> bool:
        """Whether all K and V of the sequence are here; a step that needs them earlier waits for them."""
        return all(fence.done for fence in self.in_flight.before_reading(self._sequence(seq_id).blocks))

    def length(self, seq_id: int) -> int:
        """Tokens that the sequence has."""
        return self._sequence(seq_id).length

    def block_table(self, seq_id: int) -> list[int]:
        """The blocks of the sequence in order."""
        return list(self._sequence(seq_id).blocks)

    @property
    def has_rows(self) -> bool:
        """Whether a batch that named no sequences has made its own."""
        return bool(self._rows)

    def drop_rows(self) -> None:
        """Drop the sequences of a batch that named none."""
        for seq_id in self._rows:
            self.free(seq_id)
        self._rows.clear()

    def rows(self, batch_size: int) -> list[int]:
        """The sequences of a batch that names none: made at the first call, the same ones from then on.

        Raises ValueError for a batch of another size.
        """
        if not self._rows:
            self._rows = [self.new() for _ in range(batch_size)]
        if len(self._rows) != batch_size:
            raise ValueError(
                f"x: got a batch of {batch_size}, expected {len(self._rows)} as before; reset() begins anew, "
                "seq_ids names other sequences"
            )
        return list(self._rows)

    def extend(self, seq_ids: Sequence[int], num_tokens: int | Sequence[int]) -> AttentionMetadata:
        """Make room for new tokens at the end of sequences, and count them as there.

        A block that others hold too is copied before it is written (copy-on-write), in all layers.

        Args:
            seq_ids: Different sequences.
            num_tokens: New tokens, of all or of each.

        Returns:
            Where to write their K and V, and what to attend over. Where copies are in flight, each layer calls
            `wait(layer)` of it before it writes.

        Raises OutOfBlocks if the pool has too few blocks, ValueError for sequences that are none; both leave
        everything as it was.
        """
        counts = [num_tokens] * len(seq_ids) if isinstance(num_tokens, int) else list(num_tokens)
        if len(counts) != len(seq_ids):
            raise ValueError(f"num_tokens: got {len(counts)} numbers, expected {len(seq_ids)} as seq_ids")
        if counts and min(counts) < 1:
            raise ValueError(f"num_tokens: got {min(counts)}, expected integers >= 1")
        if len(set(seq_ids)) != len(seq_ids):
            raise ValueError(f"seq_ids: got {list(seq_ids)}, expected different sequences")
        sequences = [self._sequence(seq_id) for seq_id in seq_ids]
        copied = self._to_copy(sequences)
        wanted = [
            -(-(sequence.length + count) // self.block_size) - len(sequence.blocks)
            for sequence, count in zip(sequences, counts, strict=True)
        ]
        self.in_flight.make_room(sum(wanted) + sum(copied))
        fresh = iter(self.allocator.allocate(sum(wanted) + sum(copied)))  # nothing has changed if it raises
        pairs = []
        for sequence, count, more, copy in zip(sequences, counts, wanted, copied, strict=True):
            if copy:
                pairs.append((sequence.blocks[-1], next(fresh)))
                sequence.blocks[-1] = pairs[-1][1]
            sequence.blocks += [next(fresh) for _ in range(more)]
            sequence.length += count
        if pairs:
            self.in_flight.hold([source for source, _ in pairs], [target for _, target in pairs])
            copy_blocks(self.layers, torch.tensor(pairs, device=self.k.device), check=False)
            self.allocator.free([source for source, _ in pairs])
        device = self._tensors[0].device if self._tensors else "cpu"
        fences = self._fences(sequences, counts) if self.in_flight else ()
        return AttentionMetadata.of(sequences, counts, self.block_size, device, len(pairs), fences)

    def _fences(self, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> tuple[Fence, ...]:
        """The copies that a step over these new tokens has to wait for."""
        read = [block for sequence in sequences for block in sequence.blocks]
        written = [
            block
            for sequence, count in zip(sequences, counts, strict=True)
            for block in sequence.blocks[(sequence.length - count) // self.block_size :]
        ]
        in_flight = self.in_flight
        return tuple(dict.fromkeys((*in_flight.before_reading(read), *in_flight.before_writing(written))))

    def _to_copy(self, sequences: Iterable[CachedSequence]) -> list[bool]:
        """Whether each sequence's last block has to be copied: the last holder of a block keeps it."""
        left: dict[int, int] = {}
        copied = []
        for sequence in sequences:
            copy = False
            if sequence.length % self.block_size:
                block = sequence.blocks[-1]
                holders = left.get(block, self.allocator.references(block))
                copy = holders > 1
                left[block] = holders - copy
            copied.append(copy)
        return copied

    def _sequence(self, seq_id: int) -> CachedSequence:
        sequence = self.sequences.get(seq_id)
        if sequence is None:
            if seq_id in self.detached:
                raise ValueError(f"seq_ids: got {seq_id!r}, which is {self.detached[seq_id]}")
            known = ", ".join(map(str, list(self.sequences)[:8])) or "none, there are no sequences"
            raise ValueError(f"seq_ids: got {seq_id!r}, expected one of {known}")
        return sequence
