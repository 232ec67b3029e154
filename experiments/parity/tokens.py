"""Requests of which a recording tells every token, over an allocator that finds prefixes again."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered

from experiments.parity.rows import Misuse, Row
from sim import Request, Sequence
from sim.allocators.caching import CachingAllocator
from sim.allocators.grouped_prefix import GroupedPrefixAllocator

ENDLESS = 1 << 30
"""Tokens that a sequence of a manager file may grow to: those files name no end."""


class Told:
    """A request whose tokens are all told, generated ones too: to the allocator it is a prompt that grows."""

    def __init__(self, number: int, tokens: Ordered[int], final_tokens: int = ENDLESS) -> None:
        self.request = Request(
            number, 0, len(tokens), ENDLESS, content=tuple(map(int, tokens)), content_grain=1
        )
        self.sequence = Sequence(self.request, 0, 0, final_tokens)
        self.request.sequences.append(self.sequence)
        self.prompt_tokens = len(tokens)

    @property
    def num_tokens(self) -> int:
        """Those that are known, with slots or without."""
        return self.request.prompt_tokens

    @property
    def missing(self) -> int:
        """Those of them that have no slot yet."""
        return self.num_tokens - self.sequence.origin

    def tell(self, token: int) -> None:
        """One more token is known."""
        request = self.request
        assert request.content is not None
        request.content += (int(token),)
        request.prompt_tokens = request.prefill_tokens = len(request.content)


class TokenManager:
    """Performs the operations of a manager file on an allocator with a prefix cache.

    What the recorded caller decides is done here: who asks for how many tokens. Whether they fit, what is found,
    which blocks are handed out and which are evicted is decided by the allocator, asked as its scheduler asks it.
    """

    gave_up = False
    memory: CachingAllocator | GroupedPrefixAllocator

    def __init__(self) -> None:
        self.requests: dict[str, Told] = {}
        self._told = 0

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One operation: what it returns, and the state afterwards."""
        arguments = {name: value for name, value in op.items() if name != "op"}
        name = arguments.get("r")
        if name is not None and (name in self.requests) is (op["op"] == "admit"):
            raise Misuse(f"{name} is {'there already' if name in self.requests else 'not there'}")
        return getattr(self, op["op"])(**arguments), self.state()

    def state(self) -> Row:
        """What can be observed now."""
        raise NotImplementedError

    def tell(self, tokens: Ordered[int], final_tokens: int = ENDLESS) -> Told:
        """A request that is new here."""
        self._told += 1
        return Told(self._told, tokens, final_tokens)

    def has_room(self, told: Told, tokens: int) -> bool:
        """Whether a running request can have its next tokens."""
        return self.memory.demand(told.sequence, tokens) <= self.memory.headroom

    def drop(self, told: Told) -> None:
        """Preempt: all slots are given back, the tokens stay known."""
        self.memory.free(told.sequence)
        told.request.preemptions += 1

    def check_integrity(self) -> None:
        """The allocator's books."""
        self.memory.check_integrity()


def tokens_of(runs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The prompt of a scheduler file, which tells it as runs of consecutive tokens."""
    return tuple(first + index for first, count in runs for index in range(count))
