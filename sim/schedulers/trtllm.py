"""TensorRT-LLM: in-flight batching under a capacity policy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from sim.allocators.base import Allocator, allocator
from sim.allocators.capacity import Admission
from sim.registry import PositiveInt
from sim.request import Request
from sim.schedulers.base import Preemption, arrival, scheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.promises import PromisingScheduler
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step


@scheduler("trtllm")
class TensorRTLLM(PromisingScheduler):
    """Prompts and decodes share a step; the capacity policy says who is admitted (TensorRT-LLM).

    `guaranteed_no_evict` admits the head of the queue only if it and all who run can come to their ends: blocks
    for prompt and longest output, less those held by now and those of its prompt that others hold. Nobody
    ever has to give way, unless outputs are longer than clients allow. `max_utilization` admits what fits now;
    when blocks run out, requests that have started are paused, the latest first, and computed again.

    Fields:
        max_num_seqs: Most sequences that run together; a group counts all its samples or beams.
        max_num_batched_tokens: Most tokens of a step, decodes included.
        max_new_tokens: Most tokens that clients allow an output to have; null if each one allows exactly as many
            as come.
        capacity: Which requests the memory is said to hold.
        chunked_context: Whether prompts are computed in chunks; else one that exceeds a step is refused.
        preemption: What happens to a victim (see vllm_v0); TensorRT-LLM recomputes.
        victim: Who gives way when blocks run out.
        order: Who goes first in the queue.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 256,
        max_num_batched_tokens: PositiveInt = 8192,
        max_new_tokens: PositiveInt | None = None,
        capacity: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict",
        chunked_context: bool = False,
        preemption: Preemption = "auto",
        victim: Annotated[Victim, victims] = latest,
        order: Annotated[Order, orders] = fcfs,
    ) -> None:
        super().__init__(
            allocator,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_new_tokens=max_new_tokens,
            preemption=preemption,
            victim=victim,
            order=order,
        )
        self.chunked_context = chunked_context
        # Reservations that never grow are a guarantee by themselves.
        self.guaranteed = capacity == "guaranteed_no_evict" and allocator.growth is not None

    def plan(self, now: int) -> Step:
        """One token for every running sequence, beside the prompts that may come."""
        step = Step()
        self.begin()
        self.advance(step)
        left = self.max_num_batched_tokens - step.num_decodes
        for request in sorted(self.partial, key=arrival):
            tokens = min(self.left(request), left)
            if tokens > 0:
                self.compute(request, tokens, step)
                left -= tokens
        if not step.preempted:
            if self.swapped:
                self.swap_in(step, left)
            else:
                self._admit(step, now, left)
        return step

    def _admit(self, step: Step, now: int, left: int) -> None:
        while self.waiting:
            request = self.waiting[0]
            tokens = request.prefill_tokens
            if not self.chunked_context and tokens > self.max_num_batched_tokens:
                reason = f"a prompt of {tokens} tokens exceeds the {self.max_num_batched_tokens} of a step"
                self.reject(self.waiting.popleft(), reason, step)
                continue
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            if admission is Admission.LATER or self.full:
                return
            if not self._secured(request):
                if self.refuse_alone(self._excess(request), step):
                    continue
                self.head_refused = True
                return
            if left <= 0 or (not self.chunked_context and tokens > left):
                return
            left -= self.admit(self.waiting.popleft(), step, now, left)

    def could_admit(self, request: Request) -> bool:
        """Memory for the prompt, and for the ends of all."""
        return super().could_admit(request) and self._secured(request)

    def promise(self, request: Request) -> int:
        """Blocks at the end: those that the prompt fills once, the others for each branch."""
        size = self.allocator.growth or 1
        final = max(request.prompt_tokens + self.limit(request), request.prefill_tokens + 1)
        whole = request.prompt_tokens // size
        return whole + request.width * (-(-final // size) - whole)

    def _secured(self, request: Request) -> bool:
        """Whether the request and all who run can come to their ends."""
        allocator = self.allocator
        if not self.guaranteed or allocator.growth is None:
            return True
        size = allocator.growth
        held = allocator.num_held // size  # shared blocks count for each who holds them, within a group once
        if not (allocator.can_fork and allocator.can_swap):  # else only a group shares
            held += allocator.blocks_saved
            if self.widest > 1:
                held -= sum([_shared_within(each) for each in self.running])
        shared = allocator.shared_tokens(request, request.prefill_tokens) // size
        return self.promise(request) - shared <= allocator.headroom - (self.promised - held)

    def _excess(self, request: Request) -> str:
        blocks = self.allocator.num_slots // (self.allocator.growth or 1)
        return f"{self.promise(request)} blocks to its end cannot be guaranteed, the pool has {blocks}"

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits, and while a group is swapped out, nobody is looked at."""
        return not self.head_stays and not self.swapped

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """Where nobody grows, whoever is admitted comes to its end; only a guarantee looks at what may come."""
        yield from super().check(config)
        owner = config["allocator"]["kind"]
        if config["scheduler"].get("capacity") == "max_utilization":
            yield "scheduler.max_new_tokens", "max_utilization does not count on what is to come"
        if not allocator[owner].can_grow:
            yield (
                "scheduler.capacity",
                f"has no meaning with allocator {owner}: nobody outgrows a reservation",
            )


def _shared_within(request: Request) -> int:
    """Blocks that branches of one request share, each but for its first holder."""
    if request.counted is not None:
        return request.counted.num_shared
    tables = [sequence.block_table for sequence in request.sequences]
    return sum(map(len, tables)) - len(set().union(*tables)) if len(tables) > 1 else 0
