"""Copies in flight: which blocks of a pool they read and write, and what has to wait for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sim.pools.block_pool import BlockPool


class Event(Protocol):
    """A place in the order of a stream, as torch.cuda.Event."""

    def query(self) -> bool:
        """Whether everything before it is done."""


class Stream(Protocol):
    """Where copies run one after the other."""

    def hold(self, event: Event) -> None:
        """Compute started from now on waits for the event."""


@dataclass(frozen=True, slots=True, eq=False)
class Fence:
    """A transfer under way: an event of its stream for every `layers_per_event` layers, in the order of layers."""

    stream: Stream
    events: Sequence[Event]
    layers_per_event: int

    @property
    def done(self) -> bool:
        """Whether the transfer is over in all layers."""
        return self.events[-1].query()

    def event(self, layer: int) -> Event:
        """What is behind the copies of a layer."""
        return self.events[layer // self.layers_per_event]

    def wait(self, layer: int) -> None:
        """Compute started from now on waits for this layer's copies, and for no later layer's."""
        self.stream.hold(self.event(layer))

    def wait_for_all(self) -> None:
        """Compute started from now on waits for all layers."""
        self.stream.hold(self.events[-1])


class InFlight:
    """The blocks of one pool that copies still read or write.

    Who reads a block waits for the copy that writes it; who writes it waits for those that read it, too. Blocks
    that a copy reads are not free until it has read them, even if nobody else holds them; where nothing else is
    free (`make_room`) they are given away earlier, to somebody who waits. A fence stays with its blocks, whoever
    holds them, until its copies are done.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._written: dict[int, Fence] = {}
        self._read: dict[int, tuple[Fence, ...]] = {}
        self._kept: deque[tuple[Fence, list[int]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._written or self._read)

    @property
    def kept(self) -> list[int]:
        """Blocks that nobody holds, but for copies that read them."""
        return [block for _, blocks in self._kept for block in blocks]

    def arrive(self, fence: Fence, blocks: Iterable[int]) -> None:
        """A copy writes these blocks."""
        self._written |= dict.fromkeys(blocks, fence)
        self.settle()

    def leave(self, fence: Fence, blocks: Sequence[int]) -> None:
        """A copy reads these blocks; the caller's reference to each is dropped when it has."""
        references = self._pool.references
        shared = [block for block in blocks if references[block] > 1]
        if alone := [block for block in blocks if references[block] == 1]:
            self._kept.append((fence, alone))
        self._pool.release(shared)
        for block in blocks:
            self._read[block] = (*self._read.get(block, ()), fence)
        self.settle()

    def settle(self) -> None:
        """Forget the copies that are done, and free what only they held."""
        if not self:
            return
        fences = {*self._written.values(), *(fence for fences in self._read.values() for fence in fences)}
        going = {fence for fence in fences if not fence.done}
        self._written = {block: fence for block, fence in self._written.items() if fence in going}
        read = {block: tuple(going.intersection(fences)) for block, fences in self._read.items()}
        self._read = {block: fences for block, fences in read.items() if fences}
        kept, self._kept = self._kept, deque()
        for fence, blocks in kept:
            if fence in going:
                self._kept.append((fence, blocks))
            else:
                self._pool.release(blocks)

    def make_room(self, count: int) -> None:
        """Before `count` blocks are taken: free what copies have read, and if need be what they are about to."""
        self.settle()
        while self._kept and self._pool.num_free < count:
            self._pool.release(self._kept.popleft()[1])

    def before_reading(self, blocks: Iterable[int]) -> list[Fence]:
        """What must be over, layer by layer, before these blocks are read."""
        written = self._written
        return list(dict.fromkeys(written[block] for block in blocks if block in written))

    def before_writing(self, blocks: Iterable[int]) -> list[Fence]:
        """What must be over, layer by layer, before these blocks are written."""
        blocks = list(blocks)
        readers = (fence for block in blocks for fence in self._read.get(block, ()))
        return list(dict.fromkeys((*self.before_reading(blocks), *readers)))

    def hold(self, read: Iterable[int] = (), written: Iterable[int] = ()) -> None:
        """Compute started from now on may read and write these blocks in all layers."""
        if self:
            for fence in dict.fromkeys((*self.before_reading(read), *self.before_writing(written))):
                fence.wait_for_all()
