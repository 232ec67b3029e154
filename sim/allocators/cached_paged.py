"""Paged KV memory with vLLM V0's prefix caching."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from collections.abc import Sequence as Ordered
from typing import NamedTuple

from sim.allocators.capacity import Capacity
from sim.allocators.paged import PagedAllocator
from sim.allocators.shared_tails import TailSharingAllocator
from sim.pools.hashed_blocks import HashedPool
from sim.prefixes.keys import prefix_keys, sequence_keys, tail_key
from sim.request import Request, Sequence


class Lowered(NamedTuple):
    """What a block is known by whose content came through a swap at a lower precision."""

    key: Hashable
    precision: str


class CachedPagedAllocator(TailSharingAllocator):
    """`PagedAllocator` whose blocks are known by all tokens up to their ends (`CachedBlockAllocator` of V0, 0.4.2).

    A prompt takes every block that is known, its last one too though it may be filled in part: copy-on-write parts
    those who share it. Its leading blocks need not be computed if they are flagged as computed, which are all full
    blocks but the last of whoever ran with them; never its last block. Admission asks for room as if nothing were
    found. Freed blocks stay known until they are evicted (`sim/pools/hashed_blocks.py`).

    V0 touches the blocks of all running sequences in every step. Here a block's last use is set when somebody
    leaves it, to the last step that he took part in; and a block that fills up while decoding gets its key then, as
    nobody asks for it before. Where V0 would swap a block into one that somebody has written on in since, as both
    were known by the same beginning, it goes to a block of its own.

    What comes back from a swap at a lower precision is known as such, to others that come back alone; prompts do not
    find it. What a sequence fills from then on follows from it, and is not found at all.
    """

    def __init__(
        self,
        capacity: Capacity,
        *,
        block_size: int = 16,
        watermark: float = 0.01,
        num_host_blocks: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        super().__init__(capacity, block_size, watermark, num_host_blocks)
        self._tails: dict[
            Sequence, int
        ] = {}  # where in its table a sequence has a block known by a part of it
        self._lowered: set[Sequence] = set()  # that came back less precise
        self._moves = 0  # blocks that were swapped without a key
        self._ready: set[Sequence] = set()  # whose prompts are computed
        self._last_full: dict[Sequence, int] = {}  # the last full block of a prompt when it was computed
        self._last: dict[int, list[Sequence]] = {}  # the same by block
        # Steps: a plan that computes prompts counts as one, every decode step as one.
        self._plans = 0  # that computed prompts
        self._plans_before = 0  # of them, those before the last decode step
        self._tick = -1  # decode steps at the last of them
        self._in_plan = False
        self._used: dict[Sequence, int] = {}  # the last step with tokens of a sequence's prompt

    # Time

    def _now(self) -> int:
        """The step that is planned, which computes prompts."""
        if not self._in_plan or self._tick != self.num_ticks:
            if self._tick != self.num_ticks:
                self._tick, self._plans_before = self.num_ticks, self._plans
            self._plans += 1
            self._in_plan = True
        return self.num_ticks + self._plans

    def _last_use(self, sequence: Sequence) -> int:
        """The last step that the sequence took part in."""
        used = self._used[sequence]
        if sequence not in self._ready or sequence in self._done:
            return used
        plans = self._plans_before if self._tick == self.num_ticks else self._plans
        return max(used, self.num_ticks + plans)

    # Prompts

    def _is_computed(self, block: int, index: int) -> bool:
        """Whether V0 would have flagged a block by now: its holders have filled the one behind it too."""
        if self.pool.computed[block]:
            return True
        holders = self._last.get(block)
        filled = (index + 2) * self.block_size
        return holders is not None and any(holder.num_tokens >= filled for holder in holders)

    def _find_tail(self, sequence: Sequence, num_tokens: int) -> tuple[int | None, int | None]:
        """The key of a prompt's last block that it fills in part, and the block that has it."""
        forked = sequence.branch and sequence.lineage is not None
        key = None if forked else self._tail_key(sequence.request, num_tokens)
        block = None if key is None else self.pool.find(key)
        if block is not None:
            end = -(-num_tokens // self.block_size) * self.block_size
            if any(sharer.num_tokens >= end for sharer in self._sharers.get(block, ())):
                self.pool.rename(block, None)  # it is full since
                block = None
        return key, block

    def _keys(self, sequence: Sequence, num_blocks: int) -> Ordered[int]:
        """Keys of the sequence's first full blocks."""
        return sequence_keys(sequence, num_blocks, self.block_size)

    def _tail_key(self, request: Request, num_tokens: int) -> int | None:
        """The key of a prompt's last block, which it fills in part; None if nobody else can have it."""
        return tail_key(request, num_tokens)

    def cached_tokens(self, request: Request, num_tokens: int) -> int:
        """Those in the leading blocks that are known and computed."""
        if not request.content and not request.preemptions:
            return 0
        size = self.block_size
        count = 0
        blocks = (num_tokens - 1) // size
        first = request.sequences[0] if request.sequences else None
        for key in prefix_keys(request, blocks, size) if first is None else self._keys(first, blocks):
            block = self.pool.find(key)
            if block is None or not self._is_computed(block, count):
                break
            count += 1
        return count * size

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Give a sequence the blocks that are known, and new ones; the tokens that it need not compute."""
        if filled is None:
            filled = num_tokens
        self._used[sequence] = self._now()
        request, pool, size = sequence.request, self.pool, self.block_size
        blocks = -(-num_tokens // size)
        cached = 0
        if request.content or request.preemptions:
            known = self._hold_known(sequence, blocks, filled, filled == request.prefill_tokens)
            table = sequence.block_table
            while cached < min(known, blocks - 1) and self._is_computed(table[cached], cached):
                cached += 1
            if sequence.sibling is not None:  # which is computed in this step
                cached = max(cached, sequence.sibling[1])
                sequence.sibling = None
            if self.probe is not None and cached:
                self.probe.touch(pool.tier, table[:cached])
        else:
            sequence.block_table = pool.take(blocks)
        sequence.capacity = blocks * size
        sequence.origin = filled
        self.sequences.add(sequence)
        self._count(sequence, 1)
        if self.probe is not None:
            self.probe.begin(sequence)
        return cached * size

    def _hold_known(self, sequence: Sequence, blocks: int, filled: int, whole: bool) -> int:
        """Fill a table in order: each block is found, or a new one takes the key; how far there are any."""
        pool, size = self.pool, self.block_size
        table: list[int] = []
        sequence.block_table = table
        for key in self._keys(sequence, filled // size):
            table.append(pool.obtain(key))
        if whole and filled % size:
            self._hold_tail(sequence, filled)
        known = len(table)
        table += pool.take(blocks - known)
        return known

    def _hold_tail(self, sequence: Sequence, filled: int) -> None:
        """The last block of a prompt, which it fills in part."""
        pool, table = self.pool, sequence.block_table
        key, found = self._find_tail(sequence, filled)
        if found is None:
            table += pool.take()
            pool.rename(table[-1], key)
        else:
            alone = not pool.references[found]
            pool.hold(found)
            table.append(found)
            if alone:
                self._cut(found, filled % self.block_size)
        if key is not None:
            self._tails[sequence] = len(table) - 1
            self._share_tail(sequence, table[-1])

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a prompt that is computed in part; what is full is known from then on."""
        super().extend(sequence, num_tokens)
        self._used[sequence] = self._now()
        if sequence.request.content:
            self._name(sequence, min(sequence.origin, sequence.request.prompt_tokens) // self.block_size)

    def computed(self, sequence: Sequence) -> None:
        """The prompt is computed: flag its full blocks but the last, whose turn comes with the next full one."""
        self._in_plan = False
        self._ready.add(sequence)
        if sequence.request.content or sequence.request.preemptions:
            self._flag_filled(sequence)

    def _flag_filled(self, sequence: Sequence) -> None:
        full = sequence.num_tokens // self.block_size
        if full:
            self._flag(sequence, full)
            self._last_full[sequence] = block = sequence.block_table[full - 1]
            self._last.setdefault(block, []).append(sequence)

    def _flag(self, sequence: Sequence, full: int) -> None:
        computed = self.pool.computed
        for block in reversed(sequence.block_table[: max(0, full - 1)]):
            if computed[block]:
                break  # those before it are not looked at
            computed[block] = 1

    def _name(self, sequence: Sequence, full: int) -> None:
        """Let the first full blocks be found, where their content is not found elsewhere."""
        if sequence in self._lowered:
            return
        pool = self.pool
        keys = self._keys(sequence, full)
        for block, key in zip(sequence.block_table, keys, strict=False):
            if pool.keys[block] is None and pool.find(key) is None:
                pool.rename(block, key)

    # Ends

    def _settle(self, sequence: Sequence, *, stays: bool) -> None:
        """Before a sequence leaves its blocks: what has become of them while it decoded."""
        size, table = self.block_size, sequence.block_table
        full = sequence.num_tokens // size
        request = sequence.request
        tail = self._tails.pop(sequence, None)
        if tail is not None and full > tail and len(self._sharers.get(table[tail], ())) == 1:
            self.pool.rename(table[tail], None)  # it holds more than what it was known by
        back = stays and (len(request.sequences) == 1 or request.status == "waiting")
        if sequence in self._ready and (back or request.content or request.preemptions):
            self._flag(sequence, full)
            if back or (request.output_content is not None and not sequence.branch):
                self._name(sequence, full)
        if sequence in self._last_full:
            block = self._last_full.pop(sequence)
            self._last[block].remove(sequence)
            if not self._last[block]:
                del self._last[block]

    def _leave(self, sequence: Sequence) -> None:
        """Drop the sequence's references to device blocks, and what is kept about them."""
        self._count(sequence, -1)
        table = sequence.block_table
        if self._sharers:
            for index, block in enumerate(table):
                if block in self._sharers:
                    self._part(sequence, block, index)
        self.pool.release(table, now=self._last_use(sequence))
        sequence.block_table = []

    def release(self, sequence: Sequence) -> None:
        """Drop the table's references."""
        self._leave(sequence)

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's references; its blocks stay known until they are evicted."""
        if sequence in self._hosted:
            self.host_pool.release(sequence.block_table, now=self._last_use(sequence))
            sequence.block_table = []
            self._hosted.discard(sequence)
            if not self._hosted.intersection(sequence.request.sequences):
                self._flying.forget(sequence.request)
        else:
            table = sequence.block_table
            if sequence not in self._done:
                self._settle(sequence, stays=sequence.num_tokens < sequence.final_tokens)
            self.release(sequence)
            if sequence in self._done:
                self._retired -= Counter(table)
            self.sequences.discard(sequence)
        sequence.capacity = 0
        self._ready.discard(sequence)
        self._done.discard(sequence)
        self._lowered.discard(sequence)
        del self._used[sequence]

    def retire(self, request: Request) -> None:
        """The branches are done: slots that nobody else uses are internal waste from now on."""
        for sequence in request.sequences:
            self._settle(sequence, stays=False)
            self._used[sequence] = self._last_use(sequence)
            self._count(sequence, -1)
            self._done.add(sequence)
            self._retired.update(sequence.block_table)
            sequence.origin = sequence.final_tokens = 0
            self._count(sequence, 1)

    # Forks

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share every block of the parent; needs no memory."""
        super().fork(parent, child)
        self._used[child] = self._used[parent]
        if parent in self._lowered:
            self._lowered.add(child)
        if parent in self._ready:
            self._ready.add(child)
        if parent in self._tails:
            self._tails[child] = self._tails[parent]
        if parent.num_tokens < parent.capacity:
            tail = parent.block_table[-1]
            sharers = self._sharers.setdefault(tail, [])
            sharers += [each for each in (parent, child) if each not in sharers]

    # Swapping

    def swap_out(self, request: Request) -> int:
        """Move the distinct blocks to the host; content that is there already is not held twice."""
        for sequence in request.sequences:
            self._settle(sequence, stays=True)
        places: dict[int, int] = {}
        tables = [self._move_table(each, self.pool, self.host_pool, places) for each in request.sequences]
        if self.probe is not None:
            self.probe.swap(self.host_pool.tier, list(places.items()), request.sequences)
        if self.link is not None:
            self._flying.leave_from(request, self._uses(request))
        for sequence, moved in zip(request.sequences, tables, strict=True):
            self._leave(sequence)
            sequence.block_table = moved
        self.sequences.difference_update(request.sequences)
        self._hosted.update(request.sequences)
        return len(places)

    def swap_in(self, request: Request) -> int:
        """Move the distinct blocks back to the device, where their content may still be found."""
        places: dict[int, int] = {}
        if self.link is not None:
            self._flying.come_back_from(request, self._uses(request))
        if self.quantization is not None:
            self._lowered.update(request.sequences)
        self._hosted.difference_update(request.sequences)
        self.sequences.update(request.sequences)
        for sequence in request.sequences:
            away = sequence.block_table
            sequence.block_table = self._move_table(sequence, self.host_pool, self.pool, places)
            self.host_pool.release(away, now=self._last_use(sequence))
            if sequence.num_tokens < sequence.capacity:
                self._sharers.setdefault(sequence.block_table[-1], []).append(sequence)
            self._count(sequence, 1)
            if sequence in self._ready:
                self._flag_filled(sequence)
        if self.probe is not None:
            self.probe.swap(self.pool.tier, list(places.items()))
        return len(places)

    def _uses(self, request: Request) -> dict[int, tuple[int, int]]:
        """Of each distinct block its index in the first table that has it, and when that was used last."""
        uses: dict[int, tuple[int, int]] = {}
        for sequence in request.sequences:
            time = self._last_use(sequence)
            for index, block in enumerate(sequence.block_table):
                uses.setdefault(block, (index, time))
        return uses

    def _move_table(
        self, sequence: Sequence, source: HashedPool, target: HashedPool, places: dict[int, int]
    ) -> list[int]:
        """The sequence's table on the other tier, with its references; `places` has what was moved before it."""
        if source is self.pool:
            prompt = min(sequence.num_tokens, sequence.request.prompt_tokens)
            self._name(sequence, prompt // self.block_size)
        full = sequence.num_tokens // self.block_size
        moved = []
        for index, block in enumerate(sequence.block_table):
            there = places.get(block)
            if there is None:
                key = self._key_to_move(source, block, whole=index < full)
                places[block] = there = target.obtain(key)
                if type(key) is tuple and target is self.pool:
                    target.rename(there, None)  # it is held again
            else:
                target.hold(there)
            moved.append(there)
        return moved

    def _key_to_move(self, source: HashedPool, block: int, whole: bool) -> Hashable | None:
        """What a block is known by on the other tier: one without a key gets its own, and may find its old place."""
        key = source.keys[block]
        if key is None:
            self._moves += 1
            key = (self._moves,)
            source.rename(block, key)
        elif not whole and type(key) is not tuple:
            return None  # known by a part of it, and somebody may have written on in it since
        elif self.quantization is not None and type(key) is int:
            return Lowered(key, self.quantization)
        return key


PagedAllocator.with_caching = CachedPagedAllocator
