"""Who goes first in the queue: functions that give a request its rank, the least first, equals by arrival.

An order whose ranks change while requests wait is a class, a `Ranking` (sim/schedulers/ranking.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

from sim.identity import mixed
from sim.registry import NonNegativeFloat, NonNegativeInt, PositiveFloat, Registry
from sim.request import Request, one_priority

Order = Callable[[Request], Any]

order: Registry[Callable[..., Any]] = Registry("queue order")

_NORMAL = NormalDist()


@order("fcfs")
def fcfs(request: Request) -> int:
    """First come, first served; who was preempted goes first."""
    return request.id


@order("sjf")
def shortest_first(request: Request, *, noise: NonNegativeFloat = 0.0, seed: NonNegativeInt = 0) -> float:
    """The shortest output first: known exactly, the bound of what a predictor could do, or with its errors.

    A prediction is the true length times a lognormal factor of median 1, drawn once for each request; it depends
    on the seed and the request's number only.

    Fields:
        noise: Standard deviation of the logarithm of the factor; 0.5 is wrong by more than 1.65 times either way
            for a third of the requests.
        seed: Of the draws.
    """
    if not noise:
        return request.output_tokens
    return request.output_tokens * math.exp(noise * _normal(seed, request.id))


@order("ljf")
def longest_first(request: Request) -> int:
    """The longest output first, known exactly."""
    return -request.output_tokens


@order("priority")
def priority(request: Request) -> int:
    """The request's own priority, the least value first (vLLM)."""
    return request.priority


@order("edf")
def earliest_deadline(
    request: Request, *, target_s: PositiveFloat = 1.0, per_prompt_token_ms: NonNegativeFloat = 0.0
) -> int:
    """The earliest deadline first: a target after the request's arrival (Liu and Layland, 1973).

    With one target for all that is the order of arrival; a part that grows with the prompt lets short prompts,
    whose users expect an answer sooner, overtake long ones.

    Fields:
        target_s: Time from arrival to deadline.
        per_prompt_token_ms: What each token of the prompt adds to it.
    """
    allowed = target_s * 1e9 + per_prompt_token_ms * 1e6 * request.prompt_tokens
    return request.arrival_time + round(allowed)


def meaningless(order: Any, workload: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, complaint) for what changes nothing in an order; the field is empty for all of the order."""
    chosen = order if isinstance(order, dict) else {"kind": order}
    kind = chosen.get("kind")
    if kind == "sjf" and chosen.get("seed") and not chosen.get("noise"):
        yield "seed", "without noise nothing is drawn"
    elif kind == "edf" and "target_s" in chosen and not chosen.get("per_prompt_token_ms"):
        yield "target_s", "with one target for all (per_prompt_token_ms: 0) the order is that of arrival"
    elif kind == "mlfq" and chosen.get("levels") == 1:
        for field in chosen.keys() - {"kind", "levels"}:
            yield field, "there is only one level"
    elif kind == "priority" and one_priority(workload):
        yield "", "all requests have the same priority: set workload.priorities"
    elif kind == "vtc" and "tenants" in workload and len(workload["tenants"] or ()) < 2:
        yield "", "vtc shares between tenants, and all requests are of one: set workload.tenants"


def _normal(seed: int, number: int) -> float:
    """A standard normal draw that depends on the two numbers only."""
    word = mixed(mixed(seed) + number & (1 << 64) - 1)
    return _NORMAL.inv_cdf(((word >> 12) + 0.5) / (1 << 52))
