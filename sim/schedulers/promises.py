"""Schedulers that count on what running requests may still generate."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

from sim.allocators.base import Allocator
from sim.request import Request, Sequence
from sim.schedulers.base import Preemption, arrival, branches
from sim.schedulers.chunked import ChunkedScheduler
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


class PromisingScheduler(ChunkedScheduler):
    """A scheduler whose admission looks ahead: each running request has a promise of memory, kept as a sum.

    A policy says what it promises to a request when it is admitted. What a server knows of an output is the most
    that its client allows: `max_new_tokens`, or where that is None the true length, as if clients knew it.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_new_tokens: int | None = None,
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
        self.max_new_tokens = max_new_tokens
        self.promised = 0
        self._promises: dict[Request, int] = {}

    @abstractmethod
    def promise(self, request: Request) -> int:
        """The memory that a request may come to, in the policy's own unit."""

    def limit(self, request: Request) -> int:
        """The most tokens that each branch of a request may generate, as far as a server knows."""
        if self.max_new_tokens is None:
            return request.output_tokens
        return max(1, min(self.max_new_tokens, self.allocator.max_model_len - request.prompt_tokens))

    def refuse_alone(self, reason: str, step: Step) -> bool:
        """Reject the head of the queue where nobody runs whom it could wait for; whether to look at the queue again.

        It gets what requests still have that stopped, before it is rejected.
        """
        if self.running:
            return False
        if self.allocator.clear_for(self.waiting[0]):
            return True
        self.reject(self.waiting.popleft(), reason, step)
        return True

    def advance(self, step: Step) -> None:
        """Give every decoding sequence a slot for its next token; requests give way only if slots are missing.

        Unlike `grow`, nobody is refused a slot that it does not need.
        """
        if not self.decodes.size or self.ample(0):
            self.grow(step)
            return
        requests = [request for request in self.running if request.sequences[0].decodes is not None]
        if self.demanded(requests) > self.allocator.headroom:
            self.relieve(requests, step)
        for request in sorted(requests, key=arrival):  # as the decode set does
            self.append(request, step)
        self.decode_walked(step)

    def relieve(self, requests: list[Request], step: Step) -> None:
        """Preempt decoding requests, and take them off the list, until the others can go on."""
        while requests and self.demanded(requests) > self.allocator.headroom:
            chosen = self._choose_victim(requests)
            requests.remove(chosen)
            self.preempt(chosen, step)

    # Keeping the sum

    def admit(
        self, request: Request, step: Step, now: int, budget: int = FOREVER, *, whole: bool = True
    ) -> int:
        """Give a queued request its slots and its promise."""
        self._promise(request)
        return super().admit(request, step, now, budget, whole=whole)

    def swap_in(self, step: Step, budget: int = FOREVER) -> int:
        """Bring swapped requests back, with their promises."""
        left = super().swap_in(step, budget)
        for request in self.running:
            if request not in self._promises:
                self._promise(request)
        return left

    def preempt(self, request: Request, step: Step) -> None:
        """Take a running request's memory, and its promise."""
        super().preempt(request, step)
        self._forgo(request)

    def drop(self, request: Request, reason: str, step: Step) -> None:
        """Give up a running request."""
        super().drop(request, reason, step)
        self._forgo(request)

    def complete(self, sequence: Sequence) -> bool:
        """A sequence has its last token."""
        done = super().complete(sequence)
        if done:
            self._forgo(sequence.request)
        return done

    def _promise(self, request: Request) -> None:
        self._promises[request] = promise = self.promise(request)
        self.promised += promise

    def _forgo(self, request: Request) -> None:
        self.promised -= self._promises.pop(request)


def prospects(request: Request) -> tuple[int, int, int]:
    """Tokens that each branch needs a slot for in the next step, outputs by then, and how many branches there are."""
    first = request.sequences[0] if request.sequences else None
    if first is not None and first.decodes is not None:  # branches are equally long
        tokens, count = first.num_tokens + 1, len(request.sequences)
    else:
        tokens, count = request.prefill_tokens + 1, branches(request)
    return tokens, tokens - request.prompt_tokens, count
