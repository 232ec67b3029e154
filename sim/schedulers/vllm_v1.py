"""vLLM V1: every step hands out tokens, prompt or generated."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import Annotated, Any

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.registry import NonNegativeInt, PositiveInt
from sim.request import Request
from sim.schedulers.base import Preemption, scheduler
from sim.schedulers.chunked import ChunkedScheduler
from sim.schedulers.orders import Order, fcfs, priority
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, earliest, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


@scheduler("vllm_v1")
class VllmV1(ChunkedScheduler):
    """Running requests first, then the queue, within a budget of tokens: vLLM V1's loop (2026, and 0.10.0).

    Running requests take their tokens in order of admission, prompts in chunks, with blocks for the chunk alone
    (`vllm/v1/core/sched/scheduler.py`). While blocks are short, the one that was admitted last gives way, in
    the end the request itself; with `order: priority` it is the one of the greatest (priority, arrival), which
    may have its tokens of this step already: they go back to the budget. If nobody gave way, the queue is
    admitted from its head, each request behind what the cache has of it. A preempted request drops all its
    blocks; beside the allocator `prefix` it finds again what nobody took meanwhile.

    Prompts longer than max_model_len are refused at arrival, and so are those that do not fit into the empty
    pool when their turn comes; V1 checks both at its start. A watermark is the allocator's. Beside `prefix` every
    step is V1's, and recordings of its scheduler are replayed on this class; only requests that end in one step
    are freed prompts first here, and in the order of the batch there.

    Fields:
        max_num_seqs: Most sequences that run together; the default is that of vLLM's server on less than 70 GiB.
        max_num_batched_tokens: Most tokens of a step; likewise.
        preemption: What happens to a victim (see vllm_v0); V1 recomputes.
        victim: Who gives way when blocks run out, others than the latest only if they decode; latest and earliest
            are by admission here.
        order: Who goes first in the queue.
        chunked_prefill: Whether a prompt may be computed in parts; else one beyond the step's budget stops the queue.
        long_prefill_token_threshold: Most tokens of one prompt in a step; 0 sets no bound.
        reserve_full_prompt: Whether a request is admitted only if all its tokens fit now, not just its first chunk
            (`scheduler_reserve_full_isl`).
        skip_unfit: Whether a prompt beyond the step's budget is passed over instead (vLLM 0.10.0).
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
        chunked_prefill: bool = True,
        long_prefill_token_threshold: NonNegativeInt = 0,
        reserve_full_prompt: bool = True,
        skip_unfit: bool = False,
    ) -> None:
        super().__init__(
            allocator,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            preemption=preemption,
            victim=victim,
            order=order,
        )
        self.by_priority = order is priority and victim is latest
        self.chunked_prefill = chunked_prefill
        self.longest_chunk = long_prefill_token_threshold or FOREVER
        self.reserve_full_prompt = reserve_full_prompt
        self.skip_unfit = skip_unfit

    def plan(self, now: int) -> Step:
        """Tokens for who runs, then for who can be admitted."""
        step = Step()
        self.begin()
        left = self.serve_all(step, self.longest_chunk)
        if left is None:
            left = self._walk(step)
        if not step.preempted:
            if self.swapped:
                left = self.swap_in(step, left)
            if not self.swapped:
                self._admit_waiting(step, now, left)
        return step

    # Who runs

    def _walk(self, step: Step) -> int:
        """One by one, with victims; what is left of the budget. Behind one that gives way itself nobody is served."""
        self.list_counted()
        allocator, partial, clock = self.allocator, self.partial, self.decodes.clock
        exact = allocator.growth is not None and (allocator.asks_exactly or not allocator.can_fork)
        queue = list(self.running)
        served: dict[Request, int] = {}
        left = self.max_num_batched_tokens
        index = 0
        while index < len(queue) and left > 0:
            request = queue[index]
            sequence = request.sequences[0]
            tokens = len(request.sequences)
            if request in partial:
                tokens = min(self.left(request), self.longest_chunk, left)
                allocator.pass_windows(sequence)  # whether the chunk then fits or not
            elif (
                exact and tokens == 1 and sequence.origin + clock < sequence.capacity
            ):  # most have their slot
                served[request] = tokens
                left -= tokens
                index += 1
                continue
            while not self.has_room(request, tokens):
                chosen = self._choose(queue)
                queue.remove(chosen)
                if chosen in served:
                    index -= 1
                    left += served.pop(chosen)
                    self._take_back(chosen, step)
                self.preempt(chosen, step)
                if chosen is request:
                    break
            else:
                if request in partial:
                    self.compute(request, tokens, step)
                else:
                    self.append(request, step)
                served[request] = tokens
                left -= tokens
                index += 1
                continue
            break
        self.rest([request for request in queue if request not in served])
        self.decode_walked(step)
        return left

    @property
    def _last_gives_way(self) -> bool:
        return super()._last_gives_way and not self.by_priority

    def has_room(self, request: Request, tokens: int) -> bool:
        """Whether a running request can have its next tokens; decodes are asked for what they take."""
        allocator = self.allocator
        if request in self.partial or (len(request.sequences) == 1 and allocator.growth is not None):
            return allocator.demand(request.sequences[0], tokens) <= allocator.headroom
        return allocator.can_append(request)

    def _choose(self, candidates: list[Request]) -> Request:
        """Other victims than V1's have a token more than at their admission, so that nobody works in vain for ever."""
        if self.by_priority:
            return max(candidates, key=_rank)
        if self._choose_victim is not latest:
            decoding = [request for request in candidates if request.sequences[0].decodes]
            if decoding:
                return decoding[0] if self._choose_victim is earliest else self._choose_victim(decoding)
        return candidates[-1]

    def _take_back(self, request: Request, step: Step) -> None:
        """A victim's tokens of this step are not computed.

        V1 registers the full blocks of a prompt when it plans them, and these are found all the same; a probe
        takes them as V1 does.
        """
        self.forget_growth(request)
        allocator = self.allocator
        for sequence, _, tokens in step.chunks:
            if sequence.request is request:
                if allocator.keeps_freed and allocator.probe is not None:
                    allocator.probe.write(sequence)
                allocator.unfill(sequence, tokens)
                step.num_prefill_tokens -= tokens
        step.chunks = [chunk for chunk in step.chunks if chunk[0].request is not request]

    # Who waits

    def _admit_waiting(self, step: Step, now: int, left: int) -> None:
        passed: list[Request] = []
        while self.waiting and left > 0:
            head = self.waiting[0]
            if self.full and head.width <= self.max_num_seqs:
                break
            tokens = min(self.longest_chunk, left)
            admission = self.head_admission(step, self.max_num_batched_tokens, tokens)
            if admission is Admission.NEVER:
                continue
            if not self.chunked_prefill and self._uncached(head) > tokens < self.longest_chunk:
                reason = self.hopeless(head)
                if reason:
                    self.reject(self.waiting.popleft(), reason, step)
                    continue
                if not self.skip_unfit:
                    break
                passed.append(self.waiting.popleft())
                self.head_refused = False
                continue
            if admission is Admission.LATER and not self._chunk_fits(head, tokens):
                break
            left -= self.admit(self.waiting.popleft(), step, now, tokens, whole=False)
        if self._order is None:
            self.waiting.extendleft(passed)  # 0.10.0 turns them around
        else:
            for request in passed:
                self.requeue(request)

    def hopeless(self, request: Request) -> str:
        """Why a prompt that may not be computed in parts exceeds any step; empty if it does not."""
        tokens, most = self._uncached(request), self.max_num_batched_tokens
        if tokens <= most:
            return ""
        return f"{tokens} tokens to compute exceed max_num_batched_tokens, {most}, without chunked prefill"

    def _uncached(self, request: Request) -> int:
        tokens = request.prefill_tokens
        return tokens - self.allocator.cached_tokens(request, tokens)

    def _chunk_fits(self, request: Request, tokens: int) -> bool:
        """Whether a request may go ahead with its first chunk, though all of it does not fit."""
        if self.reserve_full_prompt or len(request.sequences) > 1:
            return False
        first = request.prefill_tokens - max(0, self._uncached(request) - tokens)
        return self.allocator.admission(request, first) is Admission.OK

    def requeue(self, request: Request) -> None:
        """Queue a preempted request before all others, or where the order has it, equals by arrival."""
        order = self._order
        if order is None:
            self.waiting.appendleft(request)
        else:
            if self.ranking is not None:
                self.ranking.requeued(request)
            insort(self.waiting, request, key=lambda each: (order(each), each.id))

    def quiet_for(self, now: int) -> int:
        """To the next growth at most where the head has a hit: its first chunk needs less if that is evicted."""
        quiet = super().quiet_for(now)
        if quiet and self.head_refused and not self.reserve_full_prompt:
            head, decodes = self.waiting[0], self.decodes
            if self.allocator.cached_tokens(head, head.prefill_tokens):
                quiet = min(quiet, decodes.next_growth - decodes.clock - 1)
        return quiet

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits nobody is looked at, unless it may be passed over; nor while a group is swapped."""
        return (self.skip_unfit or not self.head_stays) and not self.swapped

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """Options without a meaning for each other."""
        yield from super().check(config)
        mine = config["scheduler"]
        if mine.get("skip_unfit") and mine.get("chunked_prefill", True):
            yield "scheduler.skip_unfit", "with chunked prefill no prompt exceeds the budget of a step"
        if mine.get("reserve_full_prompt") is False:
            whole = not mine.get("chunked_prefill", True) and not mine.get("long_prefill_token_threshold")
            if config["allocator"]["kind"] == "contiguous":
                yield "scheduler.reserve_full_prompt", "contiguous reserves the whole sequence at admission"
            elif whole:
                yield (
                    "scheduler.reserve_full_prompt",
                    "without chunked prefill the first chunk is the whole prompt",
                )


def _rank(request: Request) -> tuple[int, int]:
    return request.priority, request.id
