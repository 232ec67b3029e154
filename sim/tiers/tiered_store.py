"""The tiered store: cached prefixes behind the device, what is written where, and what is loaded."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Ordered
from typing import Any, Literal

from sim.errors import UserError
from sim.pools.prefix_pool import UNASKED
from sim.prefixes.keys import stretch
from sim.registry import PositiveInt
from sim.request import Request, Sequence
from sim.tiers.load_cost import LoadCost
from sim.tiers.places import TierPlaces
from sim.tiers.run_index import Piece
from sim.tiers.storage_tier import Run, StorageTier

TAKEN = ("device", "prefix")
"""Names in the summary that no tier may have."""


class TieredStore(TierPlaces):
    """Blocks of cached prefixes in tiers from near to far, each block in one of them.

    What leaves the device goes to the nearest tier; where that is full its eviction order names what goes one tier
    farther, and is lost behind the last (demotion: Wong and Wilkes, USENIX ATC 2002). What is read from farther moves
    to the nearest tier, as it passes through. The policies are those of SGLang's HiCache.

    What can be found on the device is written when the step that computes it is over. A block can be loaded as soon
    as it is in its tier. When copies are made, and what waits for them, is in `sim/tiers/traffic.py`.

    Fields:
        policy: When a block is written: write_through when it can be found on the device, write_back when the
            device evicts it, selective when it was found min_hits times on the device.
        min_hits: Hits that a block needs under the selective policy.
        load: What the tiers have is loaded always, or by_cost: as much of it as makes the step shortest, computing
            it again on a tie.
    """

    def __init__(
        self,
        tiers: Ordered[StorageTier],
        *,
        policy: Literal["write_through", "write_back", "selective"] = "write_through",
        min_hits: PositiveInt = 2,
        load: Literal["always", "by_cost"] = "always",
    ) -> None:
        names = [tier.name for tier in tiers]
        if not names:
            raise UserError("there are no tiers to offload to: list one at least, for example host")
        if len({*TAKEN, *names}) < len(TAKEN) + len(names):
            raise UserError(
                f"tiers need different names, none of them {' or '.join(TAKEN)}: got {', '.join(names)}"
            )
        super().__init__(tiers)
        self.policy = policy
        self.min_hits = min_hits
        self.cost = LoadCost(self.tiers, self.traffic) if load == "by_cost" else None
        self.block_size = 1
        self.device_keys: list[Hashable] = []  # of what can be found on the device, by block
        self.device_hit_tokens = self.declined_tokens = 0
        self._clock = 0
        self._hits: dict[Hashable, int] = {}
        self._pending: list[tuple[Sequence, Ordered[Hashable], list[int]]] = []  # computed with this step
        self._leaving: dict[Hashable, int] = {}  # evicted by the device, and not written yet
        self._declined = 0  # blocks of the last prompt that are cheaper to compute

    # What the engine asks

    def begin(self, now: int) -> None:
        """A plan begins (ns): what the last step computed is there, and is written."""
        self._drain()
        self.traffic.begin(now)
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        if self.probe is not None:
            self.probe.offload([sequence for sequence, _, _ in pending])
        index, held = self.index, self.device_keys.__getitem__
        for sequence, keys, blocks in pending:
            there = 0 if isinstance(keys, range) else index.leading(keys)
            if there:  # what it loaded
                keys, blocks = keys[there:], blocks[there:]
            if index.has_any(keys) or list(map(held, blocks)) != [*keys]:
                pairs = [
                    (key, block)
                    for key, block in zip(keys, blocks, strict=True)
                    if held(block) == key and index.get(key) is None  # it may be gone by now
                ]
                keys, blocks = [key for key, _ in pairs], [block for _, block in pairs]
            if keys:
                self._store(keys, blocks, -sequence.request.priority)

    def stall(self, start: int, duration: int) -> int:
        """Submit the transfers of a step; what it waits for them if it could begin at `start` (ns)."""
        self._drain()
        return self.traffic.stall(start, duration)

    @property
    def now(self) -> int:
        """When the plan began (ns)."""
        return self.traffic.now

    @property
    def grows_quietly(self) -> bool:
        """Whether no block that a growth takes after the step has to be waited for."""
        return self.policy != "write_back" and self.traffic.settled

    @property
    def steady(self) -> bool:
        """Whether what is worth loading depends on nothing but what is cached."""
        return self.cost is None or all(tier.link.out_free_at <= self.traffic.now for tier in self.tiers)

    def figures(self, prompt_tokens: int) -> dict[str, float]:
        """Figures of a finished run whose requests asked for so many tokens, by their names in the summary."""
        told: dict[str, float] = {}
        hits = {"device": self.device_hit_tokens} | {tier.name: tier.hit_tokens for tier in self.tiers}
        for name, tokens in hits.items():
            told[f"{name}_hit_tokens"] = tokens
            told[f"{name}_hit_rate"] = tokens / prompt_tokens if prompt_tokens else 0.0
        for tier in self.tiers:
            told[f"{tier.name}_read_gb"] = tier.read_blocks * tier.block_bytes / 1e9
            told[f"{tier.name}_written_gb"] = tier.written_blocks * tier.block_bytes / 1e9
        told["tier_wait_s"] = self.traffic.wait_time / 1e9
        told["tier_dropped_blocks"] = self.dropped_blocks
        told["tier_declined_tokens"] = self.declined_tokens
        return told

    # What an allocator tells

    @property
    def idle(self) -> bool:
        """Whether it does not matter which device blocks are handed out."""
        return self.policy != "write_back" and not (self._hits or self.traffic.copying_out)

    def found(self, sequence: Sequence, keys: Ordered[Hashable], blocks: list[int]) -> None:
        """These blocks of a sequence can be found on the device from now on; this step computes them."""
        if self.policy == "write_through" and keys:
            self._pending.append((sequence, stretch(keys), blocks))

    @property
    def counts_hits(self) -> bool:
        """Whether it matters what is found on the device."""
        return self.policy == "selective"

    def hit(self, sequence: Sequence, keys: Ordered[Hashable], blocks: Ordered[int]) -> None:
        """These blocks of a sequence were found on the device; told where `counts_hits`."""
        hits = self._hits
        for key in keys:
            hits[key] = hits.get(key, 0) + 1
        enough = [
            at for at, key in enumerate(keys) if hits[key] >= self.min_hits and self.index.get(key) is None
        ]
        if enough:
            self._pending.append((sequence, [keys[at] for at in enough], [blocks[at] for at in enough]))

    def evict(self, blocks: Ordered[int]) -> None:
        """These device blocks are handed out, in this order; what they hold cannot be found there any more."""
        self.lose(blocks)
        self.traffic.reuse(blocks)

    def lose(self, blocks: Ordered[int]) -> None:
        """What these device blocks hold cannot be found there any more."""
        known = self.device_keys
        if self.policy == "write_back":
            self._lift([known[block] for block in blocks], blocks)
        elif self._hits:
            for block in blocks:
                self._hits.pop(known[block], None)

    def _lift(self, keys: list[Hashable], blocks: Ordered[int]) -> None:
        """Write what the device evicts, unless it is in a tier or about to be."""
        leaving, index = self._leaving, self.index
        keys = [None if key == UNASKED else key for key in keys]
        fresh = dict(zip(keys, blocks, strict=True))
        fresh.pop(None, None)
        named = [*fresh]
        equal = len(fresh) + keys.count(None) < len(keys)
        if equal or not leaving.keys().isdisjoint(named) or index.has_any(named):
            pairs = zip(reversed(keys), reversed(blocks), strict=True)
            fresh = {key: block for key, block in pairs if key is not None}  # the first of equals
            fresh = {key: fresh[key] for key in named if key not in leaving and index.get(key) is None}
        leaving.update(fresh)
        if self.probe is not None:
            for block in fresh.values():
                self.probe.lift(block)

    # Hits

    def lookup(self, request: Request, keys: Ordered[Hashable], before: int) -> int:
        """How many of these blocks are to be loaded, of a prompt whose first `before` tokens are on the device."""
        self._drain()
        worth = found = self.index.leading(keys)
        if found and self.cost is not None:
            worth = self.cost.worth(request, self.index.pieces(keys), before, self.block_size)
        self._declined = found - worth
        return worth

    def settle(self) -> None:
        """Write what the device has evicted; what tiers have can be looked up then."""
        self._drain()

    def cheapest(self, request: Request, choices: Ordered[tuple[int, Ordered[Piece]]]) -> int:
        """Which of these loads makes the step shortest; each with the tokens of the prompt that it saves."""
        assert self.cost is not None
        return self.cost.cheapest(request, choices)

    def load(
        self, request: Request, keys: Ordered[Hashable], blocks: Ordered[int], *, counted: bool = True
    ) -> None:
        """Copy what was looked up last into fresh blocks of the device; what was far moves to the nearest tier."""
        self.declined_tokens += self._declined * self.block_size
        runs, at = [], len(keys)
        for run in reversed(self._parted(keys)):  # the beginning of the prompt is used last
            tier, count = run.tier, len(run.keys)
            assert tier is not None
            self._clock += 1
            tier.use(run, self._clock, -request.priority)
            self.traffic.read(tier, run)
            if counted and not request.preemptions:
                tier.hit_tokens += count * self.block_size
            at -= count
            self._tell(tier.name, run.slots, "device", blocks[at : at + count])
            runs.append((run, blocks[at : at + count]))
        first = self.tiers[0]
        for run, targets in runs:
            tier = run.tier
            if tier is not None and tier is not first and len(run.keys) <= first.num_blocks:
                tier.remove(run)
                self._place(run, 0, "device", targets, written=False)

    # Writing

    def _drain(self) -> None:
        """Write what the device has evicted since, the last of it first."""
        if self._leaving:
            leaving, self._leaving = self._leaving, {}
            self._store([*reversed(leaving)], [*reversed(leaving.values())], 0, "lifted")

    def _store(
        self, keys: Ordered[Hashable], blocks: list[int], priority: int, source: str = "device"
    ) -> None:
        """Write device blocks to the nearest tier."""
        self._clock += 1
        run = self.index.name(Run(keys, (self._clock, 0), self._clock, priority))
        self._place(run, 0, source, blocks)

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(dotted path, complaint) for options of a whole experiment that contradict each other."""
        offload = config.get("offload") or {}
        if config.get("tiers") is None:
            for field in offload:
                yield f"offload.{field}", "has no meaning without tiers: list one at least, for example host"
        else:
            if offload.get("policy", "write_through") != "selective" and "min_hits" in offload:
                yield "offload.min_hits", "only the selective policy counts hits"
            if "prefetch" in (config.get("transfers") or {}):
                yield "transfers.prefetch", "what tiers have is loaded for the step that admits its request"
