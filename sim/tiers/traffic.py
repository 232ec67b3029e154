"""The traffic of tiers: what a planned step copies over their links, and what it waits for."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from sim.tiers.storage_tier import Run, StorageTier


class TierTraffic:
    """Copies between the device and its tiers, on each link behind what was submitted before (times in ns).

    Transfers of a planned step are submitted together. The step waits for what it reads, and for blocks that it
    reuses while they are still copied out; where transfers are synchronous for all that it writes, too.
    """

    def __init__(self, tiers: Ordered[StorageTier]) -> None:
        self.tiers = tiers
        self.asynchronous = False
        self.layers = 1  # that a step computes one after the other while it waits
        self.now = 0
        self.wait_time = 0
        self._sources: dict[int, list[int]] = {}  # device blocks that are copied out, until when
        self._awaited = 0
        self._reused: list[int] = []  # device blocks whose copies the step waits for
        self._waited: list[
            tuple[Ordered[int], list[int]]
        ] = []  # those whose copies it waits for in any case, likewise
        self._copied_by = 0  # all sources
        self._step_end = 0  # of the last step that was planned
        self._copying = False  # whether the step that is planned has transfers

    def begin(self, now: int) -> None:
        """A plan begins; if the one before led to no step, what it told is submitted."""
        if self.planned:
            self.submit()
            for blocks, until in self._waited:
                self._sources.update(dict.fromkeys(blocks, until))
            self._waited.clear()
        self.now, self._awaited = now, 0
        for tier in self.tiers:
            tier.link.now = now
        if self._copied_by <= now:
            self._sources.clear()

    @property
    def planned(self) -> bool:
        """Whether the step that is planned has transfers, or waits for some."""
        return self._copying or bool(self._reused) or self._awaited > 0

    @property
    def copying_out(self) -> bool:
        """Whether it matters which device blocks are handed out."""
        return bool(self._sources)

    @property
    def settled(self) -> bool:
        """Whether no block that is taken after the step has to be waited for."""
        return self._copied_by <= self._step_end

    def write(self, tier: StorageTier, run: Run, sources: Ordered[int] | None, *, lifted: bool) -> None:
        """A run is written to a tier, from these blocks of the device if it comes from there.

        The step waits for those that are lifted, which are handed out again by the same plan, and where transfers
        are synchronous.
        """
        count = len(run.keys)
        until = [0]
        if sources is not None and (lifted or not self.asynchronous):
            self._waited.append((sources, until))
        elif sources is not None:
            self._sources.update(dict.fromkeys(sources, until))
        tier.writes.append((run, count, until))
        tier.written_blocks += count
        tier.out.add(run.slots)
        self._copying = True

    def read(self, tier: StorageTier, run: Run) -> None:
        """A run is read from a tier."""
        count = len(run.keys)
        tier.reads.append((run, count))
        tier.read_blocks += count
        tier.back.add(run.slots)
        self._copying = True

    def reuse(self, blocks: Ordered[int]) -> None:
        """These blocks of the device are handed out by the step that is planned."""
        sources = self._sources
        if sources and not sources.keys().isdisjoint(blocks):
            self._reused += [block for block in blocks if block in sources]

    def submit(self) -> None:
        """Put the step's transfers on the links: writes from far to near, as they empty slots, then reads."""
        after = 0
        for tier in reversed(self.tiers):
            writes = tier.writes
            if not writes:
                after = 0
                continue
            count = 0
            for run, blocks, _ in writes:
                count += blocks
                if run.ready > after:
                    after = run.ready
            after = tier.link.copy_out(count, after, tier.out.seconds)
            tier.out.clear()
            for run, _, until in writes:
                run.ready = until[0] = after
            writes.clear()
            if after > self._copied_by:
                self._copied_by = after
            if after > self._awaited and not self.asynchronous:
                self._awaited = after
        for _, until in self._waited:
            if until[0] > self._awaited:
                self._awaited = until[0]
        for tier in self.tiers:
            if tier.reads:
                count = sum([count for _, count in tier.reads])
                ready = max([run.ready for run, _ in tier.reads])
                end = tier.link.submit_in(count, ready, tier.back.seconds)
                tier.back.clear()
                self._awaited = max(self._awaited, end)
                tier.reads.clear()
        if self._reused:
            sources = self._sources
            ends = [sources[block][0] for block in self._reused if block in sources]
            self._awaited = max(self._awaited, *ends) if ends else self._awaited
            self._reused.clear()
        self._copying = False

    def stall(self, start: int, duration: int) -> int:
        """Submit the transfers of a step; what it waits, if it computes for so long and could begin at `start`."""
        if not self.planned:
            self._step_end = start + duration
            return 0
        self.submit()
        self._waited.clear()  # they are there when it is over
        wait = max(0, self._awaited - start - duration * (self.layers - 1) // self.layers)
        self._awaited = 0
        self.wait_time += wait
        self._step_end = start + duration + wait
        return wait
