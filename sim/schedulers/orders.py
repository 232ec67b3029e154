"""Who goes first in the queue: functions that give a request its rank, the least first, equals by arrival."""

from __future__ import annotations

from collections.abc import Callable

from sim.registry import Registry
from sim.request import Request

Order = Callable[[Request], int]

order: Registry[Order] = Registry("queue order")


@order("fcfs")
def fcfs(request: Request) -> int:
    """First come, first served; who was preempted goes first."""
    return request.id


@order("sjf")
def shortest_first(request: Request) -> int:
    """The shortest output first, known exactly: the bound of what a predictor could do."""
    return request.output_tokens


@order("ljf")
def longest_first(request: Request) -> int:
    """The longest output first, known exactly."""
    return -request.output_tokens


@order("priority")
def priority(request: Request) -> int:
    """The request's own priority, the least value first (vLLM)."""
    return request.priority
