"""Beam groups whose blocks are counted and not listed, as long as nobody asks which beam holds which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from sim.decode_set import DecodeSet
from sim.errors import IntegrityError
from sim.genealogy import COPIES, LEFT, LOST, SPARED, TAKEN, Ints, changes
from sim.request import NEVER, Lineage, Request, Sequence

if TYPE_CHECKING:
    from sim.allocators.paged import PagedAllocator
    from sim.beams import BeamSearch


class CountedGroup:
    """A beam group while its blocks are counted: its genealogy, and the changes that follow from it."""

    __slots__ = ("_owner", "changes", "parents", "prefix", "prompt", "request", "start", "unfreed")

    def __init__(
        self, owner: CountedBeams, request: Request, parents: Ints, prefix: list[int], found: Ints, start: int
    ) -> None:
        self._owner = owner
        self.request = request
        self.parents = parents
        self.prefix = prefix  # the prompt's full blocks, which all beams hold
        self.prompt = request.sequences[0].origin
        self.changes = found
        self.start = start  # the tick at which the prompt was computed
        self.unfreed = len(request.sequences)

    def list_blocks(self) -> None:
        """Give every beam a block table of its own; it is one among other sequences from then on."""
        self._owner.list_blocks(self)

    def free(self, sequence: Sequence) -> None:
        """A beam has its last token."""
        self._owner.free(self, sequence)

    def line(self, tokens: int, turned: bool) -> list[int]:
        """Of each beam the one that it was a step ago, with so many tokens; all are one behind the prompt."""
        if tokens == self.prompt:
            return [0] * self.parents.shape[1]
        if turned:
            line: list[int] = self.parents[tokens - self.prompt - 1].tolist()
            return line
        return list(range(self.parents.shape[1]))

    def trace(self, tokens: int, turned: bool) -> None:
        """Tell every beam its lineage, with so many tokens each, as if it had been followed from fork to fork."""
        request, prompt, width = self.request, self.prompt, self.parents.shape[1]
        lines = [None, *(Lineage(prompt, branch, None) for branch in range(1, width))]
        past = self.parents[: max(0, tokens + turned - prompt - 1)]
        turning = (past != np.arange(width)).any(axis=1).nonzero()[0]
        for step, parents in zip(turning.tolist(), past[turning].tolist(), strict=True):
            lives = 1
            while lives < width and parents[lives] > parents[lives - 1]:
                lives += 1
            before = lines
            lines = [before[parent] for parent in parents[:lives]]
            for parent in parents[lives:]:
                lines.append(Lineage(prompt + step + 1, request.next_branch, before[parent]))
                request.next_branch += 1
        for sequence, line in zip(request.sequences, lines, strict=True):
            sequence.lineage = line

    def ancestors(self, tokens: int, turned: bool, size: int) -> list[list[int]]:
        """Of each block behind the prefix the beam that filled it, for each beam; shape [blocks, beams].

        `turned` says whether the turnover at so many tokens is over.
        """
        prompt = self.prompt
        found: list[list[int]] = []
        line = self.line(tokens, turned)
        for length in range(tokens, prompt, -1):
            if length == tokens or length % size == 0:
                found.append(line)
            if length - 1 > prompt:
                before = self.parents[length - prompt - 2].tolist()
                line = [before[beam] for beam in line]
        if tokens == prompt and prompt % size:
            found.append(line)
        return found[::-1]


class CountedBeams:
    """Beam groups of a paged allocator without block tables.

    Which beam of a group dies when is drawn beforehand, so all that its blocks will do is known when it begins to
    decode: how many are copied, taken and given back with every token. The changes of all groups are summed by tick,
    and a step costs the same whatever their number. The blocks themselves lie in one heap, and are dealt out where
    somebody asks for a table: when memory runs short, before a swap, where a group does not decode.
    """

    def __init__(self, owner: PagedAllocator, decodes: DecodeSet, search: BeamSearch) -> None:
        self._owner = owner
        self._decodes = decodes
        self._search = search
        self._mask = (1 << owner.max_model_len.bit_length()) - 1
        self._coming = np.zeros((self._mask + 1, 7), np.int64)  # changes by tick, modulo its length
        self._heap: list[int] = []  # blocks of all groups but those of their prefixes
        self._grown = self._turned = NEVER  # the last ticks whose changes were made
        self.groups: dict[Request, CountedGroup] = {}

    def start(self, parent: Sequence, parents: Ints) -> None:
        """A prompt is computed: its beams share what it holds, and go on together."""
        owner, request = self._owner, parent.request
        prompt, final, size = parent.origin, parent.final_tokens, owner.block_size
        whole = prompt // size
        prefix, tail = parent.block_table[:whole], parent.block_table[whole:]
        if owner.probe is not None:
            owner.probe.hide(parent)
        parent.block_table = []
        for branch in range(1, request.width):
            request.sequences.append(Sequence(request, branch, prompt, final))
        request.next_branch = request.width
        for block in prefix:
            owner.pool.refer(block, request.width)
        self._heap += tail
        owner.pool.extra_references += (request.width - 1) * (whole + len(tail))
        owner.sequences.update(request.sequences)
        start = self._decodes.clock
        found = changes(parents, prompt, final, size)
        self._add(found, start, 1)
        self.groups[request] = request.counted = CountedGroup(self, request, parents, prefix, found, start)
        for sequence in request.sequences:
            sequence.capacity = -(-final // size) * size  # it is never looked at for growth
            self._decodes.join(sequence)

    def _add(self, found: Ints, tick: int, sign: int) -> None:
        """Sum changes from a tick on up, or take them out."""
        begin = tick & self._mask
        split = self._mask + 1 - begin
        self._coming[begin : begin + len(found)] += sign * found[:split]
        if split < len(found):
            self._coming[: len(found) - split] += sign * found[split:]

    @property
    def demand(self) -> int:
        """Blocks that the growth of the next tick takes."""
        tick = self._decodes.clock + 1 & self._mask
        return int(self._coming[tick, TAKEN])

    def grow(self) -> int:
        """Give all beams the slot of their next token; the number of blocks copied."""
        owner = self._owner
        self._grown = tick = self._decodes.clock + 1
        row = self._coming[tick & self._mask]
        copies: int
        copies, taken, written, wasted, *_ = row.tolist()
        if taken:
            row[:LEFT] = 0
            if owner.yielding:
                owner.make_room(taken)
            self._heap += owner.pool.take(taken)
            owner.pool.extra_references -= copies
            owner.num_held += taken * owner.block_size
            owner.num_tokens += written
            owner.num_internal += wasted
        return copies

    def turn(self) -> None:
        """Turn over the groups that are due at the tick that was just computed."""
        owner = self._owner
        self._turned = tick = self._decodes.clock
        row = self._coming[tick & self._mask]
        left = int(row[LEFT])
        if left:  # else nothing turns over
            owner.pool.release(self._heap[-left:])
            del self._heap[-left:]
            owner.pool.extra_references += left
            owner.num_held -= left * owner.block_size
            owner.num_tokens -= int(row[LOST])
            owner.num_internal -= int(row[SPARED])
            row[LEFT:] = 0

    def quiet_for(self, limit: int) -> int:
        """Ticks after this one, at most so many, before which nothing turns over and in which nothing grows."""
        tick, mask = self._decodes.clock, self._mask
        if not self.groups:
            return limit
        if self._coming[tick & mask, LEFT]:
            return 0
        limit = min(limit, mask)
        ahead = np.arange(tick + 1, tick + limit + 1) & mask
        busy = self._coming[ahead, TAKEN] > 0
        busy[1:] |= self._coming[ahead[:-1], LEFT] > 0
        return int(busy.argmax()) if busy.any() else limit

    def _ahead(self, ticks: int) -> Ints:
        """Changes of this tick and of so many after it."""
        first = self._decodes.clock
        rows: Ints = self._coming[np.arange(first, first + ticks + 1) & self._mask]
        return rows

    def bounded(self, limit: int, spare: int) -> int:
        """Ticks after this one, at most so many, in which all may grow and leave `spare` free blocks each time."""
        limit = min(limit, self._mask)
        if limit < 1:
            return 0
        rows = self._ahead(limit)
        taken = rows[1:, TAKEN].cumsum()
        free = self._owner.pool.num_free + rows[:-1, LEFT].cumsum() - taken
        short = free < spare
        return int(short.argmax()) if short.any() else limit

    def copies(self, ticks: int) -> list[int]:
        """Blocks copied in each of the next ticks."""
        copied: list[int] = self._ahead(ticks)[1:, COPIES].tolist()
        return copied

    def advance(self, ticks: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Turn this tick over, and go through so many more up to the turnover of the last.

        Slots held and wasted in each of these; tokens and blocks saved from this tick on, so one entry more.
        """
        owner, pool, decodes = self._owner, self._owner.pool, self._decodes
        rows = self._ahead(ticks)
        first, last = rows[0], rows[-1]
        first[:LEFT] = 0
        last[LEFT:] = 0
        for tick, row in ((decodes.clock, first), (decodes.clock + ticks, last)):
            self._coming[tick & self._mask] -= row
        inner = np.arange(decodes.clock + 1, decodes.clock + ticks) & self._mask
        self._coming[inner] = 0
        copied, taken, written, wasted = rows[1:, :LEFT].T
        left, lost, spared = rows[:-1, LEFT:].T
        held = owner.num_held + owner.block_size * (taken - left).cumsum()
        internal = owner.num_internal + (wasted - spared).cumsum()
        tokens = np.full(ticks + 1, owner.num_tokens)
        tokens[1:] += (written - lost + decodes.size).cumsum()
        saved = np.full(ticks + 1, pool.extra_references)
        saved[1:] += (left - copied).cumsum()
        blocks = int((taken - left).sum())
        if blocks > 0:
            self._heap += pool.take(blocks)
        elif blocks:
            pool.release(self._heap[blocks:])
            del self._heap[blocks:]
        owner.num_held, owner.num_internal = int(held[-1]), int(internal[-1])
        owner.num_tokens, pool.extra_references = int(tokens[-1]), int(saved[-1])
        self._grown, self._turned = decodes.clock + ticks, decodes.clock + ticks - 1
        return held, internal, tokens, saved

    def free(self, group: CountedGroup, sequence: Sequence) -> None:
        """A beam has its last token; the blocks of its group are free with the last beam."""
        owner = self._owner
        owner.sequences.discard(sequence)
        sequence.capacity = 0
        group.unfreed -= 1
        if group.unfreed:
            return
        size, width = owner.block_size, group.parents.shape[1]
        _, taken, written, wasted, left, lost, spared = group.changes.sum(axis=0).tolist()
        ticks = len(group.changes) - 1
        blocks = (group.prompt % size > 0) + taken - left
        final = group.prompt + ticks
        unused = -final % size * (group.prompt > final + -final % size - size)
        self._forget(group)
        pool, prefix = owner.pool, group.prefix
        pool.extra_references -= (
            (width - 1) * len(prefix) + width * (-(-final // size) - len(prefix)) - blocks
        )
        for block in prefix:
            pool.refer(block, 1)
        pool.release(prefix + self._heap[len(self._heap) - blocks :])
        del self._heap[len(self._heap) - blocks :]
        owner.num_held -= (len(prefix) + blocks) * size
        owner.num_tokens -= group.prompt + written + width * ticks - lost
        owner.num_internal -= unused + wasted - spared

    def _forget(self, group: CountedGroup) -> None:
        del self.groups[group.request]
        group.request.counted = None

    def list_all(self) -> None:
        """Give every beam of every group a block table."""
        for group in list(self.groups.values()):
            self.list_blocks(group)

    def list_blocks(self, group: CountedGroup) -> None:
        """Deal the group's blocks out to its beams, and let the search follow them one by one."""
        owner, decodes, request = self._owner, self._decodes, group.request
        sequences = request.sequences
        tokens = sequences[0].num_tokens
        at = tokens - group.prompt
        turned = self._turned == decodes.clock
        rest = group.changes[at:].copy()
        rest[0, :LEFT] = 0
        if turned or not at:
            rest[0] = 0
        self._add(rest, group.start + at, -1)
        self._forget(group)
        tables = self.tables(group, self._heap)
        blocks = self._refer(tables, len(group.prefix))
        del self._heap[len(self._heap) - blocks :]
        for sequence, table in zip(sequences, tables, strict=True):
            sequence.block_table = table
            sequence.capacity = len(table) * owner.block_size
        if sequences[0].decodes is not None:
            for sequence in sequences:
                if sequence.capacity < sequence.final_tokens:
                    decodes.await_growth(sequence)
            line = group.line(tokens, turned)
            decodes.copy_pending += [
                sequence for sequence, beam in zip(sequences, line, strict=True) if line.count(beam) > 1
            ]
            self._search.follow(request, group.parents, tokens + turned)
        if owner.probe is not None:
            group.trace(tokens, turned)
            for sequence in sequences:
                owner.probe.show(sequence)

    def _refer(self, tables: list[list[int]], whole: int) -> int:
        """Set the references of the blocks in these tables from an index on; the number of blocks."""
        counts = Counter(block for table in tables for block in table[whole:])
        for block, count in counts.items():
            self._owner.pool.refer(block, count)
        return len(counts)

    def tables(self, group: CountedGroup, heap: list[int]) -> list[list[int]]:
        """Block tables of the group's beams, dealt from the end of the heap, which stays as it is."""
        tokens = group.request.sequences[0].num_tokens
        turned = self._turned == self._decodes.clock
        next_block = reversed(heap)
        tables = [group.prefix.copy() for _ in group.request.sequences]
        for line in group.ancestors(tokens, turned, self._owner.block_size):
            blocks = {beam: next(next_block) for beam in dict.fromkeys(line)}
            for table, beam in zip(tables, line, strict=True):
                table.append(blocks[beam])
        return tables

    @contextmanager
    def all_listed(self) -> Iterator[None]:
        """For the time being every beam has its block table, and every block its references.

        Raises IntegrityError unless that uses up the blocks that there are.
        """
        owner, heap = self._owner, self._heap.copy()
        members: list[tuple[Sequence, int]] = []
        for group in self.groups.values():
            tables = self.tables(group, heap)
            whole = len(group.prefix)
            del heap[len(heap) - self._refer(tables, whole) :]
            for sequence, table in zip(group.request.sequences, tables, strict=True):
                members.append((sequence, sequence.capacity))
                sequence.block_table, sequence.capacity = table, len(table) * owner.block_size
        try:
            if heap:
                raise IntegrityError(
                    f"blocks of counted groups({len(self._heap)}) != dealt out, {len(heap)} less"
                )
            yield
        finally:
            for sequence, capacity in members:
                sequence.block_table, sequence.capacity = [], capacity
            for block in self._heap:
                owner.pool.refer(block, 1)
