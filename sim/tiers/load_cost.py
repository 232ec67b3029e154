"""The cost of loading: how much of a prompt is faster read from tiers than computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from itertools import groupby

from sim.request import Request
from sim.tiers.run_index import Piece
from sim.tiers.storage_tier import Copies, StorageTier
from sim.tiers.traffic import TierTraffic


class LoadCost:
    """What the step that admits a request takes, by how much of the prompt is loaded.

    That is what the rest of the prompt adds to a step of the sequences that decode now, and the wait for the copies,
    as far as no layer can be computed meanwhile. Copies begin behind those that go before them on the links of their
    tiers, and not before the blocks are there.
    """

    def __init__(self, tiers: Ordered[StorageTier], traffic: TierTraffic) -> None:
        self._tiers = tiers
        self._traffic = traffic
        self.price: Callable[[Request, int], float] | None = None
        """Seconds that computing a request's prompt adds to a step, behind so many tokens."""

    def worth(self, request: Request, pieces: Iterable[Piece], before: int, block_size: int) -> int:
        """How many blocks to load: all that tiers have up to the one where the step is shortest, the least on a tie.

        `pieces` are what is found behind `before` tokens on the device.
        """
        reads = {tier: sum([count for _, count in tier.reads]) for tier in self._tiers}
        ready = dict.fromkeys(self._tiers, self._traffic.now)
        copies = {tier: tier.back.copy() for tier in self._tiers}
        best = self._seconds(request, before, reads, ready, copies)
        loaded = worth = 0
        for tier, found in groupby(pieces, lambda piece: piece[0].tier):
            assert tier is not None
            for run, first, count in found:
                loaded += count
                copies[tier].add(run.slots[first : first + count])
                reads[tier] += count
                ready[tier] = max(ready[tier], run.ready)
            seconds = self._seconds(request, before + loaded * block_size, reads, ready, copies)
            if seconds < best:
                best, worth = seconds, loaded
        return worth

    def cheapest(self, request: Request, choices: Ordered[tuple[int, Ordered[Piece]]]) -> int:
        """Which choice makes the step shortest, the first on a tie.

        Each has the tokens behind which the prompt is computed, and what is loaded of them.
        """
        seconds = []
        for before, pieces in choices:
            reads = {tier: sum([count for _, count in tier.reads]) for tier in self._tiers}
            ready = dict.fromkeys(self._tiers, self._traffic.now)
            copies = {tier: tier.back.copy() for tier in self._tiers}
            for run, first, count in pieces:
                tier = run.tier
                assert tier is not None
                copies[tier].add(run.slots[first : first + count])
                reads[tier] += count
                ready[tier] = max(ready[tier], run.ready)
            seconds.append(self._seconds(request, before, reads, ready, copies))
        return seconds.index(min(seconds))

    def _seconds(
        self,
        request: Request,
        before: int,
        reads: dict[StorageTier, int],
        ready: dict[StorageTier, int],
        copies: dict[StorageTier, Copies],
    ) -> float:
        """What a request adds to a step that computes it behind the token `before`, and waits for these reads."""
        assert self.price is not None, "loads have no price before a run"
        computing = self.price(request, before)
        wait = 0.0
        for tier, blocks in reads.items():
            if blocks:
                begin = max(tier.link.in_free_at, ready[tier])
                wait = max(
                    wait,
                    (begin - self._traffic.now) / 1e9 + tier.swap_seconds(0, blocks) + copies[tier].seconds,
                )
        return computing + max(0.0, wait - computing * (self._traffic.layers - 1) / self._traffic.layers)
