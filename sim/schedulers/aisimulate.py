"""AISimulate's model of a vLLM rank."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Annotated

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.registry import PositiveInt
from sim.request import NEVER, Request
from sim.schedulers.base import Preemption, scheduler
from sim.schedulers.chunked import ChunkedScheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, earliest, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step


@scheduler("aisimulate")
class AISimulate(ChunkedScheduler):
    """Running requests first, then the queue, within a budget of tokens, as AISimulate models vLLM (core 0.13.0).

    Running requests take their tokens in order of admission, prompts in chunks, with blocks for the chunk
    alone. Where blocks are short one gives way, at worst one that has its tokens of this step already; they
    go back to the budget, but not the turn of who stood behind the one being served and is passed over. If
    nobody gave way, the head of the queue is admitted while all of it would fit. What is computed again ends in
    a further token, and that counts as a decode. Beside the allocator `prefix` it gives AISimulate's times.

    Fields:
        max_num_seqs: Most sequences that run together; a group counts all its samples or beams.
        max_num_batched_tokens: Most tokens of a step.
        preemption: What happens to a victim (see vllm_v0); AISimulate recomputes.
        victim: Who gives way when blocks run out; latest and earliest are by admission here.
        order: Who goes first in the queue.
    """

    by_admission = True

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 256,
        max_num_batched_tokens: PositiveInt = 2048,
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
        """A token or a chunk for who runs, and chunks of who can be admitted."""
        step = Step()
        self.begin()
        left = self._run(step)
        if not step.preempted:
            if self.swapped:
                left = self.swap_in(step, left)
            if not self.swapped:
                self._admit_chunks(step, now, left)
        for sequence, start, tokens in step.chunks:
            request = sequence.request
            step.num_unprompted += start >= request.prompt_tokens
            resumed = request.first_token_time != NEVER and start + tokens == request.prefill_tokens
            step.num_resumed += resumed
        return step

    def _run(self, step: Step) -> int:
        """Running requests in order of admission; what they leave of the step's tokens."""
        left = self.serve_all(step)
        return self._walk(step) if left is None else left

    def _walk(self, step: Step) -> int:
        self.list_counted()
        queue = list(self.running)
        chunked: set[Request] = set()
        served: dict[Request, int] = {}
        left = self.max_num_batched_tokens
        index = 0
        while index < len(queue) and left > 0:
            request = queue[index]
            tokens = len(request.sequences)
            if request in self.partial:
                tokens = min(self.left(request), left)
            while not self.has_room(request, tokens):
                chosen = self._choose([each for each in queue if each not in chunked])
                queue.remove(chosen)
                if chosen in served:
                    left += served.pop(chosen)
                    self.forget_growth(chosen)
                self.preempt(chosen, step)
                if chosen is request:
                    break
            else:
                if request in self.partial:
                    self.compute(request, tokens, step)
                    chunked.add(request)
                else:
                    self.append(request, step)
                served[request] = tokens
                left -= tokens
                index += 1
        self.rest([request for request in queue if request not in served])
        self.decode_walked(step)
        return left

    def _choose(self, candidates: Ordered[Request]) -> Request:
        if self._choose_victim is latest:
            return candidates[-1]
        return candidates[0] if self._choose_victim is earliest else self._choose_victim(candidates)

    def _admit_chunks(self, step: Step, now: int, left: int) -> None:
        while self.waiting and left > 0:
            admission = self.head_admission(step, left)
            if admission is Admission.NEVER:
                continue
            if admission is Admission.LATER or self.full:
                return
            left -= self.admit(self.waiting.popleft(), step, now, left, whole=False)

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits, and while a group is swapped out, nobody is looked at."""
        return not self.head_stays and not self.swapped
