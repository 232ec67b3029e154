"""The virtual token counter: tenants share the server fairly."""

from __future__ import annotations

from bisect import bisect_left
from typing import cast

from sim.decode_set import DecodeSet
from sim.registry import PositiveFloat
from sim.request import Request, Sequence
from sim.schedulers.orders import order
from sim.schedulers.ranking import Queue, Ranked, Ranking
from sim.step import Step
from sim.units import FOREVER


class TenantDecodeSet(DecodeSet):
    """A decode set that knows how many tokens each tenant was given in it."""

    __slots__ = ("_tenants",)

    def __init__(self) -> None:
        super().__init__()
        self._tenants: dict[int, tuple[int, int, int]] = {}  # members, tokens up to a tick, that tick

    def join(self, sequence: Sequence) -> None:
        """Let a sequence take part, on its tenant's account."""
        super().join(sequence)
        self._count(sequence.request.tenant, 1)

    def _forget(self, sequence: Sequence, tokens: int) -> None:
        super()._forget(sequence, tokens)
        self._count(sequence.request.tenant, -1)

    def _count(self, tenant: int, change: int) -> None:
        self._tenants[tenant] = self.members(tenant) + change, self.delivered(tenant), self.clock

    def members(self, tenant: int) -> int:
        """Members of this tenant: tokens that it is given at each tick."""
        return self._tenants.get(tenant, (0, 0, 0))[0]

    def delivered(self, tenant: int) -> int:
        """Tokens that members of this tenant were given so far."""
        members, tokens, tick = self._tenants.get(tenant, (0, 0, 0))
        return tokens + members * (self.clock - tick)


class _Account:
    """What a tenant has had: prompt tokens, first outputs, and what it was lifted by."""

    __slots__ = ("counter", "firsts", "lifted", "prompts")

    def __init__(self) -> None:
        self.prompts = 0
        self.firsts = 0
        self.lifted = 0.0
        self.counter = 0.0  # as of the last plan


@order("vtc")
class VirtualTokenCounter(Ranking):
    """The tenant that was served least goes first, by weighted tokens (VTC: Sheng et al., OSDI 2024).

    Each tenant has a counter: a prompt counts when its request is admitted, generated tokens as they come (the
    one that a prompt ends in with the admission). The earliest request of the tenant with the least counter goes
    first, of equal tenants the one with the smaller number. A tenant that nobody of waits, and then somebody,
    is lifted to the least counter among those that wait, or where none does to that of the last who left the
    queue: nobody saves up service by staying away. What is computed again after a preemption is not counted again.

    Fields:
        input_weight: What a token of a prompt counts.
        output_weight: What a generated token counts.
    """

    def __init__(self, *, input_weight: PositiveFloat = 1.0, output_weight: PositiveFloat = 2.0) -> None:
        super().__init__()
        self.input_weight = input_weight
        self.output_weight = output_weight
        self._accounts: dict[int, _Account] = {}
        self._places: dict[int, int] = {}  # of the tenants, in the order of their counters
        self._last: int | None = None  # the tenant that left the queue last

    def __call__(self, request: Request) -> tuple[float, int, int]:
        """Counter, tenant, arrival."""
        return self._accounts[request.tenant].counter, request.tenant, request.id

    def decode_set(self) -> DecodeSet:
        """One that counts by tenant."""
        return TenantDecodeSet()

    def counter(self, queue: Queue, tenant: int) -> float:
        """The tenant's counter by now."""
        account = self._accounts[tenant]
        outputs = account.firsts + _decodes(queue).delivered(tenant)
        return account.lifted + self.input_weight * account.prompts + self.output_weight * outputs

    def begin(self, scheduler: Ranked, now: int, step: Step) -> None:
        """Bring the counters up to date, and the queue into their order."""
        if not scheduler.waiting:
            return
        arrived = self.take_arrivals(scheduler)
        for tenant, account in self._accounts.items():
            account.counter = self.counter(scheduler, tenant)
        self._sort(scheduler)
        for request in arrived:
            account = self._accounts.setdefault(request.tenant, _Account())
            lift = self._floor(scheduler, request.tenant) - account.counter
            if lift > 0:
                account.lifted += lift
                account.counter = self.counter(scheduler, request.tenant)
            self.insert(scheduler, request)
        if arrived:
            self._sort(scheduler)

    def _floor(self, queue: Queue, tenant: int) -> float:
        """What the counter of a tenant that asks is lifted to at least."""
        if self._waits(queue, tenant):
            return 0.0
        if queue.waiting:
            return self._accounts[queue.waiting[0].tenant].counter
        return 0.0 if self._last is None else self._accounts[self._last].counter

    def _waits(self, queue: Queue, tenant: int) -> bool:
        """Whether a request of the tenant is in the queue, which is sorted."""
        waiting = queue.waiting
        first = bisect_left(waiting, (self._accounts[tenant].counter, tenant, -1), key=self)
        return first < len(waiting) and waiting[first].tenant == tenant

    def _sort(self, queue: Queue) -> None:
        """Sort the queue if the order of the tenants is another one."""
        ranked = sorted(self._accounts, key=lambda tenant: (self._accounts[tenant].counter, tenant))
        places = {tenant: place for place, tenant in enumerate(ranked)}
        if places != self._places and len(queue.waiting) > 1:
            requests = sorted(queue.waiting, key=lambda request: places[request.tenant])
            queue.waiting.clear()
            queue.waiting.extend(requests)
        self._places = places

    def admitted(self, queue: Queue, request: Request) -> None:
        """Count the prompt; another tenant may be next."""
        self._last = request.tenant
        if request.preemptions:
            return
        account = self._accounts[request.tenant]
        account.prompts += request.prompt_tokens
        account.firsts += 1
        account.counter += self.input_weight * request.prompt_tokens + self.output_weight
        self._sort(queue)

    def quiet_for(self, scheduler: Ranked) -> int:
        """Until the head's tenant has been given more than another one that waits."""
        waiting = scheduler.waiting
        if len(waiting) < 2 or len(self._accounts) < 2:
            return FOREVER
        head = waiting[0].tenant
        members = _decodes(scheduler).members
        counter = self.counter(scheduler, head)
        steps = FOREVER
        for tenant in self._accounts:
            rate = members(head) - members(tenant)
            if tenant != head and rate > 0 and self._waits(scheduler, tenant):
                gap = self.counter(scheduler, tenant) - counter
                steps = min(steps, max(0, int(gap / (rate * self.output_weight)) - 1))
        return steps


def _decodes(queue: Queue) -> TenantDecodeSet:
    return cast("TenantDecodeSet", queue.decodes)
