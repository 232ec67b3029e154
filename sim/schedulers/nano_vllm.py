"""nano-vllm: prompts first, one of them in parts, and the last one running gives way."""

from __future__ import annotations

from typing import Annotated

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.registry import PositiveInt
from sim.request import Request
from sim.schedulers.base import Preemption, branches, scheduler
from sim.schedulers.chunked import ChunkedScheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, earliest, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


@scheduler("nano_vllm")
class NanoVLLM(ChunkedScheduler):
    """Prompts only or decodes only, as in nano-vllm of 2026 (`engine/scheduler.py`).

    Prompts go first, while the step has tokens and sequences left; only the first one of a step may be cut to
    what is left, and then goes on in the next step. Else those that run gain a token in order of their
    admission; where a block is missing the last one gives way, to the front of the queue. The number of
    sequences limits a step and not those that run, so that the last ones may have to wait. nano-vllm stops
    where nothing can be scheduled; here a request that outgrows the pool fails alone. With the allocator
    `nano_vllm` its schedules are the engine's own.

    Fields:
        max_num_seqs: Most sequences of a step; a group counts all its samples or beams.
        max_num_batched_tokens: Most prompt tokens of a step.
        preemption: What happens to a victim (see vllm_v0); nano-vllm recomputes.
        victim: Who gives way when blocks run out; latest and earliest are by admission here.
        order: Who goes first in the queue.
    """

    mixes_prompts = False
    by_admission = True

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 512,
        max_num_batched_tokens: PositiveInt = 16384,
        preemption: Preemption = "auto",
        victim: Annotated[Victim, victims] = latest,
        order: Annotated[Order, orders] = fcfs,
    ) -> None:
        super().__init__(
            allocator,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            preemption=preemption,
            victim=victim,
            order=order,
        )

    def plan(self, now: int) -> Step:
        """Prompts if any can be scheduled, else one token for the sequences that run."""
        step = Step()
        self.head_refused = False
        if not self.swapped:
            self._admit_prompts(step, now)
            if step.chunks:
                return step
        self._decode(step)
        if self.swapped and not step.preempted:
            self.swap_in(step)
        return step

    def _admit_prompts(self, step: Step, now: int) -> None:
        left, seqs = self.max_num_batched_tokens, self.max_num_seqs
        for request in list(self.partial):
            tokens = min(self.left(request), left)
            self.compute(request, tokens, step)
            if request in self.partial:
                return
            left -= tokens
            seqs -= branches(request)
        while self.waiting and left > 0 and seqs > 0:
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            request = self.waiting[0]
            asked = request.prefill_tokens - self.allocator.cached_tokens(request, request.prefill_tokens)
            over = step.chunks and (asked > left or branches(request) > seqs)
            if admission is Admission.LATER or over:
                return
            left -= self.admit(self.waiting.popleft(), step, now, left)
            seqs -= branches(request)
            if request in self.partial:
                return

    def _decode(self, step: Step) -> None:
        in_turn = self._last_gives_way and len(self.running) == self.num_seqs  # single sequences
        if in_turn and not self.allocator.slides:
            self._rest_the_last()
        else:
            self.wake()
        if self.decodes.size <= self.max_num_seqs and self.ample(0):
            self.grow(step)
        elif self.decodes.size <= self.max_num_seqs and in_turn:
            self._grow_who_needs(step)
        else:
            self._walk(step)

    def _rest_the_last(self) -> None:
        """Let all but the first max_num_seqs rest; who rested in the last step does so still, or goes on."""
        decodes, resting = self.decodes, self.resting
        new: list[Request] = []
        excess = len(self.running) - len(self.partial) - self.max_num_seqs
        for request in reversed(self.running) if excess > 0 else ():
            if request in self.partial:
                continue
            if request.sequences[0].decodes is None or (not resting and len(new) == excess):
                break
            new.append(request)
        self.rest(reversed(new))
        while resting and decodes.size < self.max_num_seqs:
            sequence = resting.pop(0)
            decodes.join(sequence)
            if self.allocator.shares_tail(sequence):
                decodes.copy_pending.append(sequence)
        self.resting_seqs = len(resting)

    def _walk(self, step: Step) -> None:
        """Give requests their slots in order of admission, as many as a step has sequences."""
        self.list_counted()
        queue = [request for request in self.running if request not in self.partial]
        left = self.max_num_seqs
        index = 0
        while index < len(queue) and len(queue[index].sequences) <= left:
            request = queue[index]
            index += 1
            while self.demanded([request]) > self.allocator.headroom:
                chosen = self._choose(queue[index:]) if index < len(queue) else request
                queue.remove(chosen)
                self.preempt(chosen, step)
                if chosen is request:
                    index -= 1
                    break
            else:
                self.append(request, step)
                left -= len(request.sequences)
        self.rest(queue[index:])
        self.decode_walked(step)

    def _grow_who_needs(self, step: Step) -> None:
        """Where the last gives way, one that rests first: who has a slot already is not looked at."""
        running, partial = self.running, self.partial
        needing = self.who_need_slots()
        served = 0
        for index, request in enumerate(needing):
            if index >= served:
                served = index + self.grow_first(needing, index)
            if index < served:
                continue
            while request in running and self.demanded([request]) > self.allocator.headroom:
                last = next(each for each in reversed(running) if each not in partial)
                if self.resting and last.sequences[0] is self.resting[-1]:
                    self.resting.pop()
                self.preempt(last, step)
            if request in running:
                self.append(request, step)
        self.decode_walked(step)

    def _choose(self, candidates: list[Request]) -> Request:
        if self._choose_victim is latest:
            return candidates[-1]
        return candidates[0] if self._choose_victim is earliest else self._choose_victim(candidates)

    def could_admit(self, request: Request) -> bool:
        """Memory for the prompt, however many run."""
        return self.allocator.admission(request, request.prefill_tokens) is not Admission.LATER

    def quiet_for(self, now: int) -> int:
        """Who rests does so until another has left; where the requests were walked, every step is different."""
        return 0 if self.partial or self._woken or (self.resting and self.tight) else FOREVER

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits, and while a group is swapped out, nobody is looked at."""
        return not self.head_stays and not self.swapped
