"""Who gives way when memory runs out: functions that pick one of the requests that may be preempted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sim.registry import Registry
from sim.request import Request, outputs

Victim = Callable[[Sequence[Request]], Request]

victim: Registry[Victim] = Registry("victim")


@victim("latest", "lifo")
def latest(candidates: Sequence[Request]) -> Request:
    """The request that arrived last (vLLM)."""
    return max(candidates, key=lambda request: request.id)


@victim("earliest", "fifo")
def earliest(candidates: Sequence[Request]) -> Request:
    """The request that arrived first."""
    return min(candidates, key=lambda request: request.id)


@victim("fewest_slots")
def fewest_slots(candidates: Sequence[Request]) -> Request:
    """The request that holds the fewest slots, the latest of equals: the cheapest to bring back."""
    return min(candidates, key=lambda request: (_held(request), -request.id))


@victim("fewest_outputs")
def fewest_outputs(candidates: Sequence[Request]) -> Request:
    """The request that has generated the fewest tokens, of equals the longest prompt, then the latest (SGLang)."""
    return min(candidates, key=lambda request: (outputs(request), -request.prompt_tokens, -request.id))


@victim("most_slots")
def most_slots(candidates: Sequence[Request]) -> Request:
    """The request that holds the most slots, the latest of equals: the fewest victims."""
    return max(candidates, key=lambda request: (_held(request), request.id))


def _held(request: Request) -> int:
    return sum(sequence.capacity for sequence in request.sequences)
