"""Vidur's model of a vLLM replica."""

from __future__ import annotations

from typing import Annotated

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.registry import PositiveInt
from sim.schedulers.base import Preemption, Scheduler, scheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


@scheduler("vidur")
class Vidur(Scheduler):
    """Prompts first, padded to the longest, as in Vidur's vLLM replica scheduler (Agrawal et al., MLSys 2024).

    A step computes prompts only or decodes only. Prompts are admitted in order of arrival while the batch,
    each prompt counted at the length of the longest, stays within the token limit (as vLLM 0.2.7 counts
    them). When blocks run out the latest arrival gives way; its prompt and what it generated are computed
    again. Beside the allocator `paged` and the timing `vidur` it gives Vidur's own times.

    Fields:
        max_num_seqs: Most sequences that run together.
        max_num_batched_tokens: Most prompt tokens of a step, padding included.
        preemption: What happens to a victim (see vllm_v0); Vidur recomputes.
        victim: Who gives way when blocks run out.
        order: Who goes first in the queue.
    """

    mixes_prompts = False

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 128,
        max_num_batched_tokens: PositiveInt = 4096,
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
        """Prompts if any can be admitted, else one token for every running sequence."""
        step = Step()
        self.head_refused = False
        if self.waiting and not self.swapped:
            self._admit_padded(step, now)
            if step.chunks:
                return step
        self.grow(step)
        if self.swapped and not step.preempted:
            self.swap_in(step)
        return step

    def _admit_padded(self, step: Step, now: int) -> None:
        longest = 0
        while self.waiting:
            tokens = self.waiting[0].prefill_tokens
            if tokens > self.max_num_batched_tokens:
                reason = f"a prompt of {tokens} tokens exceeds the {self.max_num_batched_tokens} of a batch"
                self.reject(self.waiting.popleft(), reason, step)
                continue
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            longest = max(longest, tokens)
            over = (len(step.chunks) + 1) * longest > self.max_num_batched_tokens
            if admission is Admission.LATER or over or self.full:
                return
            self.admit(self.waiting.popleft(), step, now)

    def quiet_for(self, now: int) -> int:
        """Nothing here depends on time."""
        return FOREVER

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits, and while a group is swapped out, nobody is looked at."""
        return not self.head_stays and not self.swapped
