"""Visits: sessions under way, whose requests are made when answers allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sim.request import Request
from workloads.sampling import Make
from workloads.sessions import Script
from workloads.shared_prefixes import Lead

LARGEST = 23
"""Bits of the number of requests in a visit at most."""


class Planned(NamedTuple):
    """A request to come.

    number: in the visit. place: in its wave. parent: the place in the wave before of what it goes on from, and
    parent_number the number. message: the number of the first request that says the same. added, output: tokens.
    """

    number: int
    place: int
    parent: int
    parent_number: int
    message: int
    added: int
    output: int


class Visit:
    """A session under way: what it asks next, and the answers that it waits for.

    Everything is known beforehand but the time. `prompts` and `outputs` give the lengths of its requests in order.
    All of the first wave ask the same. Requests of later waves that would leave no room for an output within
    `longest` tokens are left out with all that goes on from them, and so are those from the `limit`-th on; `size`
    remain. One that is rejected leads to nothing, and the others go on.

    Content is named by the visit: the new tokens of a request and its output each have a name, and a prompt is the
    names on its path. Of several samples, any of which might be the one, the first is gone on from; of beams nobody
    knows which one lives, and their output has no name.
    """

    __slots__ = (
        "_answers",
        "_lead",
        "_make",
        "_number",
        "_on_their_way",
        "_pauses",
        "_wave",
        "_waves",
        "size",
    )

    def __init__(
        self,
        number: int,
        script: Script,
        lead: Lead,
        prompts: Iterator[int],
        outputs: Iterator[int],
        *,
        longest: int,
        limit: int,
        make: Make,
    ) -> None:
        self._number = number << LARGEST + 1
        self._lead = lead
        self._make = make
        self._pauses = script.pauses
        self._wave = 0
        self._waves: list[list[Planned]] = []
        self._on_their_way: dict[Request, int] = {}  # the requests of the wave, and their places
        self._answers: dict[int, Request] = {}  # those of it that are finished, by place
        self.size = 0
        added = iter(script.added or ())
        question = 0
        # Of each answer in the wave before, by place: tokens up to its end, and the number of its request.
        histories = {0: (lead.tokens, 0)}
        count = 0
        for wave in script.waves:
            first = not self._waves
            planned, longer = [], {}
            for place, parent in enumerate(wave):
                drawn, output = next(prompts), next(outputs)
                if first:
                    new = question = question or drawn
                else:
                    new = drawn if script.added is None else next(added)
                start, from_number = histories.get(parent, (longest, 0))
                prompt = start + new
                if self.size < limit and (first or prompt < longest):
                    self.size += 1
                    message = 0 if first else count
                    planned.append(Planned(count, place, parent, from_number, message, new, output))
                    longer[place] = prompt + min(output, max(1, longest - prompt)), count
                count += 1
            if planned:
                self._waves.append(planned)
            histories = longer
        self._waves.reverse()

    @property
    def over(self) -> bool:
        """Whether nothing of it is on its way and nothing will follow."""
        return not self._on_their_way

    def begin(self, arrival: int) -> list[Request]:
        """The requests that it begins with, at this instant (ns)."""
        return [self._request(planned, arrival, *self._lead) for planned in self._waves.pop()]

    def answered(self, request: Request) -> list[tuple[int, Request]]:
        """The next wave, when the last request of this one is over."""
        place = self._on_their_way.pop(request)
        if request.status == "finished":
            self._answers[place] = request
        if self._on_their_way or not self._waves:
            return []
        answers, self._answers = self._answers, {}
        self._wave += 1
        pause = self._pauses[self._wave]
        followers = []
        for planned in self._waves.pop():
            parent = answers.get(planned.parent)
            if parent is not None:
                end = parent.prompt_tokens + parent.output_tokens
                assert parent.content is not None
                names = (*parent.content, self._number + 2 * planned.parent_number + 1)
                follower = self._request(planned, 0, names, (*parent.content_ends, end))
                follower.tenant = parent.tenant
                followers.append((pause, follower))
        return followers

    def _request(
        self, planned: Planned, arrival: int, names: tuple[int, ...], ends: tuple[int, ...]
    ) -> Request:
        """A request that adds its new tokens to a history of these names, whose runs end there."""
        prompt = (ends[-1] if ends else 0) + planned.added
        names = (*names, self._number + 2 * planned.message)
        request = self._make(
            0, arrival, prompt, planned.output, content=names, content_ends=(*ends, prompt), session=self
        )
        if request.beam_width == 1:
            request.output_content = self._number + 2 * planned.number + 1
        self._on_their_way[request] = planned.place
        return request
