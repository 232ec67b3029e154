"""SGLang: prompts in the order of what is cached, and a ratio of outputs that is hoped to come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from sim.allocators.base import Allocator, allocator
from sim.allocators.capacity import Admission
from sim.registry import NonNegativeInt, PositiveFloat, PositiveInt
from sim.request import Request, outputs
from sim.schedulers.base import Preemption, branches, scheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.prefix_order import Policy, PrefixOrder
from sim.schedulers.promises import PromisingScheduler
from sim.schedulers.victims import Victim, fewest_outputs
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER

CLIP = 4096
"""Most tokens to come that are counted for a request (CLIP_MAX_NEW_TOKENS)."""
INIT_RATIO = 0.7
MIN_FACTOR = 0.14
DECAY_STEPS = 600
RETRACT_STEPS = 20
"""Decode steps for which a retraction makes room."""


@scheduler("sglang")
class SGLang(PromisingScheduler):
    """Prompts first, those with the longest cached prefix in front, as in SGLang (`schedule_policy.py`).

    A request is admitted while its tokens to compute and to come fit beside a share of those to come of all
    that run: the new-token ratio. It starts at 0.7 times `schedule_conservativeness`, falls to 0.14 of that over
    600 decode steps, and is set anew whenever decodes are short of memory. Then requests are retracted, the ones
    with the fewest outputs first, until the others have room for 20 steps; they go to the end of the queue and
    are computed again. Once the queue is refused, it is looked at again when somebody has left. Locking a
    cached prefix takes it from what can be evicted, and counts. Made for the allocator `radix`. A prompt
    has the memory for all its chunks at admission.

    Fields:
        policy: lpm sorts the queue by the longest cached prefix, while at most 128 wait; a request that has 32
            tokens or fewer cached and shares 32 with an earlier one of the queue goes last, so that the other
            fills the cache. dfs-weight goes depth first through the tree of cached prefixes, the branch that most
            wait for first. lof sorts by the longest output allowed, random shuffles, fcfs leaves the queue in its
            order. By default lpm over an allocator that caches prefixes, else fcfs.
        schedule_conservativeness: Factor on the new-token ratio.
        max_new_tokens: Most tokens that clients allow an output to have; null if each one allows exactly as many
            as come.
        max_num_seqs: Most sequences that run together; a group counts all its samples or beams.
        max_num_batched_tokens: Prompt tokens at which a step takes no further prompt, the first one aside
            (max_prefill_tokens).
        chunked_prefill_size: Most prompt tokens of a step; one longer prompt at a time is computed in parts. Null
            computes all whole.
        mixed_chunk: Whether steps with prompts decode as well.
        seed: Of the random policy.
        preemption: What happens to a victim (see vllm_v0); SGLang recomputes.
        victim: Who is retracted.
        order: Who goes first in the queue under the policy fcfs.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        policy: Policy | None = None,
        schedule_conservativeness: PositiveFloat = 1.0,
        max_new_tokens: PositiveInt | None = None,
        max_num_seqs: PositiveInt = 2048,
        max_num_batched_tokens: PositiveInt = 16384,
        chunked_prefill_size: PositiveInt | None = 8192,
        mixed_chunk: bool = False,
        seed: NonNegativeInt = 0,
        preemption: Preemption = "auto",
        victim: Annotated[Victim, victims] = fewest_outputs,
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
        if policy is None:
            policy = "lpm" if order is fcfs else "fcfs"
        self._sorter = PrefixOrder(policy, allocator, seed)
        page = allocator.growth or 1
        self.page = page
        self.chunk = FOREVER if chunked_prefill_size is None else max(page, chunked_prefill_size)
        self.mixed_chunk = self.mixes_prompts = mixed_chunk
        self._init_ratio = min(1.0, INIT_RATIO * schedule_conservativeness)
        self._min_ratio = self._init_ratio * MIN_FACTOR
        self._decay = (self._init_ratio - self._min_ratio) / DECAY_STEPS
        self._set_ratio = self._init_ratio, 0  # at this tick
        self._pool = self.available
        self._refused_at = FOREVER  # requests that ran when the queue was refused
        self._ends = 0  # prompts and limits of those that run
        self._bounded: dict[Request, None] = {}  # others: groups, and limits that are too high or too low

    # The new-token ratio

    @property
    def new_token_ratio(self) -> float:
        """Share of the tokens that running requests may still generate for which memory is kept."""
        ratio, tick = self._set_ratio
        return max(self._min_ratio, ratio - self._decay * max(0, self.decodes.clock - tick))

    def relieve(self, requests: list[Request], step: Step) -> None:
        """Retract decodes until the others have room for some steps, and count on what they generated so far."""
        while len(requests) > 1 and (
            self.demanded(requests) > self.allocator.headroom
            or self.available < RETRACT_STEPS * sum(len(request.sequences) for request in requests)
        ):
            chosen = self._choose_victim(requests)
            requests.remove(chosen)
            self.preempt(chosen, step)
        super().relieve(requests, step)
        done = sum(len(each.sequences) * (outputs(each) + RETRACT_STEPS) for each in requests)
        allowed = sum(len(each.sequences) * self.limit(each) for each in requests)
        self._set_ratio = min(1.0, done / (allowed + 1)), self.decodes.clock + 1

    def requeue(self, request: Request) -> None:
        """A retracted request goes to the end of the queue, or where the order has it."""
        if self._order is None:
            self.waiting.append(request)
        else:
            super().requeue(request)

    # Memory

    @property
    def available(self) -> int:
        """Slots that are free or can be evicted."""
        allocator = self.allocator
        if allocator.growth is None:
            return allocator.num_slots - allocator.num_held
        return allocator.headroom * allocator.growth

    def limit(self, request: Request) -> int:
        """What the client allows, and the pool holds."""
        allowed = request.output_tokens if self.max_new_tokens is None else super().limit(request)
        room = self._pool - request.prompt_tokens - 1
        return allowed if allowed < room else max(0, room)

    def promise(self, request: Request) -> int:
        """Tokens to come, at most."""
        return request.width * min(CLIP, self.limit(request))

    def _coming(self, request: Request) -> int:
        """Tokens that a request may still generate."""
        return min(CLIP, max(0, self.limit(request) - outputs(request))) * branches(request)

    def _fits(self, request: Request, cached: int, coming: int) -> bool:
        """Whether a request with so many cached tokens fits, beside so many to come of it and those just admitted."""
        allocator = self.allocator
        tokens = request.prefill_tokens
        locked = cached - allocator.shared_tokens(request, tokens) if cached else 0
        total = tokens - cached + coming
        room = self.available
        if self.mixed_chunk:
            room -= self.decodes.size
        ratio = self.new_token_ratio
        if total < room - locked - ratio * self.promised:
            return True
        room_left = room - ratio * self._coming_of_decodes()
        return total < room_left and total <= room_left - locked

    def _coming_of_decodes(self) -> int:
        """Tokens that decoding requests may still generate: limits less what is there, but for those they bound."""
        decodes = self.decodes
        coming, context, size = self._ends, decodes.context, decodes.size
        for request in self._bounded:
            decoding = [each.num_tokens for each in request.sequences if each.decodes is not None]
            if decoding:
                coming += self._coming(request)
                context -= sum(decoding)
                size -= len(decoding)
        fresh = len(self.running) - len(self._bounded) - size  # of this step, or in parts: the last ones
        for request in reversed(self.running):
            if not fresh:
                break
            if request not in self._bounded and request.sequences[0].decodes is None:
                coming -= request.prompt_tokens + self.limit(request)
                fresh -= 1
        return coming - context - size

    def _promise(self, request: Request) -> None:
        super()._promise(request)
        limit = self.limit(request)
        if request.width > 1 or not request.output_tokens <= limit <= CLIP:
            self._bounded[request] = None
        else:
            self._ends += request.prompt_tokens + limit

    def _forgo(self, request: Request) -> None:
        super()._forgo(request)
        if request in self._bounded:
            del self._bounded[request]
        else:
            self._ends -= request.prompt_tokens + self.limit(request)

    def could_admit(self, request: Request) -> bool:
        """Memory for the prompt, and for what is hoped to come."""
        cached = self.allocator.cached_tokens(request, request.prefill_tokens)
        return super().could_admit(request) and self._fits(request, cached, self._coming(request))

    # Steps

    def plan(self, now: int) -> Step:
        """Prompts if any can be admitted, else one token for every running sequence."""
        step = Step()
        if len(self.running) < self._refused_at:
            self._refused_at = FOREVER
            self.head_refused = False
        if (self.waiting or self.partial) and not self.swapped:
            self._extend(step, now)
            if step.chunks and not self.mixed_chunk:
                return step
        self.advance(step)
        if self.swapped and not step.preempted:
            self.swap_in(step)
            self._refused_at = FOREVER
        if not self.running and not step.chunks:
            self._set_ratio = self._init_ratio, self.decodes.clock
        return step

    def _extend(self, step: Step, now: int) -> None:
        """The next part of a prompt, then those of the queue that fit."""
        decodes = self.decodes.size if self.mixed_chunk else 0
        chunk = self.chunk - decodes
        budget = self.max_num_batched_tokens - decodes
        if chunk < self.page:
            return
        fresh = 0
        for request in list(self.partial):
            tokens = min(self.left(request), chunk)
            self.compute(request, tokens, step)
            if request in self.partial:
                return
            chunk -= tokens
            budget -= tokens
            fresh += self._coming(request)
        if not self.waiting or self._refused_at < FOREVER:
            return
        self._sorter.sort(self.waiting, self.limit)
        while self.waiting:
            self._sorter.draw_head(self.waiting)
            request = self.waiting[0]
            admission = self.head_admission(step)
            if admission is Admission.NEVER:
                continue
            if self.full:
                self._refused_at = len(self.running)
                return
            known = request.prefill_tokens
            cached = self.allocator.cached_tokens(request, known)
            coming = self._coming(request)
            if admission is Admission.LATER or not self._fits(request, cached, coming + fresh):
                if self.refuse_alone(self._excess(request), step):
                    continue
                self.head_refused = True
                self._refused_at = len(self.running)
                return
            asked = -(-(known - cached) // self.page) * self.page
            if step.chunks and (asked >= budget or chunk < self.page):
                return
            part = FOREVER if asked <= chunk else chunk // self.page * self.page
            tokens = self.admit(self.waiting.popleft(), step, now, part)
            if request in self.partial:
                return
            fresh += coming
            chunk -= asked
            budget -= tokens
            if chunk <= 0 or budget <= 0:
                return

    def _excess(self, request: Request) -> str:
        return (
            f"{request.prefill_tokens} tokens and those to come do not leave a slot free in a pool of {self._pool}, "
            "which SGLang asks for"
        )

    @property
    def open_to_arrivals(self) -> bool:
        """Once the queue is refused, or while a group is swapped out, nobody is looked at."""
        return self._refused_at == FOREVER and not self.swapped

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """An order sorts nothing under a policy that sorts by itself, nor a policy what is not there."""
        yield from super().check(config)
        settings, memory = config["scheduler"], config["allocator"]
        order = settings.get("order") or "fcfs"
        kind = order["kind"] if isinstance(order, dict) else order
        policy = settings.get("policy")
        if kind != "fcfs" and policy not in (None, "fcfs"):
            yield "scheduler.order", f"policy {policy} sorts the queue itself: set policy to fcfs"
        if policy in ("lpm", "dfs-weight") and not allocator[memory["kind"]].finds_prefixes(memory):
            yield "scheduler.policy", f"{policy} sorts by cached prefixes, and the allocator caches none"
        if policy != "random" and settings.get("seed"):
            yield "scheduler.seed", "only the policy random draws"
