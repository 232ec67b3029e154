"""Tenants: who of several sends a request."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from sim.errors import UserError
from sim.request import Request
from workloads.streams import Streams


def shares(tenants: list[float] | None) -> list[float] | None:
    """Where in 0 .. 1 the parts of the tenants behind the first begin. Raises UserError if there is no tenant."""
    if tenants is None:
        return None
    if not tenants:
        raise UserError("tenants: got no share, expected one for each tenant")
    ends = np.cumsum(tenants) / sum(tenants)
    return [float(end) for end in ends[:-1]]


def dealt(requests: Iterator[Request], begins: list[float] | None, streams: Streams) -> Iterator[Request]:
    """The requests, each of a tenant; the draw of one does not depend on how many there are."""
    return requests if begins is None else _of_tenants(requests, begins, streams("tenants"))


def _of_tenants(
    requests: Iterator[Request], begins: list[float], rng: np.random.Generator
) -> Iterator[Request]:
    session = None
    tenant = 0
    for request in requests:
        if session is None or request.session is not session:  # a session is one tenant's
            session = request.session
            tenant = bisect_right(begins, rng.random())
        request.tenant = tenant
        yield request
