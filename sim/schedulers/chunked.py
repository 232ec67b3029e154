"""Steps that mix decodes with parts of prompts, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated

from sim.allocators.base import Allocator
from sim.request import Request, Sequence
from sim.schedulers.base import Preemption, Scheduler, branches
from sim.schedulers.orders import Order, fcfs
from sim.schedulers.orders import order as orders
from sim.schedulers.victims import Victim, latest
from sim.schedulers.victims import victim as victims
from sim.step import Step
from sim.units import FOREVER


class ChunkedScheduler(Scheduler):
    """A scheduler whose steps compute prompts in chunks beside decodes (Agrawal et al., OSDI 2024).

    While memory is plenty and the budget reaches everybody, the decode set moves as one group and only prompts
    are looked at one by one. Otherwise a policy walks its running requests in its own order for that step;
    those that get no token are put to rest: they leave the decode set, keep their slots, and are back with
    the next plan.
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
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
        self.resting: list[Sequence] = []  # decode, but have no token of this step
        self._woken = False

    def begin(self) -> None:
        """Start a plan: whoever rested takes part again."""
        self.head_refused = False
        self.wake()

    def wake(self) -> None:
        """Let all who rest take part again."""
        self.resting_seqs = 0
        self._woken = bool(self.resting)
        for sequence in self.resting:
            self.decodes.join(sequence)
            if sequence.request.width > 1 or self.allocator.shares_tail(sequence):
                self.decodes.copy_pending.append(sequence)
        self.resting = []

    def rest(self, requests: Iterable[Request]) -> None:
        """Leave running requests without a token of this step."""
        for request in requests:
            self.resting_seqs += branches(request)
            if request not in self.partial:
                for sequence in request.sequences:
                    self.decodes.leave(sequence)
                    self.resting.append(sequence)

    def left(self, request: Request) -> int:
        """Prompt tokens of a running request that are not computed yet."""
        return request.prefill_tokens - request.sequences[0].origin

    def ample(self, demand: int) -> bool:
        """Whether nobody can be refused: all decodes grow, and prompts take `demand` of the headroom."""
        decodes = self.decodes
        growing = len(decodes.growths.get(decodes.clock + 1, ())) + len(decodes.copy_pending) + decodes.steady
        counted = self.allocator.counted
        if counted is not None:
            growing += counted.demand
        ample = self.allocator.headroom - growing - demand >= self.widest
        if not ample:  # who gets what is decided one by one
            decodes.list_steady()
        return ample

    def list_counted(self) -> None:
        """Give all beams block tables: who has got slots in this very step may have to give way."""
        self.decodes.list_steady()
        if self.allocator.counted is not None:
            self.allocator.counted.list_all()

    def serve_all(self, step: Step, longest: int = FOREVER) -> int | None:
        """Give all that run their tokens in order of admission, prompts at most `longest`; what is left of the budget.

        None, and nothing is done, where somebody may be refused and it matters who is asked first: the policy
        walks its requests then.
        """
        partial = self.partial
        if partial and self.allocator.slides:
            return None  # what windows give back queues up in the order of the turns
        left = budget = self.max_num_batched_tokens - self.decodes.size
        chunks = []
        demand = 0
        for request in partial:
            tokens = min(self.left(request), longest, left)
            chunks.append(tokens)
            left -= tokens
            demand += self.allocator.demand(request.sequences[0], tokens)
        if budget < 0 or not self._decodes_first(left):
            return None
        if not self.ample(demand):
            if not self._last_gives_way:
                return None
            self._serve_who_needs(step, longest)
            return self.max_num_batched_tokens - step.num_decodes - step.num_prefill_tokens
        self.grow(step)
        for request, tokens in zip(list(partial), chunks, strict=True):
            if tokens:
                self.compute(request, tokens, step)
            else:
                self.resting_seqs += branches(request)
        return left

    def _decodes_first(self, left: int) -> bool:
        """Whether the chunks leave every decode its token in order of admission."""
        if left > 0 or not self.partial:
            return True
        behind = zip(reversed(self.running), self.partial, strict=False)
        return all(request in self.partial for request, _ in behind)

    @property
    def _last_gives_way(self) -> bool:
        """Whether the victim is always the one admitted last, and only who needs a slot can be refused."""
        return self._choose_victim is latest and self.allocator.asks_exactly

    def _serve_who_needs(self, step: Step, longest: int) -> None:
        """`serve_all` where slots are short: who needs none is not looked at, and the last one gives way."""
        decodes, running, partial = self.decodes, self.running, self.partial
        needing = self.who_need_slots(partial)
        served = 0
        for index, request in enumerate(needing):
            if index < served:
                continue
            if request not in running:
                break  # nor is anybody behind it
            served = index + self.grow_first(needing, index)
            if index < served:
                continue
            tokens = len(request.sequences)
            if request in partial:
                left = self.max_num_batched_tokens - decodes.size - step.num_prefill_tokens
                tokens = min(self.left(request), longest, left)
                if tokens <= 0:
                    self.resting_seqs += branches(request)
                    continue
            while not self.has_room(request, tokens):
                last = next(reversed(running))
                self.preempt(last, step)
                if last is request:
                    break
            else:
                if request in partial:
                    self.compute(request, tokens, step)
                else:
                    self.append(request, step)
        self.decode_walked(step)

    def grow_first(self, needing: list[Request], first: int) -> int:
        """Give those of a list from an index on that decode their slots, until some run out; how many have them."""
        allocator, decodes, partial = self.allocator, self.decodes, self.partial
        single = self.widest == 1 and not decodes.copy_pending
        if not single or allocator.growth is None or allocator.slides or allocator.yielding:
            return 0  # not all growths take one of the headroom, in any order
        growing: list[Sequence] = []
        for request in needing[first : first + allocator.headroom]:
            if request in partial or request not in self.running:
                break
            growing += request.sequences
        count = len(growing)
        if count:
            allocator.grow([(decodes.clock + 1, growing)])
        return count

    def who_need_slots(self, others: Collection[Request] = ()) -> list[Request]:
        """Requests whose decodes need a slot or a copy at the next tick, or whose windows turn, and others.

        In order of admission.
        """
        decodes = self.decodes
        growing = decodes.growths.get(decodes.clock + 1, [])
        needing = {sequence.request for sequence in [*growing, *decodes.copy_pending]}
        needing.update([edge.sequence.request for edge in decodes.turns.get(decodes.clock + 1, ())])
        if self.allocator.counted is not None:
            needing.update(self.allocator.counted.growing())
        needing.update(others)
        return sorted(needing, key=self.running.__getitem__)

    def has_room(self, request: Request, tokens: int) -> bool:
        """Whether a running request can have its next tokens."""
        if request in self.partial:
            return self.allocator.demand(request.sequences[0], tokens) <= self.allocator.headroom
        return self.allocator.can_append(request)

    def forget_growth(self, request: Request) -> None:
        """Take a token of this step from a decoding request: it stands in the calendar by the slots that it had."""
        decodes = self.decodes
        growing = decodes.growths.get(decodes.clock + 1, [])
        for sequence in request.sequences:
            if sequence in growing:
                growing.remove(sequence)
                if sequence.capacity < sequence.final_tokens:
                    decodes.await_growth(sequence)

    def demanded(self, requests: Collection[Request]) -> int:
        """What the next tokens of decoding requests take of the headroom."""
        pending = set(self.decodes.copy_pending)
        demanded = 0
        for request in requests:
            if request.counted is not None:
                demanded += request.counted.demand
                continue
            shared = []
            for sequence in request.sequences:
                if sequence.num_tokens >= sequence.capacity:
                    demanded += 1
                elif sequence in pending:
                    shared.append(sequence)
            if shared:
                demanded += self.allocator.copies(shared)
        return demanded

    def decode_walked(self, step: Step) -> None:
        """Put the decode set into the step after a walk over the requests."""
        self.tight = True
        self.note_grown()
        self.decode(step)

    def quiet_for(self, now: int) -> int:
        """Nothing depends on time; but prompts in parts, and who rested, change every step."""
        return 0 if self.partial or self.resting or self._woken else FOREVER
