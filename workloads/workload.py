"""Workloads: the requests of a run, made one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from sim.genealogy import Turnover
from sim.registry import Registry
from sim.request import Request
from workloads.sampling import Sampling
from workloads.streams import Streams

workload: Registry[type[Workload]] = Registry("workload")

ONE_BRANCH = Sampling()


class Workload(ABC):
    """Where requests come from, as the simulator sees it.

    Its first parameters are the random streams and the longest sequence that the engine serves; the
    keyword-only ones are its YAML fields.
    """

    num_requests: int | None = None
    """Requests in all; None if nobody has counted them."""
    clients: int | None = None
    """Clients of a closed loop, whose requests carry no arrival time; None in an open one."""
    think_time: int = 0
    """Time (ns) between a client's answer and its next request."""
    sampling: Sampling = ONE_BRANCH
    beams: tuple[Turnover | float, int] | None = None
    """Turnover of beams and the seed of its draws; None without beam search."""
    content_grain: int = 0
    """Tokens that a recorded name of content stands for: blocks that divide it are found less often than they could
    be; 0 where content is known to the token, or not at all."""

    @abstractmethod
    def requests(self) -> Iterator[Request]:
        """The requests in order of arrival, ids from 0, made as they are asked for; the same every time."""

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(field, complaint) for options of a configuration that have no meaning beside the others."""
        sampling = config["workload"].get("sampling") or {}
        if sampling.get("beam_width", 1) == 1:
            yield "workload.sampling.beam_turnover", "has no meaning without beams, beam_width above 1"


def beam_draws(streams: Streams, sampling: Sampling) -> tuple[Turnover | float, int] | None:
    """`Workload.beams` of these samples."""
    if sampling.beam_width == 1:
        return None
    return sampling.beam_turnover, int(streams("sampling").integers(1 << 62))
