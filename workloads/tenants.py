"""Tenants and priorities: who of several sends a request, and how urgent it is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from sim.errors import UserError
from sim.request import Request
from workloads.streams import Streams


class Senders:
    """Deals requests to tenants and priorities by their shares; all turns of a session are alike.

    Raises UserError for a list without shares.
    """

    def __init__(self, streams: Streams, tenants: list[float] | None, priorities: list[float] | None) -> None:
        self._streams = streams
        self._begins = {
            "tenants": _begins("tenants", tenants),
            "priorities": _begins("priorities", priorities),
        }

    def deal(self, requests: Iterator[Request]) -> Iterator[Request]:
        """The requests, each of a tenant and a priority; the draw of one does not depend on how many there are."""
        for name, begins in self._begins.items():
            if begins is not None:
                requests = _dealt(requests, begins, self._streams(name), name)
        return requests


def _begins(name: str, shares: list[float] | None) -> list[float] | None:
    """Where in 0 .. 1 the parts behind the first begin."""
    if shares is None:
        return None
    if not shares:
        raise UserError(f"{name}: got no share, expected one for each of them")
    ends = np.cumsum(shares) / sum(shares)
    return [float(end) for end in ends[:-1]]


def _dealt(
    requests: Iterator[Request], begins: list[float], rng: np.random.Generator, name: str
) -> Iterator[Request]:
    session = None
    part = 0
    for request in requests:
        if session is None or request.session is not session:
            session = request.session
            part = bisect_right(begins, rng.random())
        if name == "tenants":
            request.tenant = part
        else:
            request.priority = part
        yield request
