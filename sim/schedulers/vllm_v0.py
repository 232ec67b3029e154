"""vLLM V0: prompts first, a watermark, preemption of the latest arrival."""

from __future__ import annotations

from typing import Annotated

from sim.allocators.base import Admission, Allocator
from sim.registry import PositiveInt
from sim.schedulers.base import Preemption, Scheduler, scheduler
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


@scheduler("vllm_v0")
class VllmV0(Scheduler):
    """Prefill-first continuous batching with preemption, as vLLM 0.4.2 without chunked prefill.

    While nothing is swapped out, prompts are admitted in order of arrival until one does not fit, and a step
    with prompts runs no decode (`core/scheduler.py`; Kwon et al., SOSP 2023, section 4.5). Otherwise every
    running sequence gains a token; when blocks run out the latest arrival gives way, and if nobody had to,
    swapped requests come back.

    Fields:
        max_num_seqs: Most sequences that run together; a group counts all its samples or beams.
        max_num_batched_tokens: Most prompt tokens of one step, and the longest prompt that is served; by
            default the longest sequence of the model, at least 2048.
        preemption: recompute drops the memory and computes it again later, swap moves it to the host, auto
            swaps groups of several sequences and recomputes single ones.
        victim: Who gives way when blocks run out.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 256,
        max_num_batched_tokens: PositiveInt | None = None,
        preemption: Preemption = "auto",
        victim: Annotated[Victim, victims] = latest,
    ) -> None:
        super().__init__(
            allocator,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens or max(2048, allocator.max_model_len),
            preemption=preemption,
            victim=victim,
        )
        self.prompt_limit = min(allocator.max_model_len, self.max_num_batched_tokens)

    def plan(self, now: int) -> Step:
        """Prompts if any can be admitted, else one token for every running sequence."""
        step = Step()
        self.head_refused = False
        if self.waiting and not self.swapped:
            self._admit_prompts(step, now)
            if step.chunks:
                return step
        self.grow(step)
        if self.swapped and not step.preempted:
            self.swap_in(step)
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

    def quiet_for(self, now: int) -> int:
        """Nothing here depends on time."""
        return FOREVER

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits, and while anything is swapped out, nobody is looked at."""
        return not self.waiting and not self.swapped
