"""The ledger against broken allocators: each way of losing or mixing up tokens is caught, and named."""

from __future__ import annotations

import re

import pytest

from sim import Allocator, Capacity, ProbeError, Stalled
from sim.audit.audit import Audit
from tests.sim.broken_allocators import BROKEN, Chunks, Paged
from tests.sim.probing import requests, run


def caught(cls: type[Allocator]) -> str:
    """What the probe says in the first of many workloads in which it says something."""
    paged = issubclass(cls, Paged)
    for seed in range(60):
        owner = cls(Capacity(num_slots=100 if paged else 200, max_model_len=64))
        try:
            run(
                owner,
                requests(seed, groups=paged),
                Audit(every=1),
                "orca",
                preemption="swap" if paged else "auto",
            )
        except ProbeError as error:
            return str(error)
        except (Stalled, ValueError):  # memory ran out, or the pool itself objects: try others
            continue
    pytest.fail("never caught")


@pytest.mark.parametrize("name", BROKEN)
def test_the_ledger_alone_catches_it(name):
    cls, expected = BROKEN[name]
    said = caught(cls)
    assert re.match(r"(step \d+|after step \d+|at the end of the run): ", said)
    assert re.search(expected, said), said


@pytest.mark.parametrize("name", BROKEN)
def test_beside_the_books_it_is_caught_too(name):
    cls, _ = BROKEN[name]

    class Bookkeeping(cls):
        def check_integrity(self):
            super(Paged if issubclass(cls, Paged) else Chunks, self).check_integrity()

    assert caught(Bookkeeping)
