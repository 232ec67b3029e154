"""Runs under a probe, of workloads small enough to break memory in every way."""

from __future__ import annotations

import random
from collections.abc import Iterable

from sim import Recorder, Request, Transfers, allocator, scheduler, simulate, timing, victim
from sim.allocators import Allocator
from sim.audit.audit import Audit
from tests.sim.story import MS, Asked

GROUPS = [kind for kind in allocator.kinds if allocator[kind].can_fork]


def requests(seed: int, number: int = 12, *, groups: bool = False, longest: int = 60) -> list[Request]:
    """Requests that crowd each other out of 64 to 200 slots; half of them samples or beams if `groups`."""
    draw, names = random.Random(seed), random.Random(seed)
    at = 0
    made = []
    for name in range(number):
        at += draw.choice([0, 0, 1, MS, 5 * MS, 30 * MS])
        width = draw.randint(2, 4) if groups and draw.random() < 0.5 else 1
        beams = draw.random() < 0.5
        made.append(
            Request(
                name, at, draw.randint(1, longest), draw.randint(1, longest),
                n=1 if beams else width, beam_width=width if beams else 1,
                content=tuple(names.randint(0, 1) for _ in range(names.randint(0, 9))), content_grain=6,
            )
        )  # fmt: skip
    return made


def run(
    memory: Allocator, asked: Iterable[Request], probe=None, policy: str = "vllm_v0", transfers=None, **fields
) -> dict:
    """The summary of a run under the probe, by default an audit of every step."""
    if "victim" in fields:
        fields["victim"] = victim[fields["victim"]]
    return simulate(
        Asked(asked, beams=(0.2, 1)),
        scheduler=scheduler[policy](memory, **fields),
        timing=timing["fixed"](prefill_ms=7.0, decode_ms=3.0),
        transfers=transfers or Transfers(None, None, memory.block_size),
        recorder=Recorder(),
        max_model_len=memory.max_model_len,
        probe=Audit(every=1) if probe is None else probe,
    )
