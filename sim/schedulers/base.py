"""What a scheduler is: who runs in the next step, who is admitted, who gives way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from sim.allocators.base import allocator as allocators
from sim.allocators.capacity import Admission
from sim.decode_set import arrival_order
from sim.registry import Registry
from sim.request import Request, Sequence, one_priority
from sim.schedulers.orders import meaningless
from sim.schedulers.queues import Preemption, Queues, arrival, branches
from sim.step import Step
from sim.units import FOREVER

__all__ = ["Preemption", "Scheduler", "arrival", "branches", "scheduler"]

scheduler: Registry[type[Scheduler]] = Registry("scheduler")


class Scheduler(Queues, ABC):
    """Who decides over the queues of one allocator.

    A policy implements `plan`. It may call what stands below it here and in `Queues`: `grow`, `preempt`,
    `swap_in`, `admit`, `compute`, `reject`; the engine tells it of computed prompts and finished sequences. Its
    first parameter is the allocator; the keyword-only ones are its YAML fields.
    """

    # What a policy decides

    @abstractmethod
    def plan(self, now: int) -> Step:
        """What the step that starts now (ns) does; slots for its tokens are taken when it returns."""

    def quiet_for(self, now: int) -> int:
        """Decode steps for which `plan` would only grow the decode set again.

        Counted from a plan that only grew it, and as long as memory suffices, no sequence finishes and no
        request arrives that could be admitted. A policy that depends on time or counts its own steps keeps
        this default of none.
        """
        return 0

    @property
    def open_to_arrivals(self) -> bool:
        """Whether a request that arrives now would be looked at by the next plan."""
        return True

    # What the engine calls

    def next_step(self, now: int) -> Step:
        """The order's turn, if it has one, and then the plan."""
        if self.ranking is None:
            step = self.plan(now)
        else:
            before = Step()
            self.ranking.begin(self, now, before)
            step = self.plan(now)
            step.preempted[:0] = before.preempted
        if self.allocator.slides:
            self.allocator.look_at_windows()
        return step

    # What policies share

    def could_admit(self, request: Request) -> bool:
        """Whether memory and the number of sequences allow for a request now; true for one that they never will."""
        if self.num_seqs + branches(request) > self.max_num_seqs >= request.width:
            return False
        return self.allocator.admission(request, request.prefill_tokens) is not Admission.LATER

    def give_way(self, request: Request, step: Step) -> None:
        """Send a running request of one branch back to the queue for the sake of another."""
        preemption, self.preemption = self.preemption, "recompute"
        self.preempt(request, step)
        self.preemption = preemption

    def grow(self, step: Step) -> None:
        """Give every decoding sequence a slot for its next token and put them into the step.

        While a request cannot have its slots, another one is preempted, in the end the request itself.
        """
        decodes = self.decodes
        if not decodes.size:
            return
        allocator = self.allocator
        tick = decodes.clock + 1
        growing = decodes.growths.get(tick, ())
        pending = decodes.copy_pending
        counted = allocator.counted
        lacking = len(growing) + len(pending) + decodes.steady
        if counted is not None:
            lacking += counted.demand
        self.tight = allocator.headroom - lacking < self.widest
        if counted is not None and not self.tight:
            step.copied_blocks += counted.grow()
        if self.tight or pending:
            decodes.list_steady()
        if self.tight:
            self._grow_one_by_one(step)
        elif pending:
            turning = [edge.sequence for edge in decodes.turns.get(tick, ())]
            growing = decodes.growths.get(tick, ())
            for sequence in sorted({*growing, *pending, *turning}, key=arrival_order):
                step.copied_blocks += allocator.append(sequence)
            self.note_grown()
        elif growing or decodes.steady or tick in decodes.turns:
            decodes.grow_next(allocator)
        self.decode(step)

    def decode(self, step: Step) -> None:
        """Put the decode set into the step: its slots are taken."""
        decodes = self.decodes
        if not decodes.size:
            return
        if self.allocator.slides:
            self.allocator.settle()
        decodes.advance()
        self.allocator.num_ticks += 1
        self.allocator.num_tokens += decodes.size * self.allocator.slots_per_token
        if decodes.sliding:
            self.allocator.slide(decodes.sliding)
        step.num_decodes = decodes.size
        step.decode_context = decodes.context

    def grow_ahead(self, ticks: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Grow the decode set through further ticks while nobody could be refused (see `DecodeSet.grow`)."""
        spare = self.widest + self.allocator.yielding
        return self.decodes.grow(self.allocator, ticks, spare, self.head_refused)

    def _grow_one_by_one(self, step: Step) -> None:
        """In order of arrival, as vLLM V0 does where blocks are short."""
        allocator = self.allocator
        queue = sorted([request for request in self.running if request.sequences[0].decodes], key=arrival)
        index = 0
        while index < len(queue):
            request = queue[index]
            index += 1
            while not allocator.can_append(request):
                candidates = queue[index:]
                chosen = self._choose_victim(candidates) if candidates else request
                self.preempt(chosen, step)
                if chosen is request:
                    break
                queue.remove(chosen)
            else:
                self.append(request, step)
        self.note_grown()

    def append(self, request: Request, step: Step) -> None:
        """Give every branch of a decoding request a slot for its next token."""
        if request.counted is not None:
            step.copied_blocks += request.counted.grow()
            return
        for sequence in request.sequences:
            step.copied_blocks += self.allocator.append(sequence)

    def note_grown(self) -> None:
        """Note that all sequences that need a slot or a copy at the next tick have theirs, and windows have turned."""
        decodes, tick = self.decodes, self.decodes.clock + 1
        decodes.copy_pending = []
        decodes.note_grown(tick, decodes.growths.pop(tick, []), None)
        decodes.note_turned(tick, decodes.turns.pop(tick, []), None)

    def preempt(self, request: Request, step: Step) -> None:
        """Take a running request's memory: move it to the host, or drop it and compute it again later.

        `auto` follows vLLM V0: a single sequence is recomputed, a group is swapped, or given up if the host has no
        room for it; `hybrid` takes the cheaper way for all of a request (see `Recovery`). Else what the host has no
        room for is recomputed too. What is computed again is the prompt, as far as it was asked for, and the tokens
        generated since, in a group those of every branch; after a `partial` preemption only what others took of it.
        """
        allocator, decodes = self.allocator, self.decodes
        count = branches(request)
        swap = self.recovery.swaps(request)
        if not swap and self.recovery.refused(request):
            self.swap_refused += 1
        for sequence in request.sequences:
            if sequence.decodes is not None:
                decodes.leave(sequence)
        if swap:
            if allocator.probe is not None:
                for sequence in request.sequences:
                    allocator.probe.write(sequence)
            step.swapped_out_blocks += allocator.swap_out(request)
            request.status = "swapped"
            self.swapped[request] = None
        elif self.recovery.computes(request):
            tokens = request.sequences[0].origin
            if tokens >= request.prefill_tokens:
                request.prefill_tokens = tokens + 1
            self.lost[request] = max(self.lost.get(request, 0), tokens)
            request.status = "waiting"
            if len(request.sequences) > 1:
                allocator.remember(request)
            stops = self.preemption == "partial" and allocator.can_stop
            for sequence in request.sequences:
                if stops:
                    allocator.stop(sequence)
                else:
                    self.release(sequence)
            self.requeue(request)
        else:
            for sequence in request.sequences:
                self.release(sequence)
            self.reject(
                request,
                f"preempted as a group of {len(request.sequences)}, and the host pool has no room for its blocks",
                step,
            )
        del self.running[request]
        self.partial.pop(request, None)
        self.num_seqs -= count
        request.preemptions += 1
        step.preempted.append(request)

    @property
    def nobody_left(self) -> bool:
        """Whether nobody holds memory who might still give it back."""
        return not self.allocator.sequences and not self.allocator.yielding

    def swap_in(self, step: Step, budget: int = FOREVER) -> int:
        """Bring swapped requests back in order of arrival while they fit; they go on in this very step.

        Those whose copies run ahead on the link go on in the first step after they have arrived. Returns what they
        leave of a budget of tokens.
        """
        allocator, link = self.allocator, self.allocator.link
        queue = sorted(self.swapped, key=arrival)
        if self.incoming:
            assert link is not None
            queue.sort(key=lambda request: request not in self.incoming)
            queue = [each for each in queue if self.incoming.get(each, (0, 0))[0] <= link.now]
        for request in queue:
            there = request in self.incoming
            admission = Admission.OK if there else allocator.swap_in_admission(request)
            if admission is Admission.LATER and self.nobody_left:
                admission = Admission.NEVER
            ahead = link is not None and link.transfers.prefetch and not there
            count = branches(request)
            first = request.sequences[0]
            room = first.capacity  # a fresh block is there for every branch
            if not there:
                room += allocator.growth or 0
            tokens = min(request.prefill_tokens - first.origin, budget, room - first.origin)
            if tokens <= 0:  # its prompt is computed, or nothing is left
                tokens = len(request.sequences)
            alone = not step.chunks and not step.num_decodes  # who exceeds the whole budget goes alone
            others = self.num_seqs - self.resting_seqs
            if ahead:
                others += sum(map(branches, self.incoming))
            over = (tokens > budget and not alone and not ahead) or others + count > self.max_num_seqs
            if admission is Admission.LATER or (admission is Admission.OK and over):
                break
            if ahead and admission is Admission.OK:
                self._fetch(request, step)
                continue
            del self.swapped[request]
            if admission is Admission.NEVER:
                for sequence in request.sequences:
                    if allocator.probe is not None:
                        allocator.probe.end(sequence)
                    allocator.free(sequence)
                self.reject(request, "swapped out, and too large to come back even into an empty pool", step)
                continue
            if there:
                step.swapped_in_blocks += self.incoming.pop(request)[1]
            else:
                step.swapped_in_blocks += allocator.swap_in(request)
                if link is not None:
                    link.awaited = max(link.awaited, link.in_free_at)
            request.status = "running"
            self.enrol(request)
            self.num_seqs += count
            budget -= tokens
            if first.origin < request.prefill_tokens:
                self.partial[request] = None
                self.compute(request, tokens, step)
                continue
            for sequence in request.sequences:
                step.copied_blocks += allocator.append(sequence)
                self._rejoin(sequence)
            allocator.num_tokens += tokens
            step.num_decodes += tokens
            step.decode_context = self.decodes.context
        return budget

    def _fetch(self, request: Request, step: Step) -> None:
        """Start to copy a request back, with room for its next tokens; it joins when all of it is there."""
        link = self.allocator.link
        assert link is not None
        blocks = self.allocator.swap_in(request)
        for sequence in request.sequences:
            step.copied_blocks += self.allocator.append(sequence)
        self.incoming[request] = link.in_free_at, blocks
        self.tight = True  # memory that the next growth counted on is gone

    def _rejoin(self, sequence: Sequence) -> None:
        """Join the tick in flight: the sequence's new token belongs to it."""
        sequence.origin += 1
        self.decodes.join(sequence)

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(dotted path, complaint) for options of a whole experiment that contradict each other."""
        preemption = config["scheduler"].get("preemption")
        sampling = config["workload"].get("sampling") or {}
        group = any((sampling.get(field) or 1) > 1 for field in ("n", "best_of", "beam_width"))
        limit = config["scheduler"].get("max_num_seqs")
        for field in ("n", "best_of", "beam_width"):
            if limit is not None and (sampling.get(field) or 1) > limit:
                yield (
                    f"workload.sampling.{field}",
                    f"requests of {sampling[field]} branches never run where max_num_seqs is {limit}",
                )
        moves = preemption in ("swap", "hybrid")
        recomputes = getattr(allocators[config["allocator"]["kind"]], "recomputes_groups", False)
        moved = group and (preemption in (None, "auto") or not recomputes)
        if config["allocator"].get("num_host_blocks") == 0 and (moves or moved):
            who = f"preemption is set to {preemption}: requests are" if moves else "groups of sequences are"
            yield "allocator.num_host_blocks", f"{who} swapped when memory runs out, which needs a host pool"
        if group and preemption == "recompute" and not recomputes:
            yield (
                "scheduler.preemption",
                "a group of samples or beams cannot be recomputed, it is swapped (auto)",
            )
        if config["scheduler"].get("victim") == {"kind": "lowest_priority"} and one_priority(
            config["workload"]
        ):
            yield "scheduler.victim", "all requests have the same priority: set workload.priorities"
        for field, complaint in meaningless(config["scheduler"].get("order"), config["workload"]):
            yield f"scheduler.order.{field}".removesuffix("."), complaint
