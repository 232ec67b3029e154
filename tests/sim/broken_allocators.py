"""Broken allocators: ways of losing or mixing up tokens, each with what the probe has to say of it."""

from __future__ import annotations

from sim import Allocator, Capacity
from sim.allocators import ContiguousAllocator, PagedAllocator

OWN = r"step \d+: sequence \d+\.\d, token \d+, (device|host) slot \d+: expected its own content \(0x\w+\), found "
ANOTHERS = OWN + r"(token \d+ of sequence \d+\.\d \(0x\w+\)|a token of nobody that is live \(0x\w+\))"
UNWRITTEN = OWN + r"nothing, as nobody wrote there"
OVER = r"sequence \d+\.\d, token \d+, device slot \d+ is written over token \d+ of sequence \d+\.\d"
WRONG = f"{ANOTHERS}|{UNWRITTEN}|{OVER}"
FREE = r"is in block \d+, which is free"
POOL = r"blocks without references\(\d+\) != free\(\d+\)"
HELD = r"at the end of the run: device blocks still held\(\d+\) != 0, block \d+ for one"


class Paged(PagedAllocator):
    """Where the broken ones start from: small blocks, and no books of its own to be caught by."""

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity, block_size=4, watermark=0.0)

    def check_integrity(self) -> None:
        """Not asked: the ledger has to do alone."""


BROKEN: dict[str, tuple[type[Allocator], str]] = {}


def broken(expected: str):
    """Register an allocator under what is wrong with it, with what the probe is to say."""

    def register(cls: type[Allocator]) -> type[Allocator]:
        BROKEN[cls.__name__] = cls, expected
        return cls

    return register


# Blocks


@broken(f"{WRONG}|{POOL}")
class DoubleAllocation(Paged):
    """A block that was handed out stays on the free list."""

    def reserve(self, sequence, num_tokens):
        held = super().reserve(sequence, num_tokens)
        self.pool.free.append(sequence.block_table[-1])
        return held


@broken(f"{ANOTHERS}|{OVER}")
class TwoTablesOneBlock(Paged):
    """A new sequence gets the first block of another one instead of its own, references and all."""

    def reserve(self, sequence, num_tokens):
        held = super().reserve(sequence, num_tokens)
        for other in self.sequences:
            if other.request is not sequence.request and other.block_table:
                self.pool.release(sequence.block_table[:1])
                self.pool.share(other.block_table[:1])
                sequence.block_table[0] = other.block_table[0]
                break
        return held


@broken(r"expected slot \d+, offset \d of block \d+ in its block table")
class OffByOne(Paged):
    """Slots start one behind the block."""

    def slots(self, sequence):
        return (super().slots(sequence) + 1) % (self.pool.num_blocks * 4)


@broken(r"sequence \d+\.0, token \d+, device slot \d+ is outside the 100 slots")
class OutsideTheMemory(Paged):
    """Block numbers are counted from the end of the pool."""

    def reserve(self, sequence, num_tokens):
        held = super().reserve(sequence, num_tokens)
        sequence.block_table[0] += self.pool.num_blocks
        return held

    def release(self, sequence):
        sequence.block_table[0] -= self.pool.num_blocks
        super().release(sequence)


@broken(f"{ANOTHERS}|{OVER}")
class SwappedEntries(Paged):
    """Two entries of a block table change places when the sequence grows."""

    def grow(self, batches):
        books = super().grow(batches)
        for _, sequences in batches:
            for sequence in sequences:
                table = sequence.block_table
                table[0], table[1] = table[1], table[0]
        return books


@broken(r"sequence \d+\.\d has \d+ tokens, and \d+ blocks of 4 slots|and slots for \d+")
class PastTheTail(Paged):
    """A sequence grows by a block that it never gets."""

    def grow(self, batches):
        books = super().grow(batches)
        for _, sequences in batches:
            for sequence in sequences:
                self.pool.release((sequence.block_table.pop(),))
        return books


@broken(f"{WRONG}|{FREE}")
class BlockLetGo(Paged):
    """A sequence gives its first block back when it grows, and goes on using it."""

    def grow(self, batches):
        books = super().grow(batches)
        for _, sequences in batches:
            for sequence in sequences:
                if self.pool.references[sequence.block_table[0]]:
                    self.pool.release(sequence.block_table[:1])
        return books

    def release(self, sequence):
        self.pool.release([block for block in sequence.block_table if self.pool.references[block]])
        sequence.block_table = []


@broken(HELD)
class Leak(Paged):
    """The last block of a sequence never comes back."""

    def release(self, sequence):
        self.pool.release(sequence.block_table[:-1])
        sequence.block_table = []


# Sharing


@broken(f"{ANOTHERS}|{OVER}")
class NoCopyOnWrite(Paged):
    """A shared block is written into as if it were one's own."""

    def append(self, sequence):
        if sequence.num_tokens < sequence.capacity:
            return 0
        return super().append(sequence)


@broken(UNWRITTEN)
class EmptyCopy(Paged):
    """A shared block is replaced by a new one, and nothing is copied."""

    def append(self, sequence):
        probe, self.probe = self.probe, None
        copied = super().append(sequence)
        self.probe = probe
        return copied


