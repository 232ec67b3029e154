"""What a scheduler is: who runs in the next step, who is admitted, who gives way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from sim.allocators.base import Admission, Allocator
from sim.decode_set import DecodeSet, arrival_order
from sim.registry import Registry
from sim.request import NEVER, Request, Sequence
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER

scheduler: Registry[type[Scheduler]] = Registry("scheduler")

Preemption = Literal["auto", "recompute", "swap"]


class Scheduler(ABC):
    """Keeper of the queues, over one allocator.

    A policy implements `plan`. It may call what stands below it here: `admit`, `grow`, `preempt`, `swap_in`,
    `reject`; the engine tells it of computed prompts and finished sequences. Its first parameter is the
    allocator; the keyword-only ones are its YAML fields.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        preemption: Preemption = "auto",
        victim: Annotated[Victim, victims] = latest,
    ) -> None:
        self.allocator = allocator
        self.max_num_seqs = FOREVER if max_num_seqs is None else max_num_seqs
        self.max_num_batched_tokens = FOREVER if max_num_batched_tokens is None else max_num_batched_tokens
        self.preemption = preemption
        self.decodes = DecodeSet()
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}
        self.partial: dict[Request, None] = {}  # of those, whose prompts are not computed to their ends
        self.swapped: dict[Request, None] = {}
        self.num_seqs = 0  # branches that running requests have or will fork, those that are done aside
        self.head_refused = False  # the head of the queue waits for memory
        self.tight = False  # the last growth may have come too close to a refusal to foresee the next
        self.recomputed_tokens = 0
        self._choose_victim = victim
        self._widest = 1

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

    # What policies share

    def add(self, request: Request) -> None:
        """Queue a request that arrived."""
        self.waiting.append(request)
        if request.width > self._widest:
            self._widest = request.width

    @property
    def num_waiting(self) -> int:
        """Requests that are in and not running: queued or swapped out."""
        return len(self.waiting) + len(self.swapped)

    def head_admission(self, step: Step) -> Admission:
        """What the allocator says of the head of the queue; a head that can never run is rejected and gone."""
        request = self.waiting[0]
        tokens = request.prefill_tokens
        admission = self.allocator.admission(request, tokens)
        if admission is Admission.LATER:
            self.head_refused = True
        elif admission is Admission.NEVER:
            self.reject(self.waiting.popleft(), self.allocator.refusal(request, tokens), step)
        elif request.width > self.max_num_seqs:
            reason = f"{request.width} samples or beams exceed max_num_seqs, {self.max_num_seqs}"
            self.reject(self.waiting.popleft(), reason, step)
            admission = Admission.NEVER
        return admission

    @property
    def full(self) -> bool:
        """Whether the head of the queue would exceed max_num_seqs."""
        return self.num_seqs + branches(self.waiting[0]) > self.max_num_seqs

    def admit_in_order(self, step: Step, now: int) -> None:
        """Admit from the head of the queue until memory, sequences or prompt tokens are used up."""
        batched = 0
        while self.waiting:
            tokens = self.waiting[0].prefill_tokens
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            over = batched and batched + tokens > self.max_num_batched_tokens
            if admission is Admission.LATER or over or self.full:
                return
            batched += tokens
            self.admit(self.waiting.popleft(), step, now)

    def admit(
        self, request: Request, step: Step, now: int, budget: int = FOREVER, *, whole: bool = True
    ) -> int:
        """Give a queued request its slots, and what of its prompt is not cached to this step; the tokens of that.

        Where they exceed the budget, the prompt is computed in part. Slots are reserved for the whole prompt, or
        only for what is filled with this step.
        """
        known = filled = request.prefill_tokens
        if budget < known:
            filled = min(known, self.allocator.cached_tokens(request, known) + budget)
        self.num_seqs += branches(request)
        if request.sequences:
            sequence = request.sequences[0]
            computed = sequence.origin
        else:
            sequence = Sequence(request, 0, 0, request.prompt_tokens + request.output_tokens - 1)
            request.sequences.append(sequence)
            request.first_scheduled_time = now
            computed = 0
        if filled < known:
            self.partial[request] = None
            cached = self.allocator.admit(sequence, known if whole else filled, filled)
        else:
            cached = self.allocator.admit(sequence, known)
        if computed > cached:
            self.recomputed_tokens += computed - cached
        elif not request.preemptions:
            request.cached_tokens = cached
        request.reused_tokens = max(request.reused_tokens, cached)
        request.status = "running"
        self.running[request] = None
        tokens = filled - cached
        step.chunks.append((sequence, cached, tokens))
        step.num_prefill_tokens += tokens
        return tokens

    def compute(self, request: Request, tokens: int, step: Step) -> None:
        """Give the next tokens of a prompt that is computed in part to this step; slots that it lacks are taken."""
        sequence = request.sequences[0]
        start = sequence.origin
        self.allocator.extend(sequence, tokens)
        if start + tokens == request.prefill_tokens:
            del self.partial[request]
        step.chunks.append((sequence, start, tokens))
        step.num_prefill_tokens += tokens

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
        self.tight = allocator.headroom - len(growing) - len(pending) < self._widest
        if self.tight:
            self._grow_one_by_one(step)
        elif pending:
            for sequence in sorted({*growing, *pending}, key=arrival_order):
                step.copied_blocks += allocator.append(sequence)
            self.note_grown()
        elif growing:
            decodes.grow_next(allocator)
        self.decode(step)

    def decode(self, step: Step) -> None:
        """Put the decode set into the step: its slots are taken."""
        decodes = self.decodes
        if not decodes.size:
            return
        decodes.advance()
        self.allocator.num_tokens += decodes.size
        step.num_decodes = decodes.size
        step.decode_context = decodes.context

    def grow_ahead(self, ticks: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Grow the decode set through further ticks while nobody could be refused (see `DecodeSet.grow`)."""
        return self.decodes.grow(self.allocator, ticks, self._widest)

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

    def drop(self, request: Request, reason: str, step: Step) -> None:
        """Give up a running request of which nothing decodes."""
        for sequence in request.sequences:
            self.release(sequence)
        del self.running[request]
        self.partial.pop(request, None)
        self.num_seqs -= branches(request)
        self.reject(request, reason, step)

    def append(self, request: Request, step: Step) -> None:
        """Give every branch of a decoding request a slot for its next token."""
        for sequence in request.sequences:
            step.copied_blocks += self.allocator.append(sequence)

    def note_grown(self) -> None:
        """Note that all sequences that need a slot or a copy at the next tick have theirs."""
        tick = self.decodes.clock + 1
        self.decodes.copy_pending = []
        self.decodes.note_grown(tick, self.decodes.growths.pop(tick, []), None)

    def preempt(self, request: Request, step: Step) -> None:
        """Take a running request's memory: move it to the host, or drop it and compute it again later.

        `auto` follows vLLM V0: a single sequence is recomputed, a group is swapped. A single sequence that
        the host has no room for is recomputed too; a group in that place can only be given up. What is
        computed again is the prompt, as far as it was asked for, and the tokens generated since.
        """
        allocator, decodes = self.allocator, self.decodes
        single = len(request.sequences) == 1
        count = branches(request)
        for sequence in request.sequences:
            if sequence.decodes is not None:
                decodes.leave(sequence)
        wants_swap = self.preemption == "swap" or count > 1
        if wants_swap and allocator.can_swap_out(request):
            if allocator.probe is not None:
                for sequence in request.sequences:
                    allocator.probe.write(sequence)
            step.swapped_out_blocks += allocator.swap_out(request)
            request.status = "swapped"
            self.swapped[request] = None
        elif single:
            (sequence,) = request.sequences
            if sequence.origin >= request.prefill_tokens:
                request.prefill_tokens = sequence.origin + 1
            self.release(sequence)
            request.status = "waiting"
            self.waiting.appendleft(request)
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

    def swap_in(self, step: Step, budget: int = FOREVER) -> int:
        """Bring swapped requests back in order of arrival while they fit; they go on in this very step.

        Returns what they leave of a budget of tokens.
        """
        allocator = self.allocator
        for request in sorted(self.swapped, key=arrival):
            admission = allocator.swap_in_admission(request)
            if admission is Admission.LATER and not allocator.sequences:
                admission = Admission.NEVER  # nobody is left to wait for
            count = branches(request)
            first = request.sequences[0]
            room = first.capacity + (allocator.growth or 0)  # a fresh block is there for every branch
            tokens = min(request.prefill_tokens - first.origin, budget, room - first.origin)
            if tokens <= 0:  # its prompt is computed, or nothing is left
                tokens = len(request.sequences)
            over = tokens > budget or self.num_seqs + count > self.max_num_seqs
            if admission is Admission.LATER or (admission is Admission.OK and over):
                break
            del self.swapped[request]
            if admission is Admission.NEVER:
                for sequence in request.sequences:
                    if allocator.probe is not None:
                        allocator.probe.end(sequence)
                    allocator.free(sequence)
                self.reject(request, "swapped out, and too large to come back even into an empty pool", step)
                continue
            step.swapped_in_blocks += allocator.swap_in(request)
            request.status = "running"
            self.running[request] = None
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

    def _rejoin(self, sequence: Sequence) -> None:
        """Join the tick in flight: the sequence's new token belongs to it."""
        sequence.origin += 1
        self.decodes.join(sequence)

    def reject(self, request: Request, reason: str, step: Step) -> None:
        """Give a request up for good."""
        request.status = "rejected"
        request.reason = reason
        step.rejected.append(request)

    def complete(self, sequence: Sequence) -> bool:
        """A sequence has its last token: free it; true if its request is done with it."""
        request = sequence.request
        self.release(sequence)
        request.sequences.remove(sequence)
        if request.beam_width == 1:
            self.num_seqs -= 1
        if request.sequences:
            return False
        if request.beam_width > 1:
            self.num_seqs -= request.width
        del self.running[request]
        return True

    def release(self, sequence: Sequence) -> None:
        """Free what a sequence that does not decode holds."""
        if self.allocator.probe is not None:
            self.allocator.probe.end(sequence)
        self.allocator.free(sequence)

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(dotted path, complaint) for options of a whole experiment that contradict each other."""
        preemption = config["scheduler"].get("preemption")
        sampling = config["workload"].get("sampling") or {}
        group = max(sampling.get("n", 1), sampling.get("beam_width", 1)) > 1
        if config["allocator"].get("num_host_blocks") == 0 and (preemption == "swap" or group):
            who = "groups of sequences are" if group else "preemption is set to swap: requests are"
            yield "allocator.num_host_blocks", f"{who} swapped when memory runs out, which needs a host pool"
        if group and preemption == "recompute":
            yield (
                "scheduler.preemption",
                "a group of samples or beams cannot be recomputed, it is swapped (auto)",
            )


def arrival(request: Request) -> int:
    """Requests are numbered as they arrive."""
    return request.id


def branches(request: Request) -> int:
    """Sequences that a request counts for: those that it has or will fork, of a beam search always all."""
    if request.first_token_time == NEVER or request.beam_width > 1:
        return request.width
    return len(request.sequences)
