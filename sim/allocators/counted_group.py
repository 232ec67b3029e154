"""A beam group while its blocks are counted: how its beams descend from each other, and what follows from it."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sim.genealogy import TAKEN, Ints
from sim.request import Lineage, Request, Sequence


class Keeper(Protocol):
    """Who counts the blocks of all groups (`CountedBeams`)."""

    def num_shared(self, group: CountedGroup) -> int:
        """Blocks that beams of a group share now, each but for its first holder."""

    def next_growth(self, group: CountedGroup) -> Ints:
        """What becomes of a group's blocks with the growth of the next tick."""

    def grow_group(self, group: CountedGroup) -> int:
        """Give the beams of one group the slot of their next token; the number of blocks copied."""

    def list_blocks(self, group: CountedGroup) -> None:
        """Deal the group's blocks out to its beams."""

    def free(self, group: CountedGroup, sequence: Sequence) -> None:
        """A beam of the group has its last token."""


class CountedGroup:
    """A beam group while its blocks are counted: its genealogy, and the changes that follow from it."""

    __slots__ = ("_owner", "changes", "done", "parents", "prefix", "prompt", "request", "start")

    def __init__(
        self, owner: Keeper, request: Request, parents: Ints, prefix: list[int], found: Ints, start: int
    ) -> None:
        self._owner = owner
        self.request = request
        self.parents = parents
        self.prefix = prefix  # the prompt's full blocks, which all beams hold
        self.prompt = request.sequences[0].origin
        self.changes = found
        self.start = start  # the tick at which the prompt was computed
        self.done: list[Sequence] = []  # beams that have their last token

    @property
    def num_shared(self) -> int:
        """Blocks in tables of the beams, each but for its first holder."""
        return self._owner.num_shared(self)

    @property
    def final(self) -> int:
        """Tokens of each beam in the end."""
        return self.prompt + len(self.changes) - 1

    @property
    def demand(self) -> int:
        """Blocks that the growth of the next tick takes."""
        return int(self._owner.next_growth(self)[TAKEN])

    def grow(self) -> int:
        """Give the beams of this group alone the slot of their next token; the number of blocks copied."""
        return self._owner.grow_group(self)

    def list_blocks(self) -> None:
        """Give every beam a block table of its own; it is one among other sequences from then on."""
        self._owner.list_blocks(self)

    def free(self, sequence: Sequence) -> None:
        """A beam has its last token."""
        self._owner.free(self, sequence)

    def line(self, tokens: int, turned: bool) -> list[int]:
        """Of each beam the one that it was a step ago, with so many tokens; all are one behind the prompt."""
        if tokens == self.prompt:
            return [0] * self.parents.shape[1]
        if turned:
            line: list[int] = self.parents[tokens - self.prompt - 1].tolist()
            return line
        return list(range(self.parents.shape[1]))

    def _turnovers(self, tokens: int) -> tuple[list[int], Ints]:
        """Steps with fewer tokens, counted from 0 behind the prompt, in which beams died, and the rows of those."""
        past = self.parents[: max(0, tokens - self.prompt - 1)]
        steps = (past != np.arange(past.shape[1])).any(axis=1).nonzero()[0]
        return steps.tolist(), past[steps]

    def trace(self, tokens: int, turned: bool) -> None:
        """Tell every beam its lineage, with so many tokens each, as if it had been followed from fork to fork."""
        request, prompt, width = self.request, self.prompt, self.parents.shape[1]
        request.next_branch = width
        lines = [None, *(Lineage(prompt, branch, None) for branch in range(1, width))]
        steps, past = self._turnovers(tokens + turned)
        lives = 1 + np.logical_and.accumulate(past[:, 1:] > past[:, :-1], axis=1).sum(axis=1)
        for step, parents, alive in zip(steps, past.tolist(), lives.tolist(), strict=True):
            lines = [lines[parent] for parent in parents]
            for beam in range(alive, width):
                lines[beam] = Lineage(prompt + step + 1, request.next_branch, lines[beam])
                request.next_branch += 1
        for sequence, line in zip(request.sequences, lines, strict=True):
            sequence.lineage = line

    def ancestors(self, tokens: int, turned: bool, size: int) -> list[tuple[list[int], int]]:
        """Of blocks behind the prefix the beams that filled them, one for each beam, and how many blocks in a row.

        `turned` says whether the turnover at so many tokens is over.
        """
        prompt = self.prompt
        found: list[tuple[list[int], int]] = []
        row = 0
        line = self.line(tokens, turned)
        steps, past = self._turnovers(tokens)
        turnovers = past.tolist()
        for length in [tokens, *range((tokens - 1) // size * size, prompt, -size)][: tokens - prompt]:
            if row and steps and prompt + steps[-1] + 1 >= length:
                found.append((line, row))
                row = 0
            while steps and prompt + steps[-1] + 1 >= length:
                before = turnovers.pop()
                line = [before[beam] for beam in line]
                steps.pop()
            row += 1
        if tokens == prompt and prompt % size:
            row = 1
        if row:
            found.append((line, row))
        return found[::-1]

    def in_common(self) -> list[list[int]]:
        """Tokens that each two beams have in common in the end, shape [beams, beams]."""
        width = self.parents.shape[1]
        common = [[self.prompt] * width for _ in range(width)]
        heirs = {beam: [beam] for beam in range(width)}  # by their last ancestor that was looked at
        steps, past = self._turnovers(self.final)
        for step, parents in zip(reversed(steps), reversed(past.tolist()), strict=True):
            tokens = self.prompt + step + 1
            before: dict[int, list[int]] = {}
            for beam, mine in heirs.items():
                others = before.setdefault(parents[beam], [])
                for other in others:
                    for each in mine:
                        common[other][each] = common[each][other] = tokens
                others += mine
            heirs = before
            if len(heirs) == 1:
                break
        return common
