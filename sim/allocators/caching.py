"""What allocators with a prefix cache share: admission beside hits, and books over blocks that requests share."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Ordered
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sim.allocators.blocks import block_slots, grow_by_block
from sim.allocators.capacity import STAYS_CACHED, Admission, Capacity
from sim.allocators.countable import CountableAllocator
from sim.errors import IntegrityError
from sim.pools.block_pool import BlockPool
from sim.prefixes.keys import sequence_keys
from sim.request import Request, Sequence
from sim.tiers.tiered_store import TieredStore


class CachingAllocator(CountableAllocator):
    """Blocks that keep their content when they are freed, and are shared by requests that begin alike.

    A policy says which leading blocks of a request are cached (`cached`), hands them out (`hold`), keeps what
    a sequence leaves behind (`finished`) and takes its table back (`release`). Requests share full blocks only.
    Branches of one request share a last block that is filled in part too, until one of them writes on and copies it;
    as they are equally long, it is counted once as any of them has it. Cached blocks that nobody references count as
    free. Nothing is swapped: a group that gives way is computed again, each branch behind what is found of it.
    """

    reasons: ClassVar = {
        "can_swap": "what a preempted request had stays cached and is found again, as vLLM V1 and SGLang do it; "
        "tiers keep it on the host",
        "can_stop": STAYS_CACHED,
    }
    can_fork = True
    recomputes_groups = True
    keeps_freed = True
    asks_exactly = True
    pool: BlockPool

    def __init__(self, capacity: Capacity, block_size: int, watermark: float) -> None:
        super().__init__(capacity)
        self.num_blocks = (
            capacity.num_slots // block_size if capacity.num_blocks is None else capacity.num_blocks
        )
        if capacity.num_blocks is not None:
            self.num_slots = self.num_blocks * block_size
        self.block_size = self.growth = block_size
        self.watermark_blocks = int(watermark * self.num_blocks)
        self._remainder = self.num_slots - self.num_blocks * block_size  # too short for a block
        self._retired: Counter[int] = Counter()  # references of sequences that are done, by block
        self._done: set[Sequence] = set()

    # What a policy decides

    @abstractmethod
    def cached(self, request: Request, num_tokens: int) -> tuple[int, int]:
        """Leading blocks of the request that are cached, and how many of them nobody references.

        Never all of its tokens: one at least is left to compute. Changes nothing.
        """

    @abstractmethod
    def _keys(self, request: Request, num_tokens: int) -> Ordered[int]:
        """Keys of the request's leading full blocks, as far as anybody may ask for them."""

    @abstractmethod
    def hold(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """The cached leading blocks, with one more reference each."""

    @abstractmethod
    def held(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence's table is filled for so many tokens."""

    def _shared_blocks(self, request: Request) -> int:
        """Leading blocks that the branches of a group share which are admitted together."""
        return request.prompt_tokens // self.block_size

    @abstractmethod
    def finished(self, sequence: Sequence) -> None:
        """The sequence has all its tokens: its full blocks are worth keeping."""

    # Room

    def num_external(self, head_refused: bool) -> int:
        """The slots behind the last whole block."""
        return self._remainder

    def admission(self, request: Request, num_tokens: int) -> Admission:
        """Room for the whole prompt: its new blocks, and those of its hits that nobody holds.

        The watermark stays free unless nobody else runs.
        """
        if len(request.sequences) > 1:
            return self._group_admission(request, num_tokens)
        needed = self.pages(request, num_tokens)
        if needed > self.num_blocks:
            return Admission.NEVER
        hits, unreferenced = self.cached(request, num_tokens)
        spare = self.pool.num_free - self.kept_free
        return Admission.OK if needed - hits + unreferenced <= spare else Admission.LATER

    def pages(self, request: Request, num_tokens: int) -> int:
        """Blocks that one branch with so many tokens has."""
        return -(-num_tokens // self.block_size)

    @property
    def kept_free(self) -> int:
        """Blocks that an admission leaves free: the watermark, unless nobody else runs."""
        return self.watermark_blocks if self.sequences else 0

    def _group_admission(self, request: Request, num_tokens: int) -> Admission:
        """`admission` of a group that gave way: room for all branches, as if only what is cached now were shared."""
        needed = self.pages(request, num_tokens)
        hits, unreferenced = self.cached(request, num_tokens)
        shared = min(self._shared_blocks(request), needed)
        needed = shared + len(request.sequences) * (needed - shared)
        if needed > self.num_blocks:
            return Admission.NEVER
        spare = self.pool.num_free - self.kept_free
        return Admission.OK if needed - hits + unreferenced <= spare else Admission.LATER

    def in_common(self, request: Request) -> list[tuple[Sequence, int] | None]:
        """Leading blocks that are cached, as far as all branches have them."""
        first = request.sequences[0]
        shared = min(self._shared_blocks(request), self.cached(request, first.num_tokens)[0])
        others = len(request.sequences) - 1
        return [None, *[(first, shared) if shared else None] * others]

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Blocks needed against blocks there."""
        needed = self.pages(request, num_tokens)
        return (
            f"{num_tokens} tokens need {needed} blocks of {self.block_size} slots, "
            f"the pool has {self.num_blocks}"
        )

    @property
    def headroom(self) -> int:
        """Free blocks, cached ones included."""
        return self.pool.num_free

    def can_append(self, request: Request) -> bool:
        """A free block for every branch whose blocks are full."""
        free = self.pool.num_free
        if free >= len(request.sequences):
            return True
        if request.counted is not None:
            return request.counted.demand <= free
        first = request.sequences[0]
        if first.num_tokens >= first.capacity:  # branches are equally long
            return len(request.sequences) <= free
        tails = {sequence.block_table[-1] for sequence in request.sequences}
        return len(request.sequences) - len(tails) <= free

    # The life of a sequence

    def cached_tokens(self, request: Request, num_tokens: int) -> int:
        """Those in the leading blocks that are cached, on the device or worth loading from a tier behind it."""
        hits = self.cached(request, num_tokens)[0]
        if self.tiers is not None:
            keys = self._keys(request, num_tokens)
            hits += len(self._to_load(self.tiers, request, keys, num_tokens, hits))
        return hits * self.block_size

    def _to_load(
        self, tiers: TieredStore, request: Request, known: Ordered[int], num_tokens: int, hits: int
    ) -> list[int]:
        """Keys of blocks in tiers that go on behind the hits of the device; one token at least is left to compute."""
        keys: list[int] = []
        if request.content or request.preemptions:  # else nobody can have written what it asks for
            keys += known[hits : (num_tokens - 1) // self.block_size]
        del keys[tiers.lookup(request, keys, hits * self.block_size) :]
        return keys

    def shared_tokens(self, request: Request, num_tokens: int) -> int:
        """Those in cached blocks that somebody references."""
        hits, unreferenced = self.cached(request, num_tokens)
        return (hits - unreferenced) * self.block_size

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Give a sequence its cached blocks and new ones behind them; the tokens that it need not compute."""
        if filled is None:
            filled = num_tokens
        size, pool, tiers = self.block_size, self.pool, self.tiers
        free = pool.num_free
        hits = self.hold(sequence, num_tokens)
        loads: list[int] = []
        if tiers is not None:
            request = sequence.request
            keys = (
                self._keys(request, num_tokens)
                if sequence.lineage is None
                else sequence_keys(sequence, num_tokens // size, size)
            )
            loads = self._to_load(tiers, request, keys, num_tokens, len(hits))
        if hits:
            self.revive(sequence, hits)
            if self.probe is not None:
                self.probe.touch(pool.tier, hits)
        tokens = len(hits) * size
        shared = tokens - (free - pool.num_free) * size  # in blocks that somebody holds already
        sequence.block_table = hits
        sequence.capacity = held = self.reserve(sequence, num_tokens)
        sequence.origin = filled
        self.num_held += held - shared
        self.num_tokens += filled - shared
        if held > sequence.final_tokens:
            self.num_internal += held - sequence.final_tokens
        self.sequences.add(sequence)
        if tiers is not None:
            tokens += self._load(tiers, sequence, hits, tokens, loads)
        self.held(sequence, filled)
        if self.probe is not None:
            self.probe.begin(sequence)
        return tokens

    def _load(
        self, tiers: TieredStore, sequence: Sequence, table: list[int], cached: int, loads: list[int]
    ) -> int:
        """Count the hits of the device, and load what the tiers have behind them; the tokens of that."""
        request, hits = sequence.request, cached // self.block_size
        if hits and tiers.counts_hits:
            tiers.hit(sequence, sequence_keys(sequence, hits, self.block_size), table[:hits])
        if not request.preemptions:
            tiers.device_hit_tokens += cached
        tiers.load(request, loads, table[hits : hits + len(loads)])
        return len(loads) * self.block_size

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a prompt that is computed in part."""
        super().extend(sequence, num_tokens)
        self.held(sequence, sequence.origin)

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Append the blocks that the table lacks."""
        table = sequence.block_table
        table += self.pool.take(-(-num_tokens // self.block_size) - len(table))
        return len(table) * self.block_size

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """One more block for each sequence of each batch."""
        return grow_by_block(self, self.pool, batches)

    def append(self, sequence: Sequence) -> int:
        """A new block if the last is full, a copy of the last if another branch has it too, else nothing."""
        self.list_beams(sequence.request)
        tokens, size, pool = sequence.num_tokens, self.block_size, self.pool
        if tokens >= sequence.capacity:
            self._grow_to(sequence, sequence.capacity + 1)
            return 0
        self.list_blocks(sequence)
        index = tokens // size
        shared = sequence.block_table[index]
        if pool.count(shared) == 1:
            return 0
        (own,) = pool.take()
        if self.probe is not None:
            self.probe.copy(shared, own)
        sequence.block_table[index] = own
        pool.release((shared,))
        self.num_held += size
        self.num_tokens += tokens % size
        self.num_internal += max(0, (index + 1) * size - sequence.final_tokens)
        return 1

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share every block of the parent; needs no memory."""
        if not self.can_fork:
            super().fork(parent, child)
        self.share(parent)
        child.block_table = parent.block_table.copy()
        child.capacity = parent.capacity
        child.origin = parent.num_tokens
        self.sequences.add(child)

    def share(self, parent: Sequence) -> None:
        """One more reference to every block of the parent."""
        self.pool.share(parent.block_table)

    def free(self, sequence: Sequence) -> None:
        """Take back the sequence's references; only blocks that nobody else holds leave the books.

        Beams have tables in the end only if what they generated is found again.
        """
        if self._retired or sequence.request.output_content is not None:
            self.list_beams(sequence.request)
        if sequence.request.counted is not None:
            sequence.request.counted.free(sequence)
            return
        done = sequence in self._done
        if not done and sequence.origin >= sequence.final_tokens:
            self.finished(sequence)
        size, pool = self.block_size, self.pool
        if self._retired:
            self._bury(sequence)
        kept = 0  # slots up to the end of the last block with tokens, if another branch has it too
        if pool.extra_references and not done:
            self.list_blocks(sequence)
            filled = -(-sequence.origin // size)
            if pool.count(sequence.block_table[filled - 1]) > 1:
                kept = filled * size
        free = pool.num_free
        self.release(sequence)
        shared = sequence.capacity - size * (pool.num_free - free)
        self.num_held -= sequence.capacity - shared
        if done:
            self._done.discard(sequence)
            self.num_internal -= sequence.capacity - shared
        else:
            self.num_tokens -= sequence.origin - shared + (kept - sequence.origin if kept else 0)
            self.num_internal -= max(0, sequence.capacity - max(kept, sequence.final_tokens))
        self.sequences.discard(sequence)
        sequence.block_table = []
        sequence.capacity = 0

    # Sequences that are done and keep their blocks

    def retire(self, request: Request) -> None:
        """The branches are done: their blocks are internal waste as far as nobody else uses them."""
        size, retired = self.block_size, self._retired
        self.list_beams(request)
        for sequence in request.sequences:
            self.finished(sequence)
            table = sequence.block_table
            retired.update(table)
            lives = [
                count > retired[block]
                for block, count in zip(table, self.counts(sequence, table), strict=True)
            ]
            tokens, used, kept = sequence.num_tokens, size * sum(lives), 0
            if lives[-(-tokens // size) - 1]:  # a branch has it whose turn is yet to come
                kept = -(-tokens // size) * size
            self.num_tokens -= tokens - used + (kept - tokens if kept else 0)
            self.num_internal += sequence.capacity - used
            self.num_internal -= max(0, sequence.capacity - max(kept, sequence.final_tokens))
            sequence.origin = sequence.final_tokens = 0
            self._done.add(sequence)

    def counts(self, sequence: Sequence, table: Ordered[int]) -> Iterable[int]:
        """References of the leading blocks of the sequence, which are those of the table."""
        return [self.pool.count(block) for block in table]

    def _retired_but_for(self, sequence: Sequence, table: Ordered[int], first: int = 0) -> int:
        """Blocks of the sequence's leading ones, from `first` on, that but for it only retired ones hold."""
        retired = self._retired
        counts = [*zip(table, self.counts(sequence, table), strict=True)][first:]
        return sum([0 < retired[block] == count - 1 for block, count in counts])

    def revive(self, sequence: Sequence, table: Ordered[int], first: int = 0) -> None:
        """The sequence has got these blocks, from `first` on: those that only retired ones held have a user again."""
        if not self._retired:
            return
        revived = self._retired_but_for(sequence, table, first)
        self.num_internal -= revived * self.block_size
        self.num_tokens += revived * self.block_size

    def _bury(self, sequence: Sequence) -> None:
        """Before a sequence leaves: blocks that only retired ones hold from then on are waste."""
        retired = self._retired
        if sequence in self._done:
            retired.subtract(sequence.block_table)
            self._retired = +retired
            return
        buried = self._retired_but_for(sequence, sequence.block_table)
        self.num_tokens -= buried * self.block_size
        self.num_internal += buried * self.block_size

    # Where tokens live

    def slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Block table times block size plus offset, shape [num_tokens]."""
        return block_slots(sequence.block_table, self.block_size, sequence.num_tokens)

    @property
    def blocks_saved(self) -> int:
        """References beyond the first of every block."""
        return self.pool.extra_references

    def check_books(self) -> None:
        """Reference counts against tables, and the counters against a recount of the blocks."""
        size = self.block_size
        if self.tiers is not None:
            self.tiers.check_integrity()
        for sequence in self.sequences:
            self.list_blocks(sequence)
        self.pool.check_integrity(sequence.block_table for sequence in self.sequences)
        filled: dict[int, int] = {}
        wasted: dict[int, int] = {}
        for sequence in self.sequences:
            if sequence.capacity != len(sequence.block_table) * size:
                slots = len(sequence.block_table) * size
                raise IntegrityError(f"{sequence}: held({sequence.capacity}) != slots of its table({slots})")
            if sequence not in self._done:
                for index, block in enumerate(sequence.block_table):
                    wasted[block] = min(size, max(0, (index + 1) * size - sequence.final_tokens))
                    tokens = min(size, max(0, sequence.num_tokens - index * size))
                    filled[block] = max(tokens, filled.get(block, 0))
        held = {block for sequence in self.sequences for block in sequence.block_table}
        internal = sum(wasted.values()) + size * len(held - filled.keys())
        for name, kept, counted in (
            ("tokens", self.num_tokens, sum(filled.values())),
            ("held", self.num_held, size * len(held)),
            ("internal", self.num_internal, internal),
        ):
            if kept != counted:
                raise IntegrityError(f"{name}({kept}) != recount over the block tables({counted})")
