"""Orca: iteration-level scheduling over reservations."""

from __future__ import annotations

from typing import Annotated

from sim.allocators.base import Allocator
from sim.registry import PositiveInt
from sim.schedulers.base import Preemption, Scheduler, scheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


@scheduler("orca")
class Orca(Scheduler):
    """Iteration-level first-come-first-served batching: prompts and decodes share a step.

    Requests join and leave the batch at every iteration, in order of arrival; the head of the queue waits
    until its reservation fits (Yu et al., OSDI 2022, section 4). Orca's memory never runs out under a running
    request; over an allocator that grows, the latest arrival is preempted.

    Fields:
        max_num_seqs: Most sequences that run together; a group counts all its samples or beams.
        max_num_batched_tokens: Most prompt tokens of one step, the first prompt aside; unlimited by default.
        preemption: What happens to a victim where the allocator grows (see vllm_v0).
        victim: Who gives way where the allocator grows.
        order: Who goes first in the queue.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 256,
        max_num_batched_tokens: PositiveInt | None = None,
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
        """One token for every running sequence, beside the prompts that fit."""
        step = Step()
        self.head_refused = False
        self.grow(step)
        if step.preempted:
            return step
        if self.swapped:
            self.swap_in(step)
        elif self.waiting:
            self.admit_in_order(step, now)
        return step

    def quiet_for(self, now: int) -> int:
        """Nothing here depends on time."""
        return FOREVER

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits nobody is looked at."""
        return not self.head_stays and not self.swapped
