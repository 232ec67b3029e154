"""The ledger of an allocator with several layer groups: which token every place of a page holds, in every group."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.allocators.grouped import GroupedAllocator
from sim.audit.journeys import Journeys
from sim.errors import ProbeError
from sim.identity import UNWRITTEN, History, Ints
from sim.request import Request, Sequence
from sim.tiers.tier import Tier

_GROUP = 0x5851F42D4C957F2D
_MASK = (1 << 63) - 1


class GroupLayout:
    """Where the held tokens of some sequences are, one group of one sequence after the other."""

    def __init__(self, parts: list[tuple[Sequence, int, int, Ints]]) -> None:
        self.parts = parts
        self.sequences = list(dict.fromkeys(sequence for sequence, *_ in parts))
        self.slots: Ints = np.concatenate([slots for *_, slots in parts]) if parts else np.empty(0, np.int64)
        self.ends: Ints = np.cumsum([len(slots) for *_, slots in parts], dtype=np.int64)

    def told(self, at: int, tier: str = "device") -> str:
        """Which token stands at an index, in which group and slot."""
        part = int(np.searchsorted(self.ends, at, side="right"))
        sequence, group, first, slots = self.parts[part]
        position = first + at - (int(self.ends[part]) - len(slots))
        return f"{sequence}, token {position} of layer group {group}, {tier} slot {self.slots[at]}"


class GroupedLedger(Journeys):
    """Witness as `Ledger` is, for block tables by layer group: page times block size plus offset is a slot.

    The same token is another thing in every group, so that tables of two groups cannot be mixed up unseen. Pages
    of several sizes are numbered kind after kind; that they do not overlap is for the allocator's own books.
    States have no tokens and are not looked at.
    """

    pooled = True  # nobody else asks whether reservations overlap

    def __init__(self, allocator: GroupedAllocator) -> None:
        super().__init__()
        self.allocator = allocator
        self.when = "before the first sample"
        pool = next(iter(allocator.pools), None)
        self.device = Tier("device", allocator.num_pages, allocator.block_size, pool)
        self.tiers = {"device": self.device}
        self.live: dict[Sequence, tuple[History, list[int]]] = {}  # and tokens entered by group
        self.changed: set[int] = set()
        self.on_event: Callable[[], None] | None = None

    # What it is told

    def touch(self, tier: str, blocks: Ordered[int]) -> None:
        """What the pages hold stays."""
        self.device.reset()

    def begin(self, sequence: Sequence) -> None:
        """The tokens that need not be computed have to be found where they are."""
        _, entered = self._state(sequence)
        found = self.allocator.holdings[sequence].found * self.allocator.block_size
        entered[:] = [found] * len(entered)

    def write(self, sequence: Sequence) -> None:
        """Enter the tokens of the sequence."""
        for one, group, first, slots in self.layout([sequence]).parts:
            self._enter(one, group, first, slots)

    def leave(self, sequence: Sequence, group: int, tokens: int) -> None:
        """The first tokens are about to be out of the window: enter them."""
        first, slots = self._slots(sequence, group, tokens)
        self._enter(sequence, group, first, slots)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Both go on from the same history, the child as a branch of its own."""
        history, entered = self._state(parent)
        own = history.fork(child.request, child.branch, parent.num_tokens)
        self.live[child] = own, entered.copy()

    def follows(self, request: Request) -> bool:
        """All that there are."""
        return True

    def hide(self, sequence: Sequence) -> None:
        """Nobody is hidden."""
        raise self.error(f"{sequence} is hidden")

    def show(self, sequence: Sequence) -> None:
        """Nor shown again."""
        raise self.error(f"{sequence} is shown again")

    def copy(self, source: int, target: int) -> None:
        """The target holds what the source holds."""
        self.device.reset()
        self.device.rows[target] = self.device.rows[source]
        self.device.quantized[target] = self.device.quantized[source]
        self.changed.add(target)

    def cut(self, block: int, offset: int) -> None:
        """Nor is a page known by a part of what it holds."""
        raise self.error(f"page {block} is void from its token {offset} on")

    def lose(self, sequence: Sequence) -> None:
        """Nor is a part of what a sequence holds given up."""
        raise self.error(f"{sequence} has lost a part of its tokens")

    def swap(self, tier: str, pairs: Ordered[tuple[int, int]], sequences: Ordered[Sequence] = ()) -> None:
        """Nor swaps."""
        raise self.error(f"{len(pairs)} pages are moved to {tier}")

    def offload(self, sequences: Iterable[Sequence]) -> None:
        """Enter the sequences; one that is over is entered already."""
        for sequence in dict.fromkeys(sequences):
            holding = self.allocator.holdings.get(sequence)
            if holding is not None and not holding.done:
                self.write(sequence)

    def end(self, sequence: Sequence) -> None:
        """Forget the sequence; what it leaves behind may be found."""
        if self.allocator.keeps_freed and sequence in self.allocator.sequences and sequence.num_tokens:
            self.write(sequence)
        self.live.pop(sequence, None)

    # What it knows

    @property
    def precision(self) -> str | None:
        """That of all K and V, where it is not the model's own."""
        return self.allocator.kv_cache_dtype

    def quantized(self, layout: GroupLayout) -> NDArray[np.bool_]:
        """Which of the layout's tokens have lost precision: all or none."""
        return np.full(len(layout.slots), self.precision is not None)

    def contents(self, sequence: Sequence, group: int = 0) -> Ints:
        """Identities of the sequence's tokens in a group, shape [num_tokens]."""
        found = self._state(sequence)[0].identities(0, sequence.num_tokens)[0]
        return found ^ np.int64((group + 1) * _GROUP & _MASK)

    def layout(self, sequences: list[Sequence]) -> GroupLayout:
        """Where the sequences' tokens are in all groups."""
        layout = GroupLayout(
            [
                (sequence, group, *self._slots(sequence, group, sequence.num_tokens))
                for sequence in sequences
                for group in self.allocator.token_groups
            ]
        )
        for sequence, group, first, _ in layout.parts:
            window = self.allocator.groups[group].window
            if window is not None and first > max(0, sequence.num_tokens + 1 - window):  # of the next token
                told = f"{sequence} has {sequence.num_tokens} tokens"
                raise self.error(
                    f"{told}, and in layer group {group}, of window {window}, none before {first}"
                )
        outside = np.flatnonzero((layout.slots < 0) | (layout.slots >= len(self.device.slots)))
        if len(outside):
            told = layout.told(int(outside[0]))
            raise self.error(f"{told} is outside the {len(self.device.slots)} slots")
        return layout

    def _slots(self, sequence: Sequence, group: int, tokens: int) -> tuple[int, Ints]:
        """Position of the first token that is held in a group, and the slots from there up to so many tokens."""
        allocator, size = self.allocator, self.allocator.block_size
        first, pages = allocator.held_pages(sequence, group)
        slots = (pages[:, None] * size + np.arange(size)).reshape(-1)[: tokens - first]
        if len(slots) < tokens - first:
            told = f"{sequence} has {tokens} tokens"
            raise self.error(f"{told}, and in layer group {group} room for {first + len(slots)}")
        return first, slots

    def enter(self, layout: GroupLayout) -> Ints:
        """Enter all tokens that are not entered yet; the identities of all, entered before or now."""
        everybody = {*layout.sequences}
        if self.allocator.keeps_freed:  # a hit may be in a page of somebody who is not looked at
            others = [each for each in self.allocator.sequences if each.num_tokens and each not in everybody]
            for sequence, group, first, slots in self.layout(others).parts:
                self._enter(sequence, group, first, slots)
        contents = [
            self._enter(sequence, group, first, slots) for sequence, group, first, slots in layout.parts
        ]
        return np.concatenate(contents) if contents else np.empty(0, np.int64)

    def _enter(self, sequence: Sequence, group: int, first: int, slots: Ints) -> Ints:
        self.device.reset()
        history, entered = self._state(sequence)
        stop = first + len(slots)
        wanted = history.identities(0, stop)[0][first:] ^ np.int64((group + 1) * _GROUP & _MASK)
        new = max(0, entered[group] - first)
        places, values = slots[new:], wanted[new:]
        if self.device.pool is not None:
            found = self.device.slots[places]
            clashes = np.flatnonzero((found != UNWRITTEN) & (found != values))
            if len(clashes):
                at = int(clashes[0])
                told = (
                    f"{sequence}, token {first + new + at} of layer group {group}, device slot {places[at]}"
                )
                raise self.error(f"{told} is written over {self.told(int(found[at]))}")
        self.device.slots[places] = values
        if self.precision is not None:
            self.device.quantized.reshape(-1)[places] = True
        entered[group] = max(entered[group], stop)
        return wanted

    def piece(
        self, sequence: Sequence, limit: int, draw: random.Random
    ) -> tuple[Ints, Ints, Ints, int | None]:
        """Held tokens of a sequence in one of its groups, at most `limit`: pages, what is in them, what should be.

        The last is the window of that group where its newest token can be asked for all that it sees, else None.
        """
        allocator, size = self.allocator, self.allocator.block_size
        group = draw.choice(allocator.token_groups)
        first, pages = allocator.held_pages(sequence, group)
        pages = pages[: -(-(sequence.num_tokens - first) // size)]
        window = allocator.groups[group].window
        width = max(1, limit // size)
        if window is not None and len(pages) <= width and len(pages) * size > window:
            begin = 0
        else:
            window = None
            begin = draw.randrange(max(1, len(pages) - width + 1))
        pages = pages[begin : begin + width]
        start = first + begin * size
        wanted = self.contents(sequence, group)[start : start + len(pages) * size]
        return pages, self.device.rows[pages], wanted, window

    def _state(self, sequence: Sequence) -> tuple[History, list[int]]:
        state = self.live.get(sequence)
        if state is None:
            state = self.live[sequence] = History.along(sequence), [0] * len(self.allocator.groups)
        return state

    def evidence(self) -> dict[str, Any]:
        """The memory as it is: plain values under `when` and `sequences`, arrays under `arrays`."""
        live = dict.fromkeys([*self.allocator.sequences, *self.live])
        sequences = [
            {
                "sequence": str(sequence),
                "num_tokens": sequence.num_tokens,
                "block_tables": self.allocator.holdings[sequence].tables
                if sequence in self.allocator.holdings
                else [],
            }
            for sequence in live
        ]
        self.device.reset()
        arrays = {"device slots": self.device.slots.copy()}
        arrays |= {str(sequence): self.contents(sequence) for sequence in live}
        return {"when": self.when, "sequences": sequences, "arrays": arrays}

    def error(self, what: str) -> ProbeError:
        """An error that says when."""
        return ProbeError(f"{self.when}: {what}")

    def told(self, found: int) -> str:
        """Whose token an identity is."""
        if found == UNWRITTEN:
            return "nothing, as nobody wrote there"
        for sequence in self.live:
            for group in self.allocator.token_groups:
                matches = np.flatnonzero(self.contents(sequence, group) == found)
                if len(matches):
                    return f"token {matches[0]} of {sequence} in layer group {group} ({found:#x})"
        return f"a token of nobody that is live ({found:#x})"
