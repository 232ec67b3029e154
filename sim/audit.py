"""An audit: on sampled steps, every slot of every sequence against what the ledger says."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence as Ordered

import numpy as np

from sim.allocators.base import Allocator
from sim.errors import IntegrityError
from sim.identity import Ints, identities
from sim.layout import Layout
from sim.ledger import Ledger
from sim.request import Sequence
from sim.sampled_steps import SampledSteps
from sim.tier import Tier

SAMPLE_S, BLOCK_S, SEQUENCE_S, TOKEN_S = 1.5e-3, 60e-9, 20e-6, 30e-9
"""CPU seconds that a sample costs, of them for each block, sequence and token."""


class Audit:
    """Probe that keeps a ledger and proves the allocator's tables right by it. Nothing is asked of an allocator.

    A sampled step proves that

    - every token's slot is where the block table says, inside the memory, and in a block that somebody holds;
    - it holds the very token that its sequence has at that position, on the host too; so two sequences share a
      slot only where their histories are equal;
    - without sharing, no slot is reserved twice, filled or not;
    - the allocator's own books add up (`check_integrity`).

    And after the run nothing is held anywhere. Which steps are sampled is for `SampledSteps` to say; `cpu_s` is
    the CPU time spent in samples.
    """

    ledger: Ledger

    def __init__(
        self,
        *,
        samples: int = 64,
        every: int | None = None,
        num_requests: int | None = None,
        share: float = 1.0,
    ) -> None:
        self.steps = SampledSteps(samples, every, num_requests, share)
        self.next_sample = 0
        self.cpu_s = 0.0
        self._started = 0

    @property
    def num_samples(self) -> int:
        """Steps looked at so far."""
        return self.steps.taken

    def start(self, allocator: Allocator) -> None:
        """Open a ledger that is told of everything from the first slot on."""
        self.ledger = Ledger(allocator)
        allocator.watch(self.ledger)

    def sample(self, step: int, time: int, sequences: Ordered[Sequence]) -> None:
        """Prove what all sequences hold. Raises ProbeError with the first thing that is wrong."""
        begin = clock.process_time()
        ledger = self.ledger
        ledger.when = f"step {step}"
        self._check_disjoint(sequences)
        live = [sequence for sequence in sequences if sequence.num_tokens]
        if live:
            layout = ledger.layout(live)
            self._check_held(layout)
            self._compare(layout, ledger.enter(layout), ledger.device)
        self._check_swapped()
        self._check_books()
        if sequences:
            self._started = max(self._started, sequences[-1].request.id + 1)
        over = self._started - len({sequence.request for sequence in sequences})
        self.next_sample = self.steps.after(step, over, self._cost(live))
        ledger.when = f"after step {step}"
        self.cpu_s += clock.process_time() - begin

    def finish(self) -> None:
        """Prove that nothing is left."""
        begin = clock.process_time()
        ledger = self.ledger
        ledger.when = "at the end of the run"
        self._check_books()
        for tier in ledger.tiers.values():
            left = np.flatnonzero(tier.held())
            if len(left):
                raise ledger.error(
                    f"{tier.name} blocks still held({len(left)}) != 0, block {left[0]} for one"
                )
        for sequence in [*ledger.allocator.sequences, *ledger.live]:
            raise ledger.error(f"{sequence} never ended, and has {sequence.capacity} slots")
        if ledger.allocator.num_held:
            raise ledger.error(f"slots still held({ledger.allocator.num_held}) != 0")
        self.cpu_s += clock.process_time() - begin

    def _cost(self, live: list[Sequence]) -> float:
        """CPU seconds of a sample with these sequences, roughly; measured beside those of `SampledSteps`."""
        blocks = sum(pool.num_blocks for pool in self.ledger.allocator.pools)
        tokens = sum(sequence.num_tokens for sequence in live)
        return SAMPLE_S + BLOCK_S * blocks + SEQUENCE_S * len(live) + TOKEN_S * tokens

    def _check_held(self, layout: Layout) -> None:
        """Every token is in a block with a holder."""
        device = self.ledger.device
        if self.ledger.pooled:
            loose = np.flatnonzero(~device.held()[layout.slots // device.block_size])
            if len(loose):
                at = int(loose[0])
                block = layout.slots[at] // device.block_size
                raise self.ledger.error(f"{layout.told(at)} is in block {block}, which is free")

    def _compare(self, layout: Layout, contents: Ints, tier: Tier) -> None:
        """Every slot holds its sequence's own token."""
        found = tier.slots[layout.slots]
        wrong = np.flatnonzero(found != contents)
        if len(wrong):
            at = int(wrong[0])
            raise self.ledger.error(
                f"{layout.told(at, tier.name)}: expected its own content ({contents[at]:#x}), "
                f"found {self.ledger.told(int(found[at]))}"
            )

    def _check_disjoint(self, sequences: Ordered[Sequence]) -> None:
        """No slot is in two reservations; where blocks are handed out, `_compare` and the books say so."""
        allocator = self.ledger.allocator
        if self.ledger.pooled or allocator.can_fork:
            return
        owner = np.full(allocator.num_slots, -1)
        for index, sequence in enumerate(sequences):
            held = allocator.held_slots(sequence)
            if len(held) and (held.min() < 0 or held.max() >= len(owner)):
                raise self.ledger.error(
                    f"{sequence} holds slots {held.min()} to {held.max()}, expected 0 to {len(owner) - 1}"
                )
            taken = held[owner[held] >= 0]
            if len(taken):
                raise self.ledger.error(
                    f"{sequence}, slot {taken[0]}: expected it for itself alone, "
                    f"found it held by {sequences[owner[taken[0]]]} too"
                )
            owner[held] = index

    def _check_swapped(self) -> None:
        """What was moved to the host is there."""
        ledger = self.ledger
        on_device = ledger.allocator.sequences
        away = [sequence for sequence in ledger.live if sequence.block_table and sequence not in on_device]
        if away and "host" in ledger.tiers:
            host = ledger.tiers["host"]
            host.reset()
            layout = Layout(away)
            complaint = layout.complaint(host, True)
            if complaint:
                raise ledger.error(complaint)
            contents, _ = identities([ledger.live[sequence].history for sequence in away], layout.lengths)
            self._compare(layout, contents, host)

    def _check_books(self) -> None:
        try:
            self.ledger.allocator.check_integrity()
        except IntegrityError as error:
            raise self.ledger.error(str(error)) from error
        for tier in self.ledger.tiers.values():
            complaint = tier.complaint()
            if complaint:
                raise self.ledger.error(complaint)
