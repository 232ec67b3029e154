"""Foresight: which requests of a workload will ask for a block, known beforehand."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from sim.errors import UserError
from sim.prefixes.keys import prefix_keys
from sim.request import Request

NEVER_AGAIN = 1 << 62
"""The next use of a block that nobody asks for any more."""


class Foresight:
    """The requests that ask for each block of named content, by their numbers.

    It knows all requests of a run at once, so memory grows with them. Raises UserError for requests of sessions,
    as what follows depends on their answers.
    """

    def __init__(self, requests: Iterable[Request], block_size: int) -> None:
        self.now = -1  # the latest request that was admitted
        self._uses: dict[Hashable, list[int]] = {}  # the last one first
        for request in requests:
            if request.session is not None:
                raise UserError("what answers lead to cannot be foreseen, expected requests without sessions")
            for key in prefix_keys(request, (request.prompt_tokens - 1) // block_size, block_size):
                if key < 0:  # content of its own, from here on
                    break
                self._uses.setdefault(key, []).append(request.id)
        for uses in self._uses.values():
            uses.reverse()

    def next_use(self, key: Hashable) -> int:
        """The next request that will ask for the block with this content, NEVER_AGAIN if there is none."""
        uses = self._uses.get(key)
        while uses and uses[-1] <= self.now:
            uses.pop()
        return uses[-1] if uses else NEVER_AGAIN
