"""Queues: who waits, who runs, who is swapped out, and how requests come and go."""

from __future__ import annotations

from bisect import insort, insort_left
from collections import deque
from typing import Annotated

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.decode_set import DecodeSet
from sim.request import Request, Sequence, TokenwiseSequence
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.ranking import Ranking
from sim.schedulers.recovery import Preemption, Recovery, branches
from sim.schedulers.victims import Victim, bound, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER

__all__ = ["Preemption", "Queues", "arrival", "branches"]


class Queues:
    """The requests of a scheduler, over one allocator: admission, chunks of prompts, and ends."""

    mixes_prompts: bool = True
    """Whether prompts are computed in steps that decode as well."""
    by_admission: bool = False
    """Whether those who run get their slots in the order of their admission, and not of their arrival."""

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        preemption: Preemption = "auto",
        victim: Annotated[Victim, victims] = latest,
        order: Annotated[Order, orders] = fcfs,
    ) -> None:
        self.allocator = allocator
        self.max_num_seqs = FOREVER if max_num_seqs is None else max_num_seqs
        self.max_num_batched_tokens = FOREVER if max_num_batched_tokens is None else max_num_batched_tokens
        self.preemption = preemption
        self.ranking = order if isinstance(order, Ranking) else None
        self.decodes = DecodeSet() if self.ranking is None else self.ranking.decode_set()
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, int] = {}  # in order of admission, which is numbered
        self.partial: dict[Request, None] = {}  # of those, whose prompts are not computed to their ends
        self.swapped: dict[Request, None] = {}
        self.incoming: dict[
            Request, tuple[int, int]
        ] = {}  # of those, swap-ins in flight: end (ns) and blocks
        self.num_admitted = 0  # those that were swapped in included
        self.num_seqs = 0  # branches that running requests have or will fork, those that are done aside
        self.resting_seqs = 0  # of them, those whose requests have no token of this step
        self.head_refused = False  # the head of the queue waits for memory
        self.tight = False  # the last growth may have come too close to a refusal to foresee the next
        self.recomputed_tokens = 0
        self.swap_refused = 0  # preemptions that found no room on the host
        self.lost: dict[Request, int] = {}  # tokens that preempted requests had, until those are back
        self.recovery = Recovery(self)
        self._choose_victim = bound(victim, self.recovery)
        self._order = None if order is fcfs else order
        self.widest = 1  # branches of the widest request so far

    def add(self, request: Request) -> None:
        """Take a request in that arrived."""
        self.enqueue(request)
        if request.width > self.widest:
            self.widest = request.width

    def enqueue(self, request: Request) -> None:
        """Queue a request behind all that go before it."""
        if self._order is None:
            self.waiting.append(request)
        elif self.ranking is not None:
            self.waiting.append(request)
            self.ranking.arrivals += 1
        else:
            insort(self.waiting, request, key=self._order)

    def requeue(self, request: Request) -> None:
        """Queue a preempted request before all others, or where the order has it."""
        if self._order is None:
            self.waiting.appendleft(request)
        else:
            if self.ranking is not None:
                self.ranking.requeued(request)
            insort_left(self.waiting, request, key=self._order)

    @property
    def head_stays(self) -> bool:
        """Whether somebody waits whom no arrival overtakes."""
        return self._order is None and bool(self.waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that are in and not running: queued or swapped out."""
        return len(self.waiting) + len(self.swapped)

    def head_admission(self, step: Step, chunk: int = FOREVER, first: int | None = None) -> Admission:
        """What the allocator says of the head of the queue; a head that can never run is rejected and gone.

        Where slots are given as they are filled, by at most `chunk` tokens a step and `first` now, windows need less.
        """
        request = self.waiting[0]
        tokens = request.prefill_tokens
        if chunk < tokens:
            admission = self.allocator.admission_in_chunks(request, tokens, chunk, first)
        else:
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

    def enrol(self, request: Request) -> None:
        """Put a request that has got its slots behind all who run."""
        self.num_admitted += 1
        self.running[request] = self.num_admitted
        if self.by_admission:
            for sequence in request.sequences:
                sequence.order = self.num_admitted << 32 | sequence.branch

    def admit(
        self, request: Request, step: Step, now: int, budget: int = FOREVER, *, whole: bool = True
    ) -> int:
        """Give a queued request its slots, and what of its prompt is not cached to this step; the tokens of that.

        Where they exceed the budget, the prompt is computed in part. Slots are reserved for the whole prompt, or
        only for what is filled with this step.
        """
        known = filled = request.prefill_tokens
        if budget < known and len(request.sequences) < 2:
            filled = min(known, self.allocator.cached_tokens(request, known) + budget)
        self.num_seqs += branches(request)
        request.prefills += 1
        if request.sequences:
            sequence = request.sequences[0]
        else:
            made = TokenwiseSequence if self.allocator.grows_steadily and request.width == 1 else Sequence
            sequence = made(request, 0, 0, request.prompt_tokens + request.output_tokens - 1)
            request.sequences.append(sequence)
            request.first_scheduled_time = now
        if filled < known:
            self.partial[request] = None
            cached = self.allocator.admit(sequence, known if whole else filled, filled)
        else:
            cached = self.allocator.admit(sequence, known)
        if not request.preemptions:
            request.cached_tokens = cached
        if cached > request.reused_tokens:
            request.reused_tokens = cached
        request.status = "running"
        self.enrol(request)
        if self.ranking is not None:
            self.ranking.admitted(self, request)
        tokens = filled - cached
        lost = self.lost.get(request)
        if lost is not None:
            self._note_recomputed(request, cached, tokens, step)
        step.chunks.append((sequence, cached, tokens))
        for branch in request.sequences[1:]:  # a group that gave way is computed again as a whole
            assert lost is not None
            cached = self.allocator.admit(branch, known)
            self.lost[request] = lost
            self._note_recomputed(request, cached, known - cached, step)
            step.chunks.append((branch, cached, known - cached))
            tokens += known - cached
        step.num_prefill_tokens += tokens
        return tokens

    def compute(self, request: Request, tokens: int, step: Step) -> None:
        """Give the next tokens of a prompt that is computed in part to this step; slots that it lacks are taken."""
        sequence = request.sequences[0]
        start = sequence.origin
        self.allocator.extend(sequence, tokens)
        if start + tokens == request.prefill_tokens:
            del self.partial[request]
        if self.lost and request in self.lost:
            self._note_recomputed(request, start, tokens, step)
        step.chunks.append((sequence, start, tokens))
        step.num_prefill_tokens += tokens

    def _note_recomputed(self, request: Request, start: int, tokens: int, step: Step) -> None:
        """The next chunk of the step begins with tokens that were there before a preemption."""
        lost = self.lost[request]
        end = start + tokens
        if start < lost:
            self.recomputed_tokens += min(end, lost) - start
            step.recomputed.append((len(step.chunks), max(0, end - lost)))
        if end >= lost:
            del self.lost[request]

    def drop(self, request: Request, reason: str, step: Step) -> None:
        """Give up a running request of which nothing decodes."""
        for sequence in request.sequences:
            self.release(sequence)
        del self.running[request]
        self.partial.pop(request, None)
        self.num_seqs -= branches(request)
        self.reject(request, reason, step)

    def reject(self, request: Request, reason: str, step: Step) -> None:
        """Give a request up for good; one that waits may still hold what a partial preemption left it."""
        waited, request.status = request.status == "waiting", "rejected"
        for sequence in request.sequences if waited else ():
            if sequence.capacity:
                self.release(sequence)
            elif self.allocator.probe is not None:
                self.allocator.probe.end(sequence)
        self.lost.pop(request, None)
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


def arrival(request: Request) -> int:
    """Requests are numbered as they arrive."""
    return request.id
