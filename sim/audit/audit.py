"""An audit: on sampled steps, every slot of every sequence against what the ledger says."""

from __future__ import annotations

import random
import time as clock
from collections.abc import Sequence as Ordered

import numpy as np

from sim.allocators.base import Allocator
from sim.allocators.grouped import GroupedAllocator
from sim.audit.grouped_ledger import GroupedLedger, GroupLayout
from sim.audit.layout import Layout
from sim.audit.ledger import Ledger
from sim.audit.sampled_steps import SampledSteps
from sim.errors import IntegrityError
from sim.identity import Ints, identities
from sim.request import Sequence
from sim.stopwatch import Stopwatch
from sim.tiers.tier import Tier

THOROUGH = 8
"""Of so many samples one looks at everything."""
DRAWN_SEQUENCES, DRAWN_TOKENS = 4, 4096
"""What the others look at: so many sequences with their siblings, and about so many tokens at most."""
SAMPLE_S, BLOCK_S, SEQUENCE_S, TOKEN_S = 1.2e-3, 60e-9, 20e-6, 30e-9
"""CPU seconds that a sample costs; a thorough one also so much for each block, sequence and token."""


class Audit:
    """Probe that keeps a ledger and proves the allocator's tables right by it. Nothing is asked of an allocator.

    A sampled step proves for a few sequences, those first whose blocks were copied or moved since the last one, and
    on every eighth sample for all, that

    - every token's slot is where the block table says, inside the memory, and in a block that somebody holds;
    - it holds the very token that its sequence has at that position, on the host too; so two sequences share a
      slot only where their histories are equal;

    and where it looks at all, that

    - without sharing, no slot is reserved twice, filled or not;
    - the allocator's own books add up (`check_integrity`).

    After the run nothing is held anywhere. Which steps are sampled is for `SampledSteps` to say, beside those in
    which blocks are shared, copied or moved for the 1st, 4th, 16th ... time; with `every` each sample looks at all.
    Of beam groups whose blocks an allocator can count, only a few have tables to be looked at, one in 64, but for the
    first; with `every` all have.
    `looked_at` are the sequences of the last sample, all if it was `thorough`; `cpu_s` is the CPU time spent in
    samples and on the ledger.
    """

    ledger: Ledger | GroupedLedger

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
        self._sampling_s = 0.0
        self._stopwatch: Stopwatch | None = None
        self.looked_at: list[Sequence] = []
        self.thorough = True
        self._started = 0
        self._random = random.Random(0)

    @property
    def telling_s(self) -> float:
        """CPU seconds that the ledger took for what it was told between samples."""
        return self._stopwatch.cpu_s if self._stopwatch is not None else 0.0

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the samples, and of the ledger between them."""
        return self._sampling_s + self.telling_s

    @property
    def num_samples(self) -> int:
        """Steps looked at so far."""
        return self.steps.taken

    def start(self, allocator: Allocator) -> None:
        """Open a ledger that is told of everything from the first slot on."""
        if isinstance(allocator, GroupedAllocator):
            self.ledger = GroupedLedger(allocator)
        else:
            self.ledger = Ledger(allocator)
        if self.steps.every is None:
            self.ledger.on_event = self._hurry
        elif isinstance(self.ledger, Ledger):
            self.ledger.follows_all = True
        self._stopwatch = Stopwatch(self.ledger)
        allocator.watch(self._stopwatch)

    def _hurry(self) -> None:
        """Sample the step that is being planned."""
        self.next_sample = 0

    def sample(self, step: int, time: int, sequences: Ordered[Sequence]) -> None:
        """Prove what sequences hold. Raises ProbeError with the first thing that is wrong."""
        begin = clock.process_time()
        ledger = self.ledger
        ledger.when = f"step {step}"
        thorough = self.thorough = self.steps.every is not None or self.num_samples % THOROUGH == 0
        live = [each for each in sequences if each.num_tokens and each.request.counted is None]
        self.looked_at = live if thorough else self._drawn(live)
        ledger.changed.clear()
        if thorough:
            self._check_disjoint(sequences)
        if self.looked_at:
            layout = ledger.layout(self.looked_at)
            self._check_held(layout)
            contents = ledger.enter(layout)  # type: ignore[arg-type]  # the ledger's own layout
            self._compare(layout, contents, ledger.device)
        if thorough:
            self._check_swapped()
            self._check_books()
        if sequences:
            self._started = max(self._started, sequences[-1].request.id + 1)
        on_their_way = len({sequence.request for sequence in sequences})
        whole = self._cost(live)
        self.next_sample = self.steps.after(
            step,
            self._started - on_their_way,
            on_their_way,
            SAMPLE_S + whole * thorough,
            SAMPLE_S + whole / THOROUGH,
        )
        ledger.when = f"after step {step}"
        self._sampling_s += clock.process_time() - begin

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
        self._sampling_s += clock.process_time() - begin

    def _drawn(self, live: list[Sequence]) -> list[Sequence]:
        """Sequences whose blocks changed, and others at random, each with all of its request."""
        changed = self.ledger.changed
        first = [s for s in live if changed and not changed.isdisjoint(s.block_table)][:DRAWN_SEQUENCES]
        others = self._random.sample(live, min(len(live), DRAWN_SEQUENCES))
        drawn: dict[Sequence, None] = {}
        tokens = 0
        for chosen in [*first, *others]:
            if chosen not in drawn and (tokens < DRAWN_TOKENS or not drawn):
                for sequence in chosen.request.sequences:
                    if sequence.num_tokens and sequence in self.ledger.allocator.sequences:
                        drawn[sequence] = None
                        tokens += sequence.num_tokens
        return list(drawn)

    def _cost(self, live: list[Sequence]) -> float:
        """CPU seconds that looking at all takes, roughly; measured beside those of `SampledSteps`."""
        blocks = sum(pool.num_blocks for pool in self.ledger.allocator.pools)
        tokens = sum(sequence.num_tokens for sequence in live)
        return BLOCK_S * blocks + SEQUENCE_S * len(live) + TOKEN_S * tokens

    def _check_held(self, layout: Layout | GroupLayout) -> None:
        """Every token is in a block with a holder."""
        device = self.ledger.device
        if device.pool is not None:
            references = device.pool.references
            blocks = layout.slots // device.block_size
            loose = [block for block in np.unique(blocks).tolist() if not references[block]]
            if loose:
                at = int(np.flatnonzero(np.isin(blocks, loose))[0])
                raise self.ledger.error(f"{layout.told(at)} is in block {blocks[at]}, which is free")

    def _compare(self, layout: Layout | GroupLayout, contents: Ints, tier: Tier) -> None:
        """Every slot holds its sequence's own token."""
        if self.ledger.precision is not None:
            self._compare_precision(layout, tier, self.ledger.precision)
        found = tier.slots[layout.slots]
        wrong = np.flatnonzero(found != contents)
        if len(wrong):
            at = int(wrong[0])
            raise self.ledger.error(
                f"{layout.told(at, tier.name)}: expected its own content ({contents[at]:#x}), "
                f"found {self.ledger.told(int(found[at]))}"
            )

    def _compare_precision(self, layout: Layout | GroupLayout, tier: Tier, precision: str) -> None:
        """What is stored, or was swapped, at a lower precision has that, and nothing else has."""
        ledger = self.ledger
        expected = ledger.quantized(layout)  # type: ignore[arg-type]  # the ledger's own layout
        found = tier.quantized.reshape(-1)[layout.slots]
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            at = int(wrong[0])
            own = "the model's own"
            names = (precision, own) if expected[at] else (own, precision)
            raise ledger.error(
                f"{layout.told(at, tier.name)}: expected precision {names[0]}, found {names[1]}"
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
        if away and isinstance(ledger, Ledger) and "host" in ledger.tiers:
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
