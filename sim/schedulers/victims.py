"""Who gives way when memory runs out: functions that pick one of the requests that may be preempted."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence

from sim.registry import Registry
from sim.request import Request, outputs
from sim.schedulers.recovery import Recovery

Victim = Callable[..., Request]
"""Of the candidates the one that gives way; a function with a second parameter gets the run's `Recovery` there."""

victim: Registry[Victim] = Registry("victim")


@victim("latest", "lifo")
def latest(candidates: Sequence[Request]) -> Request:
    """The request that arrived last (vLLM)."""
    return max(candidates, key=lambda request: request.id)


@victim("earliest", "fifo")
def earliest(candidates: Sequence[Request]) -> Request:
    """The request that arrived first."""
    return min(candidates, key=lambda request: request.id)


@victim("fewest_blocks", "fewest_slots")
def fewest_blocks(candidates: Sequence[Request]) -> Request:
    """The request that holds the fewest blocks, shared ones once; of equals the latest."""
    return min(candidates, key=lambda request: (_held(request), -request.id))


@victim("fewest_outputs")
def fewest_outputs(candidates: Sequence[Request]) -> Request:
    """The request that has generated the fewest tokens, of equals the longest prompt, then the latest (SGLang)."""
    return min(candidates, key=lambda request: (outputs(request), -request.prompt_tokens, -request.id))


@victim("most_blocks", "most_slots")
def most_blocks(candidates: Sequence[Request]) -> Request:
    """The request that holds the most blocks, shared ones once, so that few have to give way; of equals the latest."""
    return max(candidates, key=lambda request: (_held(request), request.id))


@victim("cheapest_to_recover")
def cheapest_to_recover(candidates: Sequence[Request], recovery: Recovery) -> Request:
    """The request whose memory is back in the fewest seconds, by the way that it would go; of equals the latest."""
    return min(candidates, key=lambda request: (recovery.seconds(request), -request.id))


@victim("lowest_priority", "priority")
def lowest_priority(candidates: Sequence[Request]) -> Request:
    """The request of the lowest priority, which is the greatest value; of equals the latest (vLLM V1)."""
    return max(candidates, key=lambda request: (request.priority, request.id))


def bound(choose: Victim, recovery: Recovery) -> Callable[[Sequence[Request]], Request]:
    """The function with its second parameter filled in, if it has one."""
    positional = [
        parameter
        for parameter in inspect.signature(choose).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return functools.partial(_with, choose, recovery) if len(positional) > 1 else choose


def _with(choose: Victim, recovery: Recovery, candidates: Sequence[Request]) -> Request:
    return choose(candidates, recovery)


def _held(request: Request) -> int:
    """Slots of the request, a shared block once."""
    if request.counted is not None:
        request.counted.list_blocks()
    sequences = request.sequences
    if len(sequences) == 1 or not sequences[0].block_table:
        return sum([sequence.capacity for sequence in sequences])
    distinct = {block for sequence in sequences for block in sequence.block_table}
    return len(distinct) * (sequences[0].capacity // len(sequences[0].block_table))
