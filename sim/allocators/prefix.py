"""Prefix caching by block hashes: vLLM V1."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import Annotated, Any

from sim.allocators.base import allocator
from sim.allocators.blocks import in_common
from sim.allocators.caching import CachingAllocator
from sim.allocators.capacity import Capacity
from sim.allocators.grouped_prefix import GroupedPrefixAllocator
from sim.pools.prefix_pool import PrefixPool
from sim.prefixes.keys import prefix_keys, sequence_keys, stretch
from sim.registry import Bounds, PositiveInt
from sim.request import Request, Sequence
from sim.tiers.offloading_pools import OffloadingPool
from sim.tiers.tiered_store import TieredStore

_MANY = 256
"""Requests whose keys are kept while they wait."""


@allocator("prefix")
class PrefixAllocator(CachingAllocator):
    """Blocks found again by the hash of their content and of all before it, as in vLLM V1.

    Full blocks can be found from the moment their slots are granted, by requests of the same step too; a
    request that is preempted finds its own again. Freed blocks queue up for reuse, the tail of a request
    first, and lose their content only when they are handed out (`vllm/v1/core/block_pool.py`; the rules stand
    in `sim/pools/prefix_pool.py`). The same content computed twice stays in two blocks. There is no swapping.

    In V1 parallel samples are requests of their own, which meet through the cache: each computes the end of the
    prompt that fills no block, and V1 knows no beams. Here samples and beams are branches of one request. They share
    the prompt's last block too until they write on, copy it then, and each finds its own blocks again.

    Of a model whose layers are of several kinds, or with `windows`, each group of layers has a block table of its
    own over one pool of equal pages; see `GroupedPrefixAllocator`, which is made in its place.

    Fields:
        block_size: KV slots per block.
        watermark: Share of the blocks that an admission leaves free while others run.
        prefix_caching: Whether blocks are found again at all; by default they are, but for models with states.
        keyless_first: Whether freed blocks without a hash are reused first (vLLM of 2026), or queue up behind
            the others (false, vLLM 0.10.0).
        windows: Tokens that each group of layers attends to, null for all; by default as the model has it.
    """

    counts_beams = True
    groups_layers = True
    can_offload = True
    pool: PrefixPool

    def __new__(cls, capacity: Capacity, **fields: Any) -> Any:
        """The allocator of one group that sees all tokens, or that of several."""
        if not cls.groups_layers or (fields.get("windows") is None and not capacity.layers):
            return super().__new__(cls)
        return GroupedPrefixAllocator(capacity, **fields)

    def __init__(
        self,
        capacity: Capacity,
        *,
        block_size: PositiveInt = 16,
        watermark: Annotated[float, Bounds(ge=0, lt=1)] = 0.0,
        prefix_caching: bool | None = None,
        keyless_first: bool = True,
        windows: list[PositiveInt | None] | None = None,
    ) -> None:
        assert windows is None  # see __new__
        super().__init__(capacity, block_size, watermark)
        self.pool = PrefixPool(self.num_blocks, keyless_first=keyless_first)
        self.prefix_caching = self.keeps_freed = prefix_caching is not False
        self._asked: dict[Request, Ordered[int]] = {}  # keys of requests that are not computed yet
        self._hit: tuple[Request | None, int, int, list[int]] = None, 0, 0, []  # who was asked for last

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """What states of a model rule out."""
        states = cls.groups_layers and (config["model"] or {}).get("num_state_layers")
        if states and config["allocator"].get("prefix_caching"):
            yield (
                "allocator.prefix_caching",
                "no checkpoints of states are kept, and without a state nobody can go on from a cached prefix",
            )

    def _keys(self, request: Request, num_tokens: int) -> Ordered[int]:
        """Keys of the full blocks; none for a request whose content nobody can have."""
        if not self.prefix_caching or not (request.content or request.preemptions):
            return []
        blocks = num_tokens // self.block_size
        keys = self._asked.get(request)
        if keys is None or len(keys) < blocks:
            if len(self._asked) == _MANY:
                self._asked.clear()
            whole = max(num_tokens, request.prefill_tokens) // self.block_size
            self._asked[request] = keys = prefix_keys(request, whole, self.block_size)
        return keys if len(keys) == blocks else keys[:blocks]

    def _hits(self, request: Request, num_tokens: int) -> list[int]:
        """Leading blocks that are found; remembered for whom it was asked last, until others can be found."""
        if not request.content and not request.preemptions:
            return []
        known, tokens, changes, hits = self._hit
        if known is not request or tokens != num_tokens or changes != self.pool.changes:
            keys = self._keys(request, num_tokens)
            if len(keys) * self.block_size == num_tokens:
                keys = keys[:-1]
            hits = self.pool.find_leading(keys)
            self._hit = request, num_tokens, self.pool.changes, hits
        return hits

    def open_tiers(self, tiers: TieredStore) -> None:
        """Tell the tiers of every full block that can be found, and of what is evicted."""
        self.tiers = tiers
        tiers.block_size = self.block_size
        self.pool = self._offloading(tiers)
        tiers.device_keys = self.pool.keys

    def _offloading(self, tiers: TieredStore) -> PrefixPool:
        """A pool in front of them."""
        return OffloadingPool(self.num_blocks, tiers, keyless_first=self.pool.keyless_first)

    def _register(self, sequence: Sequence, keys: Ordered[int], first: int = 0) -> None:
        """Let the sequence's blocks be found from the block `first` on, those that have no key yet."""
        if not keys:
            return
        table = sequence.block_table[first:] if first else sequence.block_table
        if self.tiers is not None:
            keys = stretch(keys) if len(sequence.request.sequences) == 1 else [*keys]
            known = self.pool.keys
            named = bisect_left(table, True, key=lambda block: known[block] is None)
            if named < len(keys):
                self.tiers.found(sequence, keys[named:], table[named : len(keys)])
        self.pool.register_table(table, keys)

    def cached(self, request: Request, num_tokens: int) -> tuple[int, int]:
        """The leading blocks that are found."""
        hits = self._hits(request, num_tokens)
        return len(hits), self.pool.unreferenced(hits)

    def hold(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Touch the hits, so that they are not handed out to somebody else."""
        if sequence.lineage is None:
            hits = self._hits(sequence.request, num_tokens).copy()
        else:
            blocks = (num_tokens - 1) // self.block_size
            keys = sequence_keys(sequence, blocks, self.block_size) if self.prefix_caching else []
            hits = self.pool.find_leading(keys)
        self.pool.touch(hits)
        return hits

    def held(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the full blocks be found."""
        if sequence.lineage is None and (self.tiers is None or sequence.request.content):
            keys = self._keys(sequence.request, num_tokens)
        else:
            keys = self._own_keys(sequence, num_tokens)
        self._register(sequence, keys)
        if num_tokens >= sequence.request.prefill_tokens:
            self._asked.pop(sequence.request, None)

    def _own_keys(self, sequence: Sequence, num_tokens: int, first: int = 0) -> Ordered[int]:
        """Keys of the full blocks of any branch from the block `first` on."""
        if not self.prefix_caching:
            return []
        return sequence_keys(sequence, num_tokens // self.block_size, self.block_size, first)

    def _shared_blocks(self, request: Request) -> int:
        """Those of the prompt, which the first branch registers."""
        return super()._shared_blocks(request) if self.prefix_caching else 0

    def in_common(self, request: Request) -> list[tuple[Sequence, int] | None]:
        """Full blocks of the tables: the first branch registers them, and the others find them."""
        self.list_beams(request)
        if not self.prefix_caching:
            return [None] * len(request.sequences)
        return in_common(request.sequences, request.sequences[0].num_tokens // self.block_size)

    def finished(self, sequence: Sequence) -> None:
        """What was generated is found by those who know its name; else its blocks only queue up with the others."""
        request = sequence.request
        if self.prefix_caching and (request.output_content is not None or self.tiers is not None):
            known = request.prefill_tokens // self.block_size
            self._register(sequence, self._own_keys(sequence, sequence.num_tokens, known), known)

    def retire(self, request: Request) -> None:
        """The branches are done and keep their blocks: full ones will queue up with the others."""
        full = [sequence.num_tokens // self.block_size for sequence in request.sequences]
        super().retire(request)
        if self.prefix_caching:
            for sequence, count in zip(request.sequences, full, strict=True):
                self.pool.mark_full(sequence.block_table[:count])

    def release(self, sequence: Sequence) -> None:
        """Queue the blocks, the last one first; one that will be back finds what it generated."""
        if not self.prefix_caching:
            self.pool.release(sequence.block_table[::-1])
            return
        done = sequence.num_tokens >= sequence.final_tokens
        if not done and (self.tiers is not None or sequence.request.status != "running"):  # no beam that died
            keys = self._own_keys(sequence, sequence.num_tokens)
            self._register(sequence, keys)
            if isinstance(self.pool, OffloadingPool):
                self.pool.reveal(sequence.block_table, keys)
        self.pool.leave_table(sequence.block_table, sequence.num_tokens // self.block_size)

    # Beams that are counted

    def give_back(self, blocks: list[int], partial: int) -> None:
        """Full blocks queue up at the tail, as those of a beam that died or is done."""
        self.pool.leave_table(blocks, (len(blocks) - partial) * self.prefix_caching)

    def forget(self, blocks: list[int]) -> bool:
        """Take their keys, which only the group itself would ask for."""
        self.pool.forget(blocks)
        return True

    def give_back_prompt(self, blocks: list[int], beams: int) -> None:
        """The last block first."""
        if self.prefix_caching:
            self.pool.mark_full(blocks)
        super().give_back_prompt(blocks[::-1], beams)
