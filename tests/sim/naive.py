"""The naive stepper: one step at a time, every sequence looked at in every step. The oracle of the engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from sim.beams import BeamSearch, fork
from sim.decode_set import arrival_order
from sim.errors import Stalled
from sim.request import NEVER, Request, Sequence
from sim.step import Step
from sim.units import FOREVER


class NaiveDecodeSet:
    """A decode set without a calendar: it walks its members."""

    def __init__(self) -> None:
        self.clock = 0
        self.steady = 0
        self.sequences: list[Sequence] = []
        self.copy_pending: list[Sequence] = []
        self.growths: dict[int, list[Sequence]] = {}
        self.turns: dict[int, list] = {}
        self.given: Counter[int] = Counter()  # tokens by tenant

    def members(self, tenant: int) -> int:
        return sum(sequence.request.tenant == tenant for sequence in self.sequences)

    def delivered(self, tenant: int) -> int:
        return self.given[tenant]

    @property
    def size(self) -> int:
        return len(self.sequences)

    @property
    def context(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def sliding(self) -> int:
        return sum(sequence.sliding for sequence in self.sequences)

    @sliding.setter
    def sliding(self, slots: int) -> None:
        """Follows from the members."""

    def join(self, sequence: Sequence) -> None:
        sequence.origin -= self.clock
        sequence.decodes = self
        self.sequences.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        tokens = sequence.num_tokens
        sequence.decodes = None
        sequence.origin = tokens
        if sequence in self.copy_pending:
            self.copy_pending.remove(sequence)

    def list_steady(self) -> None:
        """Nobody is."""

    def note_grown(self, tick, grown, step) -> None:
        assert not grown

    def note_turned(self, tick, turned, step) -> None:
        assert not turned

    def advance(self, steps: int = 1) -> None:
        assert steps == 1
        self.clock += 1
        self.given.update(sequence.request.tenant for sequence in self.sequences)

    def take_finished(self) -> list[Sequence]:
        done = sorted((s for s in self.sequences if s.num_tokens == s.final_tokens), key=arrival_order)
        for sequence in done:
            self.leave(sequence)
        return done


@dataclass
class Outcome:
    requests: list[tuple] = field(default_factory=list)
    steps: list[tuple] = field(default_factory=list)
    memory: list[tuple] = field(default_factory=list)
    counters: dict = field(default_factory=dict)
    saved: int = 0
    held: int = 0

    def loaded(self, last_arrival: int, end: int) -> tuple[int, int]:
        """The loaded period, straight from its definition."""
        refused = [(start, start + duration) for start, duration, *_, waiting in self.memory if waiting]
        if refused:
            return refused[0][0], refused[-1][1]
        first = min((row[5] for row in self.requests if row[5] != NEVER), default=None)
        if first is None:  # nobody was ever admitted
            return 0, 0
        return (first, last_arrival) if last_arrival > first else (first, end)

    def averages(self, last_arrival: int) -> dict[str, float]:
        end = self.memory[-1][0] + self.memory[-1][1]
        begin, until = self.loaded(last_arrival, end)
        sums = [0] * 6
        time = 0
        for start, duration, *parts, _ in self.memory:
            weight = max(0, min(start + duration, until) - max(start, begin))
            time += weight
            for index, part in enumerate(parts):
                sums[index] += part * weight
        names = ("token_states", "reserved", "internal", "external", "free")
        total = sum(sums[:5])
        parts = zip(names, sums[:5], strict=True)
        shares = {f"{name}_share": value / total if total else None for name, value in parts}
        return {"mean_running": sums[5] / time if time else None, **shares}


def run_naively(
    requests: list[Request], scheduler, timing, transfers, max_model_len: int, beams=None
) -> Outcome:
    """Serve the requests (in order of arrival), checking the allocator's books before every step."""
    scheduler.decodes = NaiveDecodeSet()
    scheduler.recovery.price(timing, transfers)
    scheduler.widest = FOREVER + 1  # every growth one by one, in order of arrival
    scheduler.add = scheduler.enqueue
    allocator = scheduler.allocator
    allocator.asks_exactly = False  # everybody is asked
    timing.num_slots = allocator.num_slots
    search = None if beams is None else BeamSearch(*beams)
    outcome = Outcome()
    link = allocator.link
    waited = 0
    counters = dict.fromkeys(("preemptions", "copied_blocks", "swapped_out_blocks", "swapped_in_blocks"), 0)
    # Instant, rank (arrivals before what answers lead to), number, request.
    coming = [(each.arrival_time, 0, number, each) for number, each in enumerate(requests)]
    numbers = count()
    now = 0
    sent = 0

    def over(request: Request) -> None:
        if request.session is not None:
            for delay, follower in request.session.answered(request):
                coming.append((now + delay, 1, next(numbers), follower))
            coming.sort(key=lambda entry: entry[:3])
        outcome.requests.append(
            (
                request.id, request.arrival_time, request.prompt_tokens, request.output_tokens * request.width,
                request.status, request.first_scheduled_time, request.first_token_time, request.finish_time,
                request.preemptions, request.reason, request.cached_tokens,
            )
        )  # fmt: skip

    def complete(sequence: Sequence) -> None:
        if scheduler.complete(sequence):
            sequence.request.status = "finished"
            sequence.request.finish_time = now
            over(sequence.request)

    def note(start: int, duration: int, running: int, waiting: int, refused: bool) -> None:
        usage = allocator.usage(refused)
        parts = (usage.token_states, usage.reserved, usage.internal, usage.external, usage.free)
        outcome.memory.append((start, duration, *parts, running, waiting))
        outcome.saved += allocator.blocks_saved * duration
        outcome.held += allocator.num_held * duration

    def arrive() -> None:
        nonlocal sent
        while coming and coming[0][0] <= now:
            instant, _, _, request = coming.pop(0)
            request.arrival_time = instant
            if request.session is not None:
                request.id = sent
            sent += 1
            if request.prompt_tokens > max_model_len:
                request.status = "rejected"
                request.reason = (
                    f"prompt of {request.prompt_tokens} tokens exceeds max_model_len {max_model_len}"
                )
                over(request)
                continue
            request.output_tokens = min(request.output_tokens, max(1, max_model_len - request.prompt_tokens))
            scheduler.add(request)

    moved = 0  # blocks swapped out by plans without tokens
    replanned = False
    while True:
        arrive()
        if link is not None:
            allocator.land(now)
            link.now = now
            link.awaited = 0 if not replanned else link.awaited
        if allocator.tiers is not None and not replanned:
            allocator.tiers.begin(now)
        step = scheduler.next_step(now)
        allocator.check_integrity()
        for request in step.rejected:
            over(request)
        counters["preemptions"] += len(step.preempted)
        step.swapped_out_blocks += moved
        moved = 0
        replanned = step.empty and bool(
            step.rejected or step.preempted
        )  # the next plan is of the same instant
        if step.empty:
            if link is not None:
                counters["copied_blocks"] += step.copied_blocks
            moved = step.swapped_out_blocks
            if step.rejected or step.preempted:
                continue
            if link is not None and allocator.next_landing < FOREVER:
                counters["swapped_out_blocks"] += moved
                moved = 0
                until = min([allocator.next_landing, *[entry[0] for entry in coming[:1]]])
                note(now, until - now, len(scheduler.running), scheduler.num_waiting, scheduler.head_refused)
                waited += (until - now) * bool(scheduler.running or scheduler.num_waiting)
                now = until
                continue
            if scheduler.num_waiting or scheduler.running:
                raise Stalled("naive")
            counters["swapped_out_blocks"] += moved
            moved = 0
            idle_from = now
            while coming and not scheduler.waiting:
                now = coming[0][0]
                arrive()
            if not scheduler.waiting:
                note(idle_from, 0, 0, 0, False)
                break
            if now > idle_from:
                note(idle_from, now - idle_from, 0, 0, False)
            continue
        timing.num_entries = allocator.num_entries
        seconds = timing.seconds(step)
        if step.recomputed:
            scheduler.recovery.note_recomputed(step, seconds)
        if link is None and (step.copied_blocks or step.swapped_in_blocks or step.swapped_out_blocks):
            seconds += transfers.seconds(step)
            swaps = transfers.swap_seconds(step.swapped_out_blocks, step.swapped_in_blocks)
            swaps += transfers.quantize_block * (step.swapped_out_blocks + step.swapped_in_blocks)
            waited += round(swaps * 1e9)
        elif step.copied_blocks or step.swapped_in_blocks or step.swapped_out_blocks:
            copies = Step()
            copies.copied_blocks = step.copied_blocks
            quantizing = transfers.quantize_block * (step.swapped_out_blocks + step.swapped_in_blocks)
            waited += round(quantizing * 1e9)
            seconds += transfers.seconds(copies) + quantizing
        for name in ("copied_blocks", "swapped_out_blocks", "swapped_in_blocks"):
            counters[name] += getattr(step, name)
        duration = max(1, round(seconds * 1e9))
        if link is not None and link.awaited > now:
            hidden = duration * (transfers.overlapping_layers - 1) // transfers.overlapping_layers
            stall = max(0, link.awaited - now - hidden)
            waited += stall
            duration += stall
        if allocator.tiers is not None:
            duration += allocator.tiers.stall(now, duration)
        running, waiting = len(scheduler.running), scheduler.num_waiting
        prefill = sum(tokens for _, _, tokens in step.chunks)
        assert step.num_decodes in (0, scheduler.decodes.size)
        outcome.steps.append((now, duration, prefill, step.num_decodes, running, waiting))
        note(now, duration, running, waiting, scheduler.head_refused)
        now += duration
        for sequence, begin, tokens in step.chunks:
            request = sequence.request
            retired = not sequence.final_tokens  # with the first of its group, whose last tokens these are
            assert retired or begin + tokens == sequence.num_tokens <= request.prefill_tokens
            if begin + tokens < request.prefill_tokens:
                continue
            if allocator.keeps_freed:
                allocator.computed(sequence)
            branches = [sequence]
            if request.first_token_time == NEVER:
                request.first_token_time = now
                branches += [fork(allocator, sequence) for _ in range(1, request.width)]
                request.sequences[:] = branches
            done = sequence.origin == sequence.final_tokens
            for branch in branches:
                if done:
                    complete(branch)
                else:
                    scheduler.decodes.join(branch)
                    if len(branches) == 1 and allocator.shares_tail(branch):
                        scheduler.decodes.copy_pending.append(branch)
            if len(branches) > 1 and not done:
                scheduler.decodes.copy_pending += branches
                if search is not None and request.beam_width > 1:
                    search.start(request, scheduler.decodes)
        if step.num_decodes:
            for sequence in scheduler.decodes.take_finished():
                complete(sequence)
        if search is not None:
            search.turn_over(scheduler)
    outcome.counters = {
        **counters, "recomputed_tokens": scheduler.recomputed_tokens, "swap_refused": scheduler.swap_refused
    }  # fmt: skip
    saved = outcome.saved * allocator.block_slots
    if allocator.tiers is not None:
        asked = sum(row[2] for row in outcome.requests if row[5] != NEVER)
        outcome.counters |= allocator.tiers.figures(asked)
    outcome.counters["swap_stall_s"] = waited / 1e9
    outcome.counters["blocks_saved_share"] = saved / (outcome.held + saved) if outcome.held else 0.0
    return outcome
