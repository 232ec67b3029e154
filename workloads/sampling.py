"""Sampling: how many branches a request runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sim.errors import UserError
from sim.genealogy import Turnover
from sim.registry import Fraction, PositiveInt
from sim.request import Request

Make = Callable[..., Request]
"""What makes a request of id, arrival time (ns), prompt tokens, output tokens and fields by name."""


class Sampling:
    """How many branches a request runs: parallel samples, or the beams of a beam search.

    Raises UserError if both are asked for, and if more samples are to be returned than run.

    Fields:
        n: Samples that a request returns; they share its prompt.
        best_of: Samples that run, of which the n best are returned; by default n. All count as output.
        beam_width: Beams of each request.
        beam_turnover: Chance that a beam dies in a step and a copy of another takes its place; by default as
            measured for that width, where it falls with the steps since the beam was forked (kvsim bench beams).
    """

    __slots__ = ("beam_turnover", "beam_width", "best_of", "n")

    def __init__(
        self,
        *,
        n: PositiveInt = 1,
        best_of: PositiveInt | None = None,
        beam_width: PositiveInt = 1,
        beam_turnover: Fraction | None = None,
    ) -> None:
        if n > 1 and beam_width > 1:
            raise UserError(
                f"n and beam_width exclude each other: got {n} and {beam_width}, expected one to be 1"
            )
        if best_of is not None and beam_width > 1:
            raise UserError(
                f"best_of and beam_width exclude each other: got {best_of} and {beam_width}, expected one alone"
            )
        if best_of is not None and best_of < n:
            raise UserError(f"best_of: got {best_of}, expected at least n, the {n} samples that are returned")
        self.n = n
        self.best_of = n if best_of is None else best_of
        self.beam_width = beam_width
        self.beam_turnover: Turnover | float = (
            measured_turnover(beam_width) if beam_turnover is None else beam_turnover
        )

    @property
    def width(self) -> int:
        """Branches of a request that run side by side."""
        return max(self.best_of, self.beam_width)

    def maker(self) -> Make:
        """What makes requests that run so many branches."""
        if self.width == 1:
            return Request
        return partial(Request, n=self.best_of, beam_width=self.beam_width)


def measured_turnover(beam_width: int) -> Turnover:
    """How often beams die in a real beam search of this width.

    Measured by `kvsim bench beams` on the n-gram model that foretells the documentation of Python's standard library
    best. A beam that has just been forked is much like another that is likelier, and dies in the next step with a
    chance of a third; the longer it has lived the likelier it stays, and after sixteen steps it is one in sixteen.
    Nothing in it comes from a published saving.
    """
    return Turnover(0.33, 0.52 + 0.36 / beam_width)