@broken(WRONG)
class CopyOfTheWrongBlock(Paged):
    """What is copied is the block beside the shared one."""

    def append(self, sequence):
        probe = self.probe

        class Misled:
            def copy(self, source, target):
                probe.copy((source + 1) % pool.num_blocks, target)

        pool = self.pool
        self.probe = Misled()
        copied = super().append(sequence)
        self.probe = probe
        return copied


@broken(f"{WRONG}|{FREE}")
class ReferencesTooLow(Paged):
    """A fork counts all blocks as shared but the first."""

    def fork(self, parent, child):
        super().fork(parent, child)
        self.pool.release(child.block_table[:1])

    def release(self, sequence):
        self.pool.release([block for block in sequence.block_table if self.pool.references[block]])
        sequence.block_table = []


@broken(HELD)
class ReferencesTooHigh(Paged):
    """A fork counts the first block twice."""

    def fork(self, parent, child):
        super().fork(parent, child)
        self.pool.share(child.block_table[:1])


@broken(f"{WRONG}|{FREE}")
class SharedBlockFreed(Paged):
    """A branch that ends takes its blocks with it, whoever else uses them."""

    def free(self, sequence):
        for block in sequence.block_table:
            extra = self.pool.references[block] - 1
            if extra > 0:
                self.pool.references[block] = 1
                self.pool.extra_references -= extra
        super().free(sequence)

    def release(self, sequence):
        self.pool.release([block for block in sequence.block_table if self.pool.references[block]])
        sequence.block_table = []


@broken(WRONG)
class ForkOfTheWrongBranch(Paged):
    """A fork of a beam shares the memory of another beam of the request."""

    def fork(self, parent, child):
        super().fork(parent, child)
        for other in parent.request.sequences:
            if other is not parent and len(other.block_table) == len(child.block_table):
                self.pool.share(other.block_table)
                self.pool.release(child.block_table)
                child.block_table = other.block_table.copy()
                break


# Swapping


@broken(UNWRITTEN)
class NothingSwapped(Paged):
    """Swapped sequences get blocks, and nothing is moved into them."""

    def _move(self, request, source, target):
        probe, self.probe = self.probe, None
        moved = super()._move(request, source, target)
        self.probe = probe
        return moved


@broken(WRONG)
class StaleSwap(Paged):
    """Blocks come back to the device in another order than they left it."""

    def swap_in(self, request):
        moved = super().swap_in(request)
        for sequence in request.sequences:
            sequence.block_table.reverse()
        return moved


@broken(WRONG)
class SwappedToTheWrongPlace(Paged):
    """Blocks are moved one place further than the table says."""

    def _move(self, request, source, target):
        probe = self.probe

        class Misled:
            def swap(self, tier, pairs, sequences=()):
                sources, targets = zip(*pairs, strict=True)
                led = list(zip(sources, [*targets[1:], targets[0]], strict=True))
                probe.swap(tier, led, sequences)

        self.probe = Misled()
        moved = super()._move(request, source, target)
        self.probe = probe
        return moved


@broken(f"{WRONG}|{POOL}")
class HostBlockReused(Paged):
    """The host forgets at once which blocks hold something."""

    def swap_out(self, request):
        moved = super().swap_out(request)
        self.host_pool.free += sorted(
            {block for sequence in request.sequences for block in sequence.block_table}
        )
        return moved

    def swap_in(self, request):
        free = self.host_pool.free
        mine = {block for sequence in request.sequences for block in sequence.block_table}
        moved = super().swap_in(request)
        self.host_pool.free = [*(block for block in free if block not in mine), *sorted(mine)]
        return moved


# Chunks


class Chunks(ContiguousAllocator):
    """Where the broken ones start from."""

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(capacity, reserve="oracle", placement="first_fit")

    def check_integrity(self) -> None:
        """Not asked: the ledger has to do alone."""


SHARED_CHUNK = (
    r"sequence \d+\.0, slot \d+: expected it for itself alone, found it held by sequence \d+\.0 too"
)


@broken(SHARED_CHUNK)
class TwoOnOneChunk(Chunks):
    """A request is put where another one is."""

    def reserve(self, sequence, num_tokens):
        size = super().reserve(sequence, num_tokens)
        self._chunks[sequence] = 0, size
        return size


@broken(SHARED_CHUNK)
class ChunkOneTooLow(Chunks):
    """A chunk starts one slot before its place."""

    def slots(self, sequence):
        return super().slots(sequence) - (self._chunks[sequence][0] > 0)


@broken(f"{ANOTHERS}|{UNWRITTEN}")
class ChunkThatMoves(Chunks):
    """A chunk is moved by a slot, and its content is not."""

    def slots(self, sequence):
        _, size = self._chunks[sequence]
        moved = sequence.num_tokens % 16 == 9 and sequence.num_tokens < size
        return super().slots(sequence) + moved


@broken(r"at the end of the run: sequence \d+\.0 never ended, and has \d+ slots|slots still held\(\d+\) != 0")
class ChunkKept(Chunks):
    """A reservation is never struck from the books."""

    def free(self, sequence):
        held = self.num_held
        super().free(sequence)
        self.num_held = held
