"""Sarathi-Serve: decodes never wait for prompts."""

from __future__ import annotations

from typing import Annotated

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.registry import PositiveInt
from sim.schedulers.base import Preemption, arrival, scheduler
from sim.schedulers.chunked import ChunkedScheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step


@scheduler("sarathi")
class Sarathi(ChunkedScheduler):
    """Stall-free batching: every decode in every step, and prompts in chunks in what is left of the budget.

    First all decodes, then prompts that are computed in part, then new ones (Agrawal et al., OSDI 2024,
    algorithm 3; `sarathi/core/scheduler/sarathi_scheduler.py`). Memory is given for the whole prompt at
    admission; where a decode finds none, the latest arrival behind it gives way, computed in part or not.

    Fields:
        max_num_seqs: Most sequences that run together; a group counts all its samples or beams.
        max_num_batched_tokens: Tokens of a step up to which prompts are added to the decodes.
        preemption: What happens to a victim (see vllm_v0); Sarathi-Serve recomputes.
        victim: Who gives way when blocks run out.
        order: Who goes first in the queue.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 128,
        max_num_batched_tokens: PositiveInt = 512,
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
        """All decodes, then chunks of prompts, running ones first."""
        step = Step()
        self.begin()
        if self.ample(0):
            self.grow(step)
        else:
            self._walk(step)
        left = self.max_num_batched_tokens - step.num_decodes
        for request in sorted(self.partial, key=arrival):
            tokens = min(self.left(request), left)
            if tokens > 0:
                self.compute(request, tokens, step)
                left -= tokens
        if self.swapped:
            if not step.preempted:
                self.swap_in(step, left)
        else:
            self._admit_chunks(step, now, left)
        return step

    def _walk(self, step: Step) -> None:
        queue = sorted(self.running, key=arrival)
        index = 0
        while index < len(queue):
            request = queue[index]
            index += 1
            if request in self.partial:
                continue
            while not self.allocator.can_append(request):
                candidates = queue[index:]
                chosen = self._choose_victim(candidates) if candidates else request
                self.preempt(chosen, step)
                if chosen is request:
                    break
                queue.remove(chosen)
            else:
                self.append(request, step)
        self.decode_walked(step)

    def _admit_chunks(self, step: Step, now: int, left: int) -> None:
        while self.waiting:
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            if admission is Admission.LATER or left <= 0 or self.full:
                return
            left -= self.admit(self.waiting.popleft(), step, now, left)

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits, and while a group is swapped out, nobody is looked at."""
        return not self.head_stays and not self.swapped
