"""SGLang's policies: the queue sorted by what of its prompts is cached."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Literal

from sim.allocators.base import Allocator
from sim.prefix_keys import prefix_keys
from sim.request import Request

Policy = Literal["lpm", "dfs-weight", "fcfs", "lof", "random"]

LONGEST_QUEUE = 128
"""Waiting requests above which lpm leaves the queue as it is."""
ALIKE = 32
"""Tokens that two waiting requests share from the start, so that the later one had better wait."""


class PrefixOrder:
    """A sort of the waiting queue, stable and anew each time (`schedule_policy.py`).

    Where the allocator caches nothing, lpm and dfs-weight leave the queue as it is.
    """

    def __init__(self, policy: Policy, allocator: Allocator, seed: int) -> None:
        if policy in ("lpm", "dfs-weight") and not allocator.keeps_freed:
            policy = "fcfs"
        self.policy = policy
        self._allocator = allocator
        self._random = random.Random(seed)

    def sort(self, waiting: deque[Request], limit: Callable[[Request], int]) -> None:
        """Sort the queue in place; `limit` tells the longest output of a request."""
        if self.policy == "fcfs" or len(waiting) < 2:
            return
        requests = list(waiting)
        if self.policy == "lpm":
            if len(requests) > LONGEST_QUEUE:
                return
            requests = self._longest_match(requests)
        elif self.policy == "dfs-weight":
            requests = self._depth_first(requests)
        elif self.policy == "lof":
            requests.sort(key=limit, reverse=True)
        else:
            self._random.shuffle(requests)
        waiting.clear()
        waiting.extend(requests)

    def _longest_match(self, requests: list[Request]) -> list[Request]:
        ranks: dict[Request, tuple[bool, int]] = {}
        beginnings: set[int] = set()
        for request in requests:
            cached = self._allocator.cached_tokens(request, request.prefill_tokens)
            alike = False
            if cached <= ALIKE <= request.prefill_tokens and request.content:
                beginning = prefix_keys(request, ALIKE, 1)[-1]
                alike = beginning in beginnings
                beginnings.add(beginning)
            ranks[request] = alike, 0 if alike else -cached
        return sorted(requests, key=ranks.__getitem__)

    def _depth_first(self, requests: list[Request]) -> list[Request]:
        size = self._allocator.block_size
        paths: dict[Request, list[int]] = {}
        for request in requests:
            cached = self._allocator.cached_tokens(request, request.prefill_tokens)
            paths[request] = prefix_keys(request, cached // size, size) if cached else []
        ranked: list[Request] = []
        # Depth first without recursion: the last one in is visited next, its own requests after its branches.
        stack: list[tuple[list[Request], int]] = [(requests, 0)]
        while stack:
            group, depth = stack.pop()
            if depth < 0:
                ranked += group
                continue
            branches: dict[int, list[Request]] = {}
            ends = []
            for request in group:
                path = paths[request]
                if len(path) == depth:
                    ends.append(request)
                else:
                    branches.setdefault(path[depth], []).append(request)
            if len(branches) == 1 and not ends:
                stack.append((group, _parting([paths[request] for request in group], depth + 1)))
                continue
            if ends:
                stack.append((ends, -1))
            heaviest_first = sorted(branches.values(), key=len, reverse=True)
            stack += [(branch, depth + 1) for branch in heaviest_first[::-1]]
        return ranked


def _parting(paths: list[list[int]], depth: int) -> int:
    """How far paths that agree up to a depth go together; equal keys mean that all before them are equal."""
    longest = min(map(len, paths))
    while depth < longest:
        middle = (depth + longest + 1) // 2
        if len({path[middle - 1] for path in paths}) == 1:
            depth = middle
        else:
            longest = middle - 1
    return depth
