"""LightLLM: admission by the predicted peak of memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, count
from operator import mul, sub
from typing import Annotated, Any

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.registry import Fraction, PositiveInt
from sim.request import Request
from sim.schedulers.base import Preemption, branches, scheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.promises import PromisingScheduler, prospects
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


@scheduler("lightllm")
class LightLLM(PromisingScheduler):
    """Prompts first, admitted while the peak of memory that is foreseen stays below the pool (LightLLM).

    If requests end as foreseen, the one that has the i-th most tokens to come sees i requests at its end, each
    with what it has by now and as many tokens more; the largest of these sums is the peak
    (`router/req_queue/continues_batch/impl.py`). The queue is served strictly in order, and the first one that
    would lift the peak to the pool's size waits. Foreseen is what clients allow. While less than `busy_share` of
    the slots is in use, it is an estimate, and where that was too low, memory runs out and the latest arrivals are
    computed again. Made for slots of one token; blocks of more are counted with their rounding.

    Fields:
        max_num_seqs: Most sequences that run together; a group counts all its samples or beams.
        max_num_batched_tokens: Most prompt tokens of a step, and the longest prompt that is served; by default
            the longest sequence of the model, at least 2048.
        max_new_tokens: Most tokens that clients allow an output to have; null if each one allows exactly as many
            as come.
        busy_share: Share of the slots in use from which on outputs are foreseen as long as they may be; below it
            they are estimated. 0 never estimates (LightLLM's router_token_ratio).
        estimated_output: An estimated output, or 1.1 times what it is by now if that is more, but never more
            than clients allow.
        preemption: What happens to a victim (see vllm_v0); LightLLM recomputes.
        victim: Who gives way when memory runs out.
        order: Who goes first in the queue.
    """

    mixes_prompts = False

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: PositiveInt = 1000,
        max_num_batched_tokens: PositiveInt | None = None,
        max_new_tokens: PositiveInt | None = None,
        busy_share: Fraction = 0.0,
        estimated_output: PositiveInt = 1024,
        preemption: Preemption = "auto",
        victim: Annotated[Victim, victims] = latest,
        order: Annotated[Order, orders] = fcfs,
    ) -> None:
        super().__init__(
            allocator,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens or max(2048, allocator.max_model_len),
            max_new_tokens=max_new_tokens,
            preemption=preemption,
            victim=victim,
            order=order,
        )
        self.busy_share = busy_share
        self.estimated_output = estimated_output
        self._rounding = (allocator.growth or 1) - 1
        self._quiet = FOREVER  # decode steps for which the head of the queue is refused
        # Of those that run, by their ends: last ticks of growth, negative, and slots as if at tick 0.
        self._ends: list[int] = []
        self._starts: list[int] = []
        self._lines: dict[Request, tuple[int, int]] = {}
        self._uneven = 0  # who runs in other ways: groups, and limits that outputs may exceed

    def plan(self, now: int) -> Step:
        """Prompts if any can be admitted, else one token for every running sequence."""
        step = Step()
        self.head_refused = False
        self._quiet = FOREVER
        if self.waiting and not self.swapped:
            self._admit_prompts(step, now)
            if step.chunks:
                return step
        self.advance(step)
        if self.swapped and not step.preempted:
            self.swap_in(step)
        return step

    def _admit_prompts(self, step: Step, now: int) -> None:
        batched = 0
        while self.waiting:
            request = self.waiting[0]
            tokens = request.prefill_tokens
            if tokens > self.max_num_batched_tokens:
                reason = f"a prompt of {tokens} tokens exceeds the {self.max_num_batched_tokens} of a step"
                self.reject(self.waiting.popleft(), reason, step)
                continue
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            batched += tokens
            if admission is Admission.LATER or batched > self.max_num_batched_tokens or self.full:
                return
            if not self._fits(request):
                if self.refuse_alone(self._excess(request), step):
                    continue
                self.head_refused = True
                self._quiet = self._refused_for(request)
                return
            self.admit(self.waiting.popleft(), step, now)

    def could_admit(self, request: Request) -> bool:
        """Memory for the prompt, and for all that is foreseen."""
        return super().could_admit(request) and self._fits(request)

    def promise(self, request: Request) -> int:
        """Slots that all branches may come to."""
        slots = request.prompt_tokens + self.limit(request) + self._rounding
        return request.width * max(slots, request.prefill_tokens + 1 + self._rounding)

    def _fits(self, request: Request) -> bool:
        """Whether the peak with this request is below the pool's size."""
        pool = self.allocator.num_slots
        if self.max_new_tokens is None and self.promised + self.promise(request) < pool:
            return True  # even if all came to their ends at once
        return self._peak_with(request)[0] < pool

    def _peak_with(self, request: Request) -> tuple[int, int]:
        """The peak with another request.

        Where every output is foreseen to its limit, who runs has a token more with each step and one less to come:
        the peak stays where it is as long as the same requests run, and their ends are kept in order.
        """
        if self._uneven or request.width > 1 or not self._busy or self.max_new_tokens is not None:
            return self.peak([*self.running, request])
        end, start = self._line(request)
        at = bisect_left(self._ends, -end)
        ends, starts = self._ends.copy(), self._starts.copy()
        ends.insert(at, -end)
        starts.insert(at, start)
        levels = [*map(sub, accumulate(starts), map(mul, ends, count(1)))]
        peak = max(levels)
        last = len(levels) - 1 - levels[::-1].index(peak)  # of equals the one that comes first
        return peak, -ends[last] - self.decodes.clock

    def _line(self, request: Request) -> tuple[int, int]:
        """The tick of a request's last growth, and the slots that it has at tick 0 if it grew all the time."""
        clock = self.decodes.clock
        tokens, outputs, _ = prospects(request)
        left = self.limit(request) - outputs - 1
        return clock + max(0, left), tokens + self._rounding - clock

    def _promise(self, request: Request) -> None:
        super()._promise(request)
        if request.width > 1 or self.max_new_tokens is not None:
            self._uneven += 1
            return
        end, start = self._lines[request] = self._line(request)
        at = bisect_left(self._ends, -end)
        self._ends.insert(at, -end)
        self._starts.insert(at, start)

    def _forgo(self, request: Request) -> None:
        super()._forgo(request)
        if request not in self._lines:
            self._uneven -= 1
            return
        end, start = self._lines.pop(request)
        at = bisect_left(self._ends, -end)
        at = self._starts.index(start, at)
        del self._ends[at], self._starts[at]

    def peak(self, requests: list[Request]) -> tuple[int, int]:
        """Slots in use at the foreseen peak if these requests run, and the steps until then."""
        busy = self._busy
        batch = []
        for request in requests:
            tokens, outputs, count = prospects(request)
            batch.append((max(0, self._foresee(request, outputs, busy) - outputs - 1), tokens, count))
        batch.sort(reverse=True)
        peak = steps = held = number = 0
        for left, tokens, count in batch:
            held += count * (tokens + self._rounding)
            number += count
            if held + left * number >= peak:
                peak, steps = held + left * number, left
        return peak, steps

    def _refused_for(self, request: Request) -> int:
        """Decode steps for which a request that does not fit is sure not to.

        At the instant of the peak those who run will have what they will have; each branch of the request itself
        will have one token less for each step that it starts later.
        """
        if not self._busy:
            return 0
        peak, steps = self._peak_with(request)
        return min((peak - self.allocator.num_slots) // branches(request), steps)

    @property
    def _busy(self) -> bool:
        return self.allocator.num_tokens >= self.busy_share * self.allocator.num_slots

    def _foresee(self, request: Request, outputs: int, busy: bool) -> int:
        """The length that an output is expected to have at its end."""
        limit = self.limit(request)
        return limit if busy else min(limit, max(outputs * 11 // 10, self.estimated_output))

    def _excess(self, request: Request) -> str:
        return (
            f"{request.prefill_tokens} tokens would come to {self.peak([request])[0]} slots with those foreseen, and "
            f"LightLLM keeps them below the {self.allocator.num_slots} of the pool"
        )

    def quiet_for(self, now: int) -> int:
        """The peak with another request changes as the others go on."""
        return self._quiet

    @property
    def open_to_arrivals(self) -> bool:
        """Behind a head that waits, and while a group is swapped out, nobody is looked at."""
        return not self.head_stays and not self.swapped

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """Nothing is estimated where the pool always counts as busy."""
        yield from super().check(config)
        if not config["scheduler"].get("busy_share"):
            yield "scheduler.estimated_output", "nothing is estimated without a busy_share above 0"
