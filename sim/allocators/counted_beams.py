"""Beam groups whose blocks are counted and not listed, as long as nobody asks which beam holds which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np

from sim.allocators.coming_changes import ComingChanges
from sim.allocators.countable import CountableAllocator
from sim.allocators.counted_group import CountedGroup
from sim.decode_set import DecodeSet
from sim.errors import IntegrityError
from sim.genealogy import COPIES, LEFT, LOST, PARTIAL, SPARED, TAKEN, Ints, changes
from sim.request import NEVER, Request, Sequence

Follow = Callable[[Request, Ints, int, CountedGroup], None]

SOON = 32
"""Ticks after all groups were listed in which none is counted again."""


class CountedBeams:
    """Beam groups of an allocator of equal blocks without block tables.

    Which beam of a group dies when is drawn beforehand, so all that its blocks will do is known when it begins to
    decode: how many are copied, taken and given back with every token. The changes of all groups are summed by tick,
    and a step costs the same whatever their number. The blocks themselves lie in one heap, and are dealt out where
    somebody asks for a table: where a group gives way, or some policies of a scheduler look at what each beam has.
    """

    def __init__(self, owner: CountableAllocator, decodes: DecodeSet, follow: Follow) -> None:
        self._owner = owner
        self._decodes = decodes
        self._follow = follow  # has a group turned over beam by beam from so many tokens on
        self._coming = ComingChanges(owner.max_model_len)
        self._heap: list[int] = []  # blocks of all groups but those of their prefixes
        self._turned = NEVER  # the last tick that was turned over
        self._listed = NEVER  # the last tick at which all had to be listed
        self.groups: dict[Request, CountedGroup] = {}

    def start(self, parent: Sequence, parents: Ints) -> None:
        """A prompt is computed: its beams share what it holds, and go on together."""
        owner, request = self._owner, parent.request
        prompt, final, size = parent.origin, parent.final_tokens, owner.block_size
        if owner.probe is not None:
            owner.probe.hide(parent)
        for branch in range(1, request.width):
            request.sequences.append(Sequence(request, branch, prompt, final))
        request.next_branch = request.width
        whole = owner.share_prompt(parent, request.sequences[1:])
        prefix, tail = parent.block_table[:whole], parent.block_table[whole:]
        parent.block_table = []
        self._heap += tail
        owner.pool.extra_references += (request.width - 1) * len(tail)
        owner.sequences.update(request.sequences)
        start = self._decodes.clock
        found = changes(parents, prompt, final, size)
        self._coming.add(found, start)
        self.groups[request] = request.counted = CountedGroup(self, request, parents, prefix, found, start)
        for sequence in request.sequences:
            sequence.capacity = -(-final // size) * size  # it is never looked at for growth
            self._decodes.join(sequence)

    @property
    def demand(self) -> int:
        """Blocks that the growth of the next tick takes."""
        return int(self._coming[self._decodes.clock + 1][TAKEN])

    def grow(self) -> int:
        """Give all beams the slot of their next token; the number of blocks copied."""
        row = self._coming[self._decodes.clock + 1]
        copies = self._take(row)
        row[:LEFT] = 0
        return copies

    def next_growth(self, group: CountedGroup) -> Ints:
        """What becomes of a group's blocks with the growth of the next tick."""
        row: Ints = group.changes[self._decodes.clock + 1 - group.start, :LEFT]
        return row

    def growing(self) -> list[Request]:
        """Requests whose beams need blocks with the next tick."""
        return [request for request, group in self.groups.items() if group.demand]

    def grow_group(self, group: CountedGroup) -> int:
        """Give the beams of one group the slot of their next token, where others may not get theirs."""
        row = self.next_growth(group)
        self._coming[self._decodes.clock + 1][:LEFT] -= row
        return self._take(row)

    def _take(self, row: Ints) -> int:
        """Take the blocks of a growth; those of them that are copies."""
        owner = self._owner
        copies: int
        copies, taken, written, wasted = row[:LEFT].tolist()
        if taken:
            self._heap += owner.take_blocks(taken)
            owner.pool.extra_references -= copies
            owner.num_held += taken * owner.block_size
            owner.num_tokens += written
            owner.num_internal += wasted
        return copies

    def turn(self) -> None:
        """Turn over the groups that are due at the tick that was just computed."""
        owner = self._owner
        self._turned = tick = self._decodes.clock
        row = self._coming[tick]
        left = int(row[LEFT])
        if left:  # else nothing turns over
            owner.give_back(self._off_heap(left), int(row[PARTIAL]))
            owner.pool.extra_references += left
            owner.num_held -= left * owner.block_size
            owner.num_tokens -= int(row[LOST])
            owner.num_internal -= int(row[SPARED])
            row[LEFT:] = 0

    def quiet_for(self, limit: int) -> int:
        """Ticks after this one, at most so many, before which nothing turns over and in which nothing grows."""
        return self._coming.quiet_for(self._decodes.clock, limit) if self.groups else limit

    def bounded(self, limit: int, spare: int) -> int:
        """Ticks after this one, at most so many, in which all may grow and leave `spare` free blocks each time."""
        return self._coming.bounded(self._decodes.clock, limit, self._owner.pool.num_free - spare)

    def copies(self, ticks: int) -> list[int]:
        """Blocks copied in each of the next ticks."""
        copied: list[int] = self._coming.ahead(self._decodes.clock, ticks)[1:, COPIES].tolist()
        return copied

    def advance(self, ticks: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Turn this tick over, and go through so many more up to the turnover of the last.

        Slots held and wasted in each of these; tokens and blocks saved from this tick on, so one entry more.
        """
        owner, pool, decodes = self._owner, self._owner.pool, self._decodes
        rows = self._coming.ahead(decodes.clock, ticks)
        rows[0, :LEFT] = 0
        rows[-1, LEFT:] = 0
        self._coming.add(-rows, decodes.clock)
        copied, taken, written, wasted = rows[1:, :LEFT].T
        left, lost, spared, partial = rows[:-1, LEFT:].T
        held = owner.num_held + owner.block_size * (taken - left).cumsum()
        internal = owner.num_internal + (wasted - spared).cumsum()
        tokens = np.full(ticks + 1, owner.num_tokens)
        tokens[1:] += (written - lost + decodes.size).cumsum()
        saved = np.full(ticks + 1, pool.extra_references)
        saved[1:] += (left - copied).cumsum()
        if owner.keeps_freed:  # what is handed out in between loses what it holds
            for old, parts, new in zip(left.tolist(), partial.tolist(), taken.tolist(), strict=True):
                if old:
                    owner.give_back(self._off_heap(old), parts)
                if new:
                    self._heap += pool.take(new)
        else:
            blocks = int((taken - left).sum())
            if blocks > 0:
                self._heap += pool.take(blocks)
            elif blocks:
                pool.release(self._off_heap(-blocks))
        owner.num_held, owner.num_internal = int(held[-1]), int(internal[-1])
        owner.num_tokens, pool.extra_references = int(tokens[-1]), int(saved[-1])
        self._turned = decodes.clock + ticks - 1
        return held, internal, tokens, saved

    def free(self, group: CountedGroup, sequence: Sequence) -> None:
        """A beam has its last token; the blocks of its group are free with the last beam."""
        owner = self._owner
        owner.sequences.discard(sequence)
        sequence.capacity = 0
        group.done.append(sequence)
        size, width = owner.block_size, group.parents.shape[1]
        if len(group.done) < width:
            return
        _, taken, written, wasted, left, lost, spared, _ = group.changes.sum(axis=0).tolist()
        prompt, final = group.prompt, group.final
        blocks = (prompt % size > 0) + taken - left
        unused = -final % size * (prompt > final + -final % size - size)
        self._forget(group)
        pool = owner.pool
        pool.extra_references -= width * (-(-final // size) - len(group.prefix)) - blocks
        used = pool.num_used
        owner.leave_group(group, self._off_heap(blocks))
        held = used - pool.num_used  # others may hold blocks of the prompt
        owner.num_held -= held * size
        owner.num_tokens -= (held - blocks) * size + prompt % size + written + width * (final - prompt) - lost
        owner.num_internal -= unused + wasted - spared

    def num_shared(self, group: CountedGroup) -> int:
        """Blocks that beams of a group share now, each but for its first holder."""
        at = self._decodes.clock - group.start
        turned = self._turned == self._decodes.clock
        saved: int = (group.parents.shape[1] - 1) * -(-group.prompt // self._owner.block_size)
        saved += int(group.changes[: at + turned, LEFT].sum() - group.changes[: at + 1, COPIES].sum())
        return saved

    def _off_heap(self, count: int) -> list[int]:
        """So many blocks off the heap, any of them."""
        first = len(self._heap) - count
        blocks = self._heap[first:]
        del self._heap[first:]
        return blocks

    def _forget(self, group: CountedGroup) -> None:
        del self.groups[group.request]
        group.request.counted = None

    def list_all(self) -> None:
        """Give every beam of every group a block table."""
        self._listed = self._decodes.clock
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
        self._coming.add(-rest, group.start + at)
        self._forget(group)
        tables = self._deal(group, self._heap)
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
            self._follow(request, group.parents, tokens + turned, group)
        if owner.probe is not None or owner.keeps_freed:
            group.trace(tokens, turned)
        if owner.probe is not None:
            for sequence in sequences:
                owner.probe.show(sequence)

    def gather(self, group: CountedGroup) -> bool:
        """Count a group again that was listed, after a turnover; whether it shares what its descent says.

        Not soon after all had to be listed.
        """
        owner, decodes, sequences = self._owner, self._decodes, group.request.sequences
        if self._listed != NEVER and decodes.clock - self._listed < SOON:
            return False
        tables = [sequence.block_table for sequence in sequences]
        before, group.start = group.start, decodes.clock - (sequences[0].num_tokens - group.prompt)
        distinct = list(dict.fromkeys(chain.from_iterable(tables)))
        if sum(map(len, tables)) - len(distinct) != self.num_shared(group):
            group.start = before
            return False
        whole = group.prompt // owner.block_size
        behind = distinct[whole:]
        if not owner.forget(behind):
            return False
        if owner.probe is not None:
            for sequence in sequences:
                owner.probe.hide(sequence)
        group.prefix = tables[0][:whole]
        for block in behind:
            owner.pool.refer(block, 1)
        self._heap += behind
        for sequence in sequences:
            if sequence.capacity < sequence.final_tokens:
                decodes.forget_growth(sequence)
            sequence.block_table = []
            sequence.capacity = -(-sequence.final_tokens // owner.block_size) * owner.block_size
        decodes.copy_pending = [each for each in decodes.copy_pending if each.request is not group.request]
        at = decodes.clock - group.start
        self._coming.add(group.changes[at + 1 :], decodes.clock + 1)
        self.groups[group.request] = group.request.counted = group
        return True

    def _deal(self, group: CountedGroup, heap: list[int]) -> list[list[int]]:
        """Block tables of the group's beams, whose blocks are off the heap and have their references."""
        tokens = group.request.sequences[0].num_tokens
        turned = self._turned == self._decodes.clock
        end, refer = len(heap), self._owner.pool.refer
        tables = [group.prefix.copy() for _ in group.request.sequences]
        for line, row in group.ancestors(tokens, turned, self._owner.block_size):
            dealt: dict[int, list[int]] = {}
            for table, beam in zip(tables, line, strict=True):
                if beam not in dealt:
                    dealt[beam] = heap[end - row : end]
                    end -= row
                table += dealt[beam]
            if len(dealt) < len(line):
                for beam, blocks in dealt.items():
                    for block in blocks:
                        refer(block, line.count(beam))
        del heap[end:]
        return tables

    @contextmanager
    def all_listed(self) -> Iterator[None]:
        """For the time being every beam has its block table, and every block its references.

        Raises IntegrityError unless that uses up the blocks that there are.
        """
        owner, heap = self._owner, self._heap.copy()
        members: list[tuple[Sequence, int]] = []
        for group in self.groups.values():
            tables = self._deal(group, heap)
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
