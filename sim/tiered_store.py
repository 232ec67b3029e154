"""The tiered store: cached prefixes behind the device, what is written where, and what is worth loading."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Ordered
from itertools import groupby
from typing import Literal

from sim.errors import IntegrityError, UserError
from sim.probe import Witness
from sim.registry import PositiveInt
from sim.request import Request, Sequence
from sim.storage_tier import Entry, StorageTier, leading

Offload = Literal["write_through", "write_back", "selective"]


class TieredStore:
    """Blocks of cached prefixes in tiers from near to far, each block in one of them.

    What leaves the device goes to the nearest tier; where that is full its eviction order names a block, which goes
    one tier farther, and is lost behind the last (demotion: Wong and Wilkes, USENIX ATC 2002). A block that is read
    from farther moves to the nearest tier, as it passes through. The policies are those of SGLang's HiCache.

    Transfers of a planned step are submitted together, on each link after what was submitted before. The step
    waits for what it loads, and for blocks that it reuses while they are still copied out; where transfers are
    synchronous for all that it writes, too. What has become findable is written when the step that computes it is
    over. A block may be loaded as soon as it is in its tier.

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
        policy: Offload = "write_through",
        min_hits: PositiveInt = 2,
        load: Literal["always", "by_cost"] = "always",
    ) -> None:
        names = [tier.name for tier in tiers]
        if not names:
            raise UserError("there are no tiers to offload to: list one at least, for example host")
        if len({"device", *names}) < 1 + len(names):
            raise UserError(f"tiers need different names, none of them device: got {', '.join(names)}")
        self.tiers = list(tiers)
        self.policy = policy
        self.min_hits = min_hits
        self.by_cost = load == "by_cost"
        self.entries: dict[Hashable, Entry] = {}
        self.probe: Witness | None = None
        self.block_size = 1
        self.asynchronous = False
        self.layers = 1  # that a step computes one after the other while it waits
        self.price: Callable[[Request, int], float] | None = None
        self.now = 0
        self.awaited = 0
        self.wait_time = 0
        self.device_hit_tokens = self.declined_tokens = 0
        self._clock = 0
        self._pending: dict[Hashable, tuple[int, Sequence]] = {}  # findable, and not computed before now
        self._hits: dict[Hashable, int] = {}
        self._sources: dict[int, int] = {}  # device blocks that are copied out, until when (ns); 0 while unknown
        self._reused: list[int] = []
        self._declined = 0  # blocks of the last prompt that are cheaper to compute

    def connect(self, price: Callable[[Request, int], float], asynchronous: bool, layers: int) -> None:
        """Take a run's costs: seconds to compute a prompt behind so many tokens, and how steps wait for copies."""
        self.price, self.asynchronous, self.layers = price, asynchronous, layers

    # What the engine asks

    def begin(self, now: int) -> None:
        """A plan begins (ns): what the last step computed is there, and is written."""
        self._submit()
        self.now, self.awaited = now, 0
        for tier in self.tiers:
            tier.link.now = now
        if self._sources:
            self._sources = {block: end for block, end in self._sources.items() if end > now}
        if self._pending:
            pending, self._pending = self._pending, {}
            if self.probe is not None:
                self.probe.offload([sequence for _, sequence in pending.values()])
            for key, (block, sequence) in reversed(pending.items()):  # the beginning is used last
                self._store(key, block, sequence.request.priority)

    def stall(self, start: int, duration: int) -> int:
        """Submit the transfers of a step; what it waits for them if it could begin at `start` (ns)."""
        self._submit()
        wait = max(0, self.awaited - start - duration * (self.layers - 1) // self.layers)
        self.wait_time += wait
        return wait

    @property
    def grows_quietly(self) -> bool:
        """Whether no block that a growth takes has to be waited for."""
        return self.policy != "write_back" and not self._sources

    @property
    def steady(self) -> bool:
        """Whether what is worth loading depends on nothing but what is cached."""
        return not self.by_cost or all(tier.link.out_free_at <= self.now for tier in self.tiers)

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
        told["tier_wait_s"] = self.wait_time / 1e9
        told["tier_dropped_blocks"] = self.tiers[-1].dropped_blocks
        told["tier_declined_tokens"] = self.declined_tokens
        return told

    # What an allocator tells

    def found(self, sequence: Sequence, fresh: Iterable[tuple[Hashable, int]]) -> None:
        """These keys and blocks of a sequence can be found on the device from now on; this step computes them."""
        if self.policy == "write_through":
            entries, pending = self.entries, self._pending
            for key, block in fresh:
                if key not in entries:
                    pending.setdefault(key, (block, sequence))

    @property
    def counts_hits(self) -> bool:
        """Whether it matters what is found on the device."""
        return self.policy == "selective"

    def hit(self, sequence: Sequence, keys: Iterable[Hashable], blocks: Iterable[int]) -> None:
        """These blocks were found on the device."""
        hits, entries = self._hits, self.entries
        for key, block in zip(keys, blocks, strict=False):
            hits[key] = count = hits.get(key, 0) + 1
            if count >= self.min_hits and key not in entries:
                self._pending.setdefault(key, (block, sequence))

    def evict(self, evicted: Iterable[tuple[Hashable, int]]) -> None:
        """What these blocks hold, by its keys, cannot be found there any more."""
        if self.policy == "write_back":
            for key, block in evicted:
                if key not in self.entries:
                    self._store(key, block, 0)
        elif self._pending or self._hits:
            for key, block in evicted:
                self._hits.pop(key, None)
                if key in self._pending and self._pending[key][0] == block:
                    del self._pending[key]

    def reuse(self, blocks: Iterable[int]) -> None:
        """These device blocks are handed out."""
        sources = self._sources
        if sources:
            self._reused += [block for block in blocks if block in sources]

    @property
    def idle(self) -> bool:
        """Whether it does not matter which device blocks are handed out."""
        return self.policy != "write_back" and not (self._sources or self._pending or self._hits)

    # Hits

    def lookup(self, request: Request, keys: Ordered[Hashable], before: int) -> list[Entry]:
        """What is to be loaded of a prompt of which the first `before` tokens are on the device: leading blocks."""
        entries = leading(keys, self.entries)
        self._declined = 0
        if entries and self.by_cost:
            worth = self._worth(request, entries, before)
            self._declined = len(entries) - worth
            del entries[worth:]
        return entries

    def _worth(self, request: Request, entries: list[Entry], before: int) -> int:
        """How many of the blocks make the step shortest if they are loaded: all of some tier, or none of it."""
        assert self.price is not None, "loads have no price before a run"
        reads = {tier: len(tier.reads) for tier in self.tiers}
        ready = {tier: 0 for tier in self.tiers}
        best, count = self._step_seconds(request, before, reads, ready), 0
        loaded = 0
        for tier, run in groupby(entries, lambda entry: entry.tier):
            assert tier is not None
            for entry in run:
                loaded += 1
                reads[tier] += 1
                ready[tier] = max(ready[tier], entry.ready)
            seconds = self._step_seconds(request, before + loaded * self.block_size, reads, ready)
            if seconds < best:
                best, count = seconds, loaded
        return count

    def _step_seconds(
        self, request: Request, before: int, reads: dict[StorageTier, int], ready: dict[StorageTier, int]
    ) -> float:
        """What a request adds to a step that computes it from the token `before` on, behind these reads."""
        assert self.price is not None
        computing = self.price(request, before)
        wait = 0.0
        for tier, blocks in reads.items():
            if blocks:
                queue = max(0, tier.link.in_free_at - self.now, ready[tier] - self.now) / 1e9
                wait = max(wait, queue + tier.swap_seconds(0, blocks))
        return computing + max(0.0, wait - computing * (self.layers - 1) / self.layers)

    def claim(self, entries: Iterable[Entry]) -> None:
        """Keep what was looked up last where it is until it is loaded."""
        self.declined_tokens += self._declined * self.block_size
        for entry in entries:
            entry.pins += 1

    def load(self, request: Request, entries: Ordered[Entry], blocks: Ordered[int]) -> None:
        """Copy claimed blocks into fresh ones of the device."""
        probe, first = self.probe, self.tiers[0]
        for entry, block in zip(entries, blocks, strict=True):
            tier = entry.tier
            assert tier is not None
            tier.reads.append(entry)
            tier.read_blocks += 1
            if not request.preemptions:
                tier.hit_tokens += self.block_size
            if probe is not None:
                probe.transfer(tier.name, entry.slot, "device", block)
        for entry in reversed(entries):
            self._clock += 1
            assert entry.tier is not None
            entry.tier.use(entry, self._clock, request.priority)
        for entry, block in zip(reversed(entries), reversed(blocks), strict=True):
            entry.pins -= 1
            if entry.tier is not first:
                self._promote(entry, block)

    # Places

    def _store(self, key: Hashable, block: int, priority: int) -> None:
        """Write a device block to the nearest tier, unless all of it is about to be read."""
        first = self.tiers[0]
        self._clock += 1
        entry = Entry(key, self._clock, priority)
        if self._place(entry, 0):
            self.entries[key] = entry
            self._sources[block] = 0
            first.writes.append((entry, block))
            first.written_blocks += 1
            if self.probe is not None:
                self.probe.transfer("device", block, first.name, entry.slot)

    def _place(self, entry: Entry, index: int) -> bool:
        """Give a block a slot in a tier, at the cost of another block; whether there was one to be had."""
        tier = self.tiers[index]
        if tier.full:
            victim = tier.evict()
            if victim is None:
                return False
            slot = victim.slot
            if index + 1 < len(self.tiers) and self._place(victim, index + 1):
                farther = self.tiers[index + 1]
                farther.writes.append((victim, None))
                farther.written_blocks += 1
                if self.probe is not None:
                    self.probe.transfer(tier.name, slot, farther.name, victim.slot)
            else:
                del self.entries[victim.key]
                tier.dropped_blocks += 1
        tier.add(entry)
        return True

    def _promote(self, entry: Entry, block: int) -> None:
        """Move what is read into a block of the device to the nearest tier, too."""
        farther = entry.tier
        assert farther is not None
        farther.remove(entry)
        if not self._place(entry, 0):  # all of the nearest tier is about to be read
            farther.add(entry)
        elif self.probe is not None:
            self.probe.transfer("device", block, self.tiers[0].name, entry.slot)

    # Time

    def _submit(self) -> None:
        """Put the step's transfers on the links: writes from far to near, as they empty slots, then reads."""
        after = 0
        for tier in reversed(self.tiers):
            if not tier.writes:
                after = 0
                continue
            after = max(after, *[entry.ready for entry, _ in tier.writes])
            ends = tier.link.submit_out(len(tier.writes), after)
            for (entry, block), end in zip(tier.writes, ends, strict=True):
                entry.ready = end
                if block is not None:
                    self._sources[block] = end
            after = ends[-1]
            tier.writes.clear()
            if not self.asynchronous:
                self.awaited = max(self.awaited, after)
        for tier in self.tiers:
            if tier.reads:
                end = tier.link.submit_in(len(tier.reads), max([entry.ready for entry in tier.reads]))
                self.awaited = max(self.awaited, end)
                tier.reads.clear()
        if self._reused:
            self.awaited = max(self.awaited, *[self._sources[block] for block in self._reused])
            self._reused.clear()

    def check_integrity(self) -> None:
        """Recount the tiers. Raises IntegrityError with the equation that failed."""
        placed = 0
        for tier in self.tiers:
            tier.check_integrity()
            placed += len(tier.entries)
            for entry in tier.entries.values():
                if self.entries.get(entry.key) is not entry:
                    raise IntegrityError(f"{tier.name}, slot {entry.slot}: {entry.key!r} is not found there")
                if entry.pins:
                    raise IntegrityError(f"{tier.name}, slot {entry.slot}: claimed({entry.pins}) != 0")
        if placed != len(self.entries):
            raise IntegrityError(f"blocks to be found({len(self.entries)}) != blocks in tiers({placed})")
