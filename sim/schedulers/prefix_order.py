"""SGLang's policies: the queue sorted by what of its prompts is cached."""

from __future__ import annotations

import random
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import Literal

from sim.allocators.base import Allocator
from sim.prefixes.keys import prefix_keys
from sim.request import Request

Policy = Literal["lpm", "dfs-weight", "fcfs", "lof", "random"]

LONGEST_QUEUE = 128
"""Waiting requests above which lpm leaves the queue as it is."""
ALIKE = 32
"""Tokens that two waiting requests share from the start, so that the later one had better wait."""


class PrefixOrder:
    """A sort of the waiting queue, stable and anew each time (`schedule_policy.py`).

    Where the allocator caches nothing, lpm and dfs-weight leave the queue as it is. Who has been put in place is
    not looked at again where nothing can have changed for him: lof inserts those who are new, and dfs-weight
    looks at those whose content somebody else may have. A random order is drawn as far as the queue is looked at
    (`draw_head`).
    """

    def __init__(self, policy: Policy, allocator: Allocator, seed: int) -> None:
        if policy in ("lpm", "dfs-weight") and not allocator.keeps_freed:
            policy = "fcfs"
        self.policy = policy
        self._allocator = allocator
        self._random = random.Random(seed)
        self._placed: dict[Request, int] = {}  # who was sorted once, and how often preempted by then

    def sort(self, waiting: deque[Request], limit: Callable[[Request], int]) -> None:
        """Sort the queue in place; `limit` tells the longest output of a request."""
        if len(waiting) < 2 or self.policy in ("fcfs", "random"):
            return
        if self.policy == "lof":
            for request in self._new(waiting):
                insort(waiting, request, key=lambda each: -limit(each))
        elif self.policy == "dfs-weight":
            self._depth_first(waiting)
        elif len(waiting) <= LONGEST_QUEUE:
            requests = self._longest_match(list(waiting))
            waiting.clear()
            waiting.extend(requests)

    def draw_head(self, waiting: deque[Request]) -> None:
        """Under the policy random, put any request at the head."""
        if self.policy == "random" and len(waiting) > 1:
            chosen = self._random.randrange(len(waiting))
            waiting[0], waiting[chosen] = waiting[chosen], waiting[0]

    def _new(self, waiting: deque[Request]) -> list[Request]:
        """Take off the end of the queue who has come since it was sorted, in order of arrival."""
        placed = self._placed
        new = []
        while waiting and placed.get(waiting[-1]) != waiting[-1].preemptions:
            request = waiting.pop()
            placed[request] = request.preemptions
            new.append(request)
        if len(placed) > 1024 + 2 * (len(waiting) + len(new)):
            self._placed = {request: request.preemptions for request in (*waiting, *new)}
        return new[::-1]

    def _longest_match(self, requests: list[Request]) -> list[Request]:
        ranks: dict[Request, tuple[bool, int]] = {}
        beginnings: set[int] = set()
        for request in requests:
            cached = self._allocator.cached_tokens(request, request.prefill_tokens)
            alike = False
            if cached <= ALIKE <= request.prefill_tokens and request.content:
                beginning = prefix_keys(request, ALIKE, 1, ALIKE - 1)[-1]
                alike = beginning in beginnings
                beginnings.add(beginning)
            ranks[request] = alike, 0 if alike else -cached
        return sorted(requests, key=ranks.__getitem__)

    def _depth_first(self, waiting: deque[Request]) -> None:
        """Those with cached prefixes go first, depth first through the tree of these, then the others."""
        size = self._allocator.block_size
        paths: dict[Request, list[int]] = {}
        for request in waiting:
            if request.content or request.preemptions:
                cached = self._allocator.cached_tokens(request, request.prefill_tokens)
                if cached >= size:
                    paths[request] = [*prefix_keys(request, cached // size, size)]
        if paths:
            others = [request for request in waiting if request not in paths]
            waiting.clear()
            waiting.extend(_visited(paths))
            waiting.extend(others)


def _visited(paths: dict[Request, list[int]]) -> list[Request]:
    """The requests in the order of a walk through the tree of their paths, the heaviest branch first."""
    ranked: list[Request] = []
    # Depth first without recursion: the last one in is visited next, its own requests after its branches.
    stack: list[tuple[list[Request], int]] = [(list(paths), 0)]
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
