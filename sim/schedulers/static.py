"""Static batching: a batch runs to completion before the next one starts."""

from __future__ import annotations

from typing import Annotated

from sim.allocators.base import Allocator
from sim.registry import PositiveInt
from sim.request import Request, Sequence
from sim.schedulers.base import Preemption, Scheduler, scheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


@scheduler("static")
class Static(Scheduler):
    """Request-level batching as in FasterTransformer: nobody joins a batch, and memory returns at its end.

    A batch takes what waits, in order of arrival, up to `max_num_seqs` and to what memory holds. Requests that
    finish early have their answer, but their slots stay with the batch until its last request is done, as
    internal waste. Where the allocator grows and runs out, the latest arrival goes back to the queue.

    Fields:
        max_num_seqs: Most sequences of a batch; a group counts all its samples or beams.
        max_num_batched_tokens: Most prompt tokens of a batch, the first prompt aside; unlimited by default.
        preemption: What happens to a victim where the allocator grows (see vllm_v0).
        victim: Who gives way where the allocator grows.
        order: Who goes first in the queue.
    """

    mixes_prompts = False

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 32,
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
        self._done: list[Request] = []  # finished, still holding the batch's memory

    def plan(self, now: int) -> Step:
        """The prompts of a new batch, or one more token for the batch that runs."""
        step = Step()
        self.head_refused = False
        if self.decodes.size:
            self.grow(step)
            if step.num_decodes or not self._done:
                return step
        self._release_batch()
        if self.swapped:
            self.swap_in(step)
        elif self.waiting:
            self.admit_in_order(step, now)
        return step

    def complete(self, sequence: Sequence) -> bool:
        """Keep the slots until the batch is done."""
        request = sequence.request
        if request not in self.running or any(branch.decodes is not None for branch in request.sequences):
            return False
        del self.running[request]
        self.num_seqs -= len(request.sequences)
        if self.allocator.probe is not None:
            for branch in request.sequences:
                self.allocator.probe.end(branch)
        self.allocator.retire(request)
        self._done.append(request)
        return True

    def _release_batch(self) -> None:
        for request in self._done:
            for sequence in request.sequences:
                self.release(sequence)
            request.sequences.clear()
        self._done.clear()

    def quiet_for(self, now: int) -> int:
        """Nothing here depends on time."""
        return FOREVER

    @property
    def open_to_arrivals(self) -> bool:
        """Nobody is looked at while a batch runs."""
        return not self.running
