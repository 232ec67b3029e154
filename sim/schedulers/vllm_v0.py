"""vLLM V0: prompts first, a watermark, preemption of the latest arrival."""

from __future__ import annotations

from typing import Annotated

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.registry import PositiveInt
from sim.request import Request
from sim.schedulers.base import Preemption, arrival, branches, scheduler
from sim.schedulers.chunked import ChunkedScheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step


@scheduler("vllm_v0")
class VllmV0(ChunkedScheduler):
    """Continuous batching with preemption as in vLLM 0.4.2: prompts first, or in chunks beside decodes.

    While nothing is swapped out, prompts are admitted in order of arrival until one does not fit, and a step
    with prompts runs no decode (`core/scheduler.py`; Kwon et al., SOSP 2023, section 4.5). Otherwise every
    running sequence gains a token; when blocks run out the latest arrival gives way, and if nobody had to,
    swapped requests come back.

    With chunked prefill, running requests go first in order of arrival, prompts of them that are computed in
    part included, then swapped ones, then the queue; each takes what is left of the step's tokens. Memory is
    still given for the whole prompt at admission.

    Fields:
        max_num_seqs: Most sequences that run together; a group counts all its samples or beams.
        max_num_batched_tokens: Most prompt tokens of one step, and the longest prompt that is served; by
            default the longest sequence of the model, at least 2048. With chunked prefill most tokens of a
            step, 512 by default.
        chunked_prefill: Whether prompts are computed in chunks, in steps that decode as well.
        preemption: recompute drops the memory and computes it again later, swap moves it to the host, auto
            swaps groups of several sequences and recomputes single ones, hybrid does for all of a request what
            costs less, partial leaves it its blocks until others need those, the last ones first and none that
            branches share, and recomputes only what was taken.
        victim: Who gives way when blocks run out.
        order: Who goes first in the queue.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 256,
        max_num_batched_tokens: PositiveInt | None = None,
        chunked_prefill: bool = False,
        preemption: Preemption = "auto",
        victim: Annotated[Victim, victims] = latest,
        order: Annotated[Order, orders] = fcfs,
    ) -> None:
        default = 512 if chunked_prefill else max(2048, allocator.max_model_len)
        super().__init__(
            allocator,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens or default,
            preemption=preemption,
            victim=victim,
            order=order,
        )
        self.chunked_prefill = self.mixes_prompts = chunked_prefill
        self.prompt_limit = allocator.max_model_len
        if not chunked_prefill:
            self.prompt_limit = min(self.prompt_limit, self.max_num_batched_tokens)

    def plan(self, now: int) -> Step:
        """Prompts if any can be admitted, else one token for every running sequence; or chunks beside decodes."""
        step = Step()
        if self.chunked_prefill:
            self._plan_chunks(step, now)
            return step
        self.head_refused = False
        if self.waiting and not self.swapped:
            self._admit_prompts(step, now)
            if step.chunks:
                return step
        self.grow(step)
        if self.swapped and not step.preempted:
            self.swap_in(step, self.max_num_batched_tokens - self.decodes.size)
        return step

    def _admit_prompts(self, step: Step, now: int) -> None:
        batched = 0
        while self.waiting:
            tokens = self.waiting[0].prefill_tokens
            if tokens > self.prompt_limit:
                reason = f"a prompt of {tokens} tokens exceeds the {self.prompt_limit} that one step takes"
                self.reject(self.waiting.popleft(), reason, step)
                continue
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            batched += tokens
            if admission is Admission.LATER or batched > self.max_num_batched_tokens or self.full:
                return
            self.admit(self.waiting.popleft(), step, now)

    def _plan_chunks(self, step: Step, now: int) -> None:
        self.begin()
        left = self._run(step)
        if self.swapped and not step.preempted:
            left = self.swap_in(step, left)
        dropped = [each for each in step.preempted if each.status == "waiting"]
        for request in dropped:  # V0 queues them again at the end of its plan
            self.waiting.remove(request)
        self._admit_chunks(step, now, left)
        for request in dropped:
            self.requeue(request)

    def _run(self, step: Step) -> int:
        """Running requests in order of arrival; what they leave of the step's tokens."""
        decodes, partial = self.decodes, self.partial
        left = self.max_num_batched_tokens - decodes.size
        in_turn = (
            partial and self.allocator.slides
        )  # what windows give back queues up in the order of the turns
        if in_turn or not self.ample(0) or left < 0 or not self._decodes_first(left):
            return self._walk(step)
        self.grow(step)
        for request in sorted(partial, key=arrival):
            tokens = min(self.left(request), left)
            if tokens:
                self.compute(request, tokens, step)
                left -= tokens
            else:
                self.resting_seqs += branches(request)
        return left

    def _decodes_first(self, left: int) -> bool:
        """Whether the chunks leave every decode its token in order of arrival."""
        partial = self.partial
        if sum(map(self.left, partial)) <= left:
            return True
        first = min(partial, key=arrival)
        return all(request.id < first.id or request in partial for request in self.running)

    def _walk(self, step: Step) -> int:
        self.decodes.list_steady()
        queue = sorted(self.running, key=arrival)
        partial = self.partial
        left = self.max_num_batched_tokens
        index = 0
        while index < len(queue):
            request = queue[index]
            if request in partial:
                tokens = min(self.left(request), left)
            else:
                tokens = len(request.sequences)
                if tokens == 1 and left < 1:  # a group is not cut short
                    tokens = 0
            if tokens <= 0:
                break
            index += 1
            while not self.allocator.can_append(request):
                candidates = queue[index:]
                chosen = self._choose_victim(candidates) if candidates else request
                if request in partial and len(self.running) == 1:
                    if self.allocator.clear_for(request):
                        continue
                    # V0 would do this again and again.
                    self.drop(request, self._no_spare_block(request), step)
                    break
                self.preempt(chosen, step)
                if chosen is request:
                    break
                queue.remove(chosen)
            else:
                if request in partial:
                    self.compute(request, tokens, step)
                else:
                    self.append(request, step)
                left -= tokens
        self.rest(queue[index:])
        self.decode_walked(step)
        return left

    def _no_spare_block(self, request: Request) -> str:
        return (
            f"a prompt of {request.prefill_tokens} tokens takes all of the memory, and V0 computes the next chunk "
            "only beside a free block"
        )

    def _admit_chunks(self, step: Step, now: int, left: int) -> None:
        while self.waiting:
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            running = self.num_seqs - self.resting_seqs  # V0 counts who has a token of this step
            over = running + branches(self.waiting[0]) > self.max_num_seqs
            if admission is Admission.LATER or left <= 0 or over:
                return
            left -= self.admit(self.waiting.popleft(), step, now, left)

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits nobody is looked at; while anything is swapped out, only by chunks."""
        return not self.head_stays and (self.chunked_prefill or not self.swapped)
