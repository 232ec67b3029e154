"""The queue of free blocks: handed out from its head, put back at either end, taken from the middle by hits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class FreeQueue:
    """Block numbers in order, each at most once; every operation costs what it moves, however long the queue is.

    A block that is removed from the middle stays where it was until it reaches the head or too many have
    gathered; if it has been put back at the tail by then, the place farther to the head is the one that does not
    count. What is put at the head is not removed from there.
    """

    __slots__ = ("_front", "_head", "_left", "_num_left", "_queue", "size")

    def __init__(self, blocks: Iterable[int]) -> None:
        self._front: list[int] = []  # before the queue, its first at the end
        self._queue = list(blocks)
        self._head = 0  # the queue begins here
        self._left: dict[int, int] = {}  # places of each block in the queue that do not count
        self._num_left = 0
        self.size = len(self._queue)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        """From the head on."""
        yield from reversed(self._front)
        yield from self._standing()

    def _standing(self) -> Iterator[int]:
        """From the head of the queue itself on."""
        left = dict(self._left)
        for block in self._queue[self._head :]:
            if left.get(block):
                left[block] -= 1
            else:
                yield block

    def take(self, count: int) -> list[int]:
        """The first `count`, which have to be there."""
        front = self._front
        blocks: list[int] = []
        self.size -= count
        if front and count:
            blocks = front[: -count - 1 : -1]
            del front[-len(blocks) :]
            count -= len(blocks)
        head = self._head
        if self._num_left:
            blocks += self._take_counting(count)
        else:
            self._head = head + count
            taken = self._queue[head : head + count]
            blocks = blocks + taken if blocks else taken
        if self._head > 64 + len(self._queue) // 2:
            del self._queue[: self._head]
            self._head = 0
        return blocks

    def _take_counting(self, count: int) -> list[int]:
        """Of the queue itself, without the places that do not count."""
        queue, left, at = self._queue, self._left, self._head
        blocks: list[int] = []
        while len(blocks) < count:
            block = queue[at]
            at += 1
            places = left.get(block)
            if places is None:
                blocks.append(block)
            else:
                self._num_left -= 1
                if places == 1:
                    del left[block]
                else:
                    left[block] = places - 1
        self._head = at
        return blocks

    def put_first(self, blocks: list[int]) -> None:
        """Put these at the head, in this order."""
        self._front += blocks[::-1]
        self.size += len(blocks)

    def put_last(self, blocks: Sequence[int]) -> None:
        """Put these at the tail, in this order."""
        self._queue.extend(blocks)
        self.size += len(blocks)

    def remove(self, block: int) -> None:
        """Take out a block that was put at the tail."""
        self._left[block] = self._left.get(block, 0) + 1
        self._num_left += 1
        self.size -= 1
        if self._num_left > 64 + (len(self._queue) - self._head) // 2:
            self._compact()

    def _compact(self) -> None:
        self._queue = list(self._standing())
        self._head = 0
        self._left.clear()
        self._num_left = 0
