"""Pages of several sizes in one memory: Jenga."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Ordered
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import allocator
from sim.allocators.capacity import Admission, Capacity
from sim.allocators.grouped_branches import BranchedAllocator
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.errors import IntegrityError, UserError
from sim.layer_groups import LayerKind, own_pages
from sim.pools.large_pages import LargePages
from sim.registry import Bounds, PositiveInt
from sim.request import Request, Sequence


@allocator("jenga")
class JengaAllocator(BranchedAllocator):
    """A page size for each kind of layers, in large pages of their least common multiple, as in Jenga (SOSP 2025).

    All layers of a kind share a block table whose pages hold exactly a block of their tokens, or their states;
    large pages are split into pages of one kind, a request's packed together (`sim/pools/large_pages.py`). So nothing
    is padded; what is wasted beside tails and window edges are small pages that are free in a large page, and
    these are internal waste until somebody takes them. Prefixes are not cached. Branches of a request share its pages,
    and those that it is packed into. A model of equal layers has one kind, and is paged as usual.

    Fields:
        block_size: Tokens of a page.
        watermark: Share of the large pages that an admission leaves free while others run.
    """

    absent: ClassVar = {
        "prefix_caching": "pages of a kind are not found by their content; prefix does so over groups of layers"
    }
    reasons: ClassVar = {
        "can_swap": "Jenga stands on vLLM V1, which computes what gave way again",
        "can_stop": "states and windows are of the last token, and nobody goes on from a part of them: take recompute",
        "can_offload": "pages of a kind are not found by their content",
    }

    def __init__(
        self,
        capacity: Capacity,
        *,
        block_size: PositiveInt = 16,
        watermark: Annotated[float, Bounds(ge=0, lt=1)] = 0.0,
    ) -> None:
        kinds = capacity.layers or (LayerKind(1, 1),)
        pages = own_pages(kinds, block_size)
        super().__init__(capacity, pages)
        slots = capacity.kv_bytes // pages.slot_bytes if capacity.layers else capacity.num_slots
        self.pages = LargePages(slots, [group.page_slots for group in self.groups])
        if capacity.num_blocks is not None:
            slots = capacity.num_blocks * self.pages.size
            self.pages = LargePages(slots, self.pages.sizes)
        if not self.pages.num_large:
            raise UserError(
                f"the pages of this model's layers have a least common multiple of {self.pages.size:,} slots, "
                f"and there are {slots:,}"
            )
        self.num_slots = slots
        self.watermark_pages = int(watermark * self.pages.num_large)
        self._whole = all(split == 1 for split in self.pages.splits)  # a large page is a page of any kind
        self.by_tick = not self._whole
        self._given: list[tuple[int, Sequence, int, int]] = []  # order, who gave in this tick, kind, and page
        self._extra: dict[tuple[int, int], int] = {}  # references beyond the first, by kind and page
        self._packed: list[dict[int, int]] = []  # what the next branch is packed into

    def _needs(self, num_tokens: int, chunk: int) -> list[int]:
        """Pages of each kind for so many tokens, `chunk` of them computed in a step."""
        size = self.block_size
        needs = []
        for group in self.groups:
            rows = -(-num_tokens // size)
            if group.window is not None:
                rows = min(rows, -(-(group.window - 1 + chunk) // size) + 1)
            needs.append(1 if group.state_slots else rows)
        return needs

    def admission(self, request: Request, num_tokens: int) -> Admission:
        """Room for all tokens at once."""
        return self.admission_in_chunks(request, num_tokens, num_tokens)

    def admission_in_chunks(
        self, request: Request, num_tokens: int, chunk: int, first: int | None = None
    ) -> Admission:
        """Large pages for the prompt, or small ones that others left over."""
        if request.width > 1:
            return self._branched_admission(request, num_tokens, chunk)
        needs = self._needs(num_tokens, chunk)
        pages = self.pages
        most = sum([-(-need // split) for need, split in zip(needs, pages.splits, strict=True)])
        if most > pages.num_large:
            return Admission.NEVER
        spare = self.watermark_pages if self.sequences else 0
        return Admission.OK if pages.fits(needs, spare=spare) else Admission.LATER

    def _branched_admission(self, request: Request, num_tokens: int, chunk: int) -> Admission:
        """Large pages for all branches that come with the prompt, the states of those to come among them."""
        others = len(request.sequences) - 1
        rows = -(-num_tokens // self.block_size)
        if others > 0:
            again = others * (rows - self.shared_rows(request))
            needs = [others + 1 if group.state_slots else rows + again for group in self.groups]
        else:
            coming = self.to_fork(request)
            needs = [
                need + coming * (group.state_slots > 0)
                for need, group in zip(self._needs(num_tokens, chunk), self.groups, strict=True)
            ]
        large = sum([-(-need // split) for need, split in zip(needs, self.pages.splits, strict=True)])
        if large > self.pages.num_large:
            return Admission.NEVER
        spare = self.watermark_pages if self.sequences else 0
        return Admission.OK if large <= len(self.pages.free) - spare else Admission.LATER

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Pages needed against pages there."""
        told = " and ".join(map(str, self._needs(num_tokens, num_tokens)))
        splits = " or ".join(map(str, self.pages.splits))
        return (
            f"{num_tokens} tokens need {told} pages of the {len(self.groups)} kinds of layers, "
            f"the memory has {self.pages.num_large} large pages of {splits} each"
        )

    @property
    def headroom(self) -> int:
        """Sequences that can each open a large page for every kind."""
        return len(self.pages.free) // len(self.token_groups)

    def lacks(self, holding: Holding, rows: int) -> bool:
        """Neither in large pages of the sequence's own, nor in free ones, nor in those of others."""
        if rows > 1:
            lasts = self.pages.lasts(rows, self.token_groups, holding.packed)
            if not lasts and self._given:
                self.settle()
                lasts = self.pages.lasts(rows, self.token_groups, holding.packed)
            return not lasts
        return not self._fits([0 if group.state_slots else rows for group in self.groups], holding)

    def _fits(self, needs: list[int], holding: Holding) -> bool:
        """Whether a sequence can have so many pages, if need be with those that others give back in this tick."""
        fits = self.pages.fits(needs, holding.packed)
        if not fits and self._given:
            self.settle()
            fits = self.pages.fits(needs, holding.packed)
        return fits

    def demand(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages of every kind that the next tokens take, more than the headroom only if they cannot be had.

        The windows give back first, even if they cannot.
        """
        self.pass_windows(sequence)
        needed = self.pages_needed(sequence, num_tokens)
        if max(needed) <= 0:
            return 0
        fits = self._fits(needed, self.holdings[sequence])
        return min(max(needed), self.headroom) if fits else self.headroom + 1

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Give a sequence pages of every kind."""
        filled = num_tokens if filled is None else filled
        tables: list[list[int]] = [[] for _ in self.groups]
        first, start = sequence.request.sequences[0], 0
        if sequence is not first:
            start = self.shared_rows(sequence.request) * self.block_size
            self._packed = self.holdings[first].packed
            for group, pages in zip(self.token_groups, self.share_prompt(first), strict=True):
                tables[group] = pages
                self.hold(group, [page for page in pages if page != NULL])
        self.begin(sequence, tables, num_tokens, filled, start)
        self.keep_spare(sequence)
        return start

    def take(self, holding: Holding, counts: Ordered[int]) -> None:
        """Pages of every kind, near those that the sequence has."""
        for table, pages in zip(holding.tables, self.fresh(holding, counts), strict=True):
            table += pages

    def fresh(self, holding: Holding, counts: Ordered[int]) -> list[list[int]]:
        """Pages of every kind, near those that the request has."""
        if not holding.packed:
            holding.packed, self._packed = self._packed or [{} for _ in self.groups], []
        loose = self.pages.loose
        taken = [
            self.pages.take(kind, count, holding.packed[kind]) if count > 0 else []
            for kind, count in enumerate(counts)
        ]
        self._note_loose(loose)
        return taken

    def hold(self, group: int, pages: list[int]) -> None:
        """One more reference to each."""
        extra = self._extra
        for page in pages:
            extra[group, page] = extra.get((group, page), 0) + 1

    def num_holders(self, group: int, page: int) -> int:
        """References of a page."""
        return 1 + self._extra.get((group, page), 0)

    @property
    def sharing(self) -> bool:
        """Whether any page has several references."""
        return bool(self._extra)

    def num_shared(self, group: int, pages: list[int]) -> int:
        """How many of these held pages others hold too."""
        extra = self._extra
        return sum([(group, page) in extra for page in pages]) if extra else 0

    @property
    def blocks_saved(self) -> int:
        """References beyond the first of every page."""
        return sum(self._extra.values())

    def take_rows(self, growing: list[Sequence]) -> list[int]:
        """Pages of every kind, near those that each sequence has."""
        kinds = self.token_groups
        if self._whole:
            return self.pages.take_whole(len(kinds) * len(growing))
        loose = self.pages.loose
        taken = []
        for sequence in growing:
            packed = self.holdings[sequence].packed
            for kind in kinds:
                taken += self.pages.take(kind, 1, packed[kind])
        self._note_loose(loose)
        return taken

    def pass_pages(self, edges: list[Edge]) -> int:
        """Take back the pages that windows have passed."""
        size, slots = self.block_size, 0
        passed = []
        for edge in edges:
            table, index = edge.table, edge.freed
            passed.append(table[index])
            table[index] = NULL
            edge.freed = index + 1
            edge.turn += size
            slots += self.groups[edge.group].page_slots
        if self._whole:
            self.pages.free += passed
        else:
            for edge, page in zip(edges, passed, strict=True):
                self.give(edge.sequence, edge.group, [page])
        return slots

    def give(self, sequence: Sequence, group: int, pages: list[int]) -> None:
        """Take pages back; of a sequence that is looked at alone only when all have theirs, or need them."""
        if self._extra:
            pages = [page for page in pages if not self._is_shared(group, page)]
        if self.walker is not None:
            self._given += [(sequence.order, sequence, group, page) for page in pages]
            return
        loose = self.pages.loose
        self.pages.give(group, pages, self.holdings[sequence].packed[group])
        self._note_loose(loose)

    def _is_shared(self, group: int, page: int) -> bool:
        """Whether somebody else has a page, to which a reference is dropped then."""
        count = self._extra.get((group, page), 0)
        if count > 1:
            self._extra[group, page] = count - 1
        elif count:
            del self._extra[group, page]
        return count > 0

    def settle(self) -> None:
        """Take back what windows gave back in this tick, in the order of `turn`."""
        given, self._given = sorted(self._given, key=_order), []
        for _, sequence, kind, page in given:
            self.give(sequence, kind, [page])

    def free(self, sequence: Sequence) -> None:
        """Take everything back."""
        self.settle()
        super().free(sequence)

    def _note_loose(self, before: int) -> None:
        if self.pages.loose != before:
            self.num_held += self.pages.loose - before
            self.num_internal += self.pages.loose - before

    @property
    def num_pages(self) -> int:
        """Small pages that memory could be split into, kind after kind."""
        return self.pages.num_large * sum(self.pages.splits)

    def held_pages(self, sequence: Sequence, group: int) -> tuple[int, NDArray[np.int64]]:
        """Those of a kind behind all of the kinds before it."""
        first, pages = super().held_pages(sequence, group)
        return first, pages + self.pages.num_large * sum(self.pages.splits[:group])

    def page_starts(self, group: int, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """First slot of each page."""
        pages = pages - self.pages.num_large * sum(self.pages.splits[:group])
        split = self.pages.splits[group]
        return pages // split * self.pages.size + pages % split * self.groups[group].page_slots

    def numbered(self, group: int, pages: Ordered[int]) -> Ordered[int]:
        """As `held_pages` does."""
        before = self.pages.num_large * sum(self.pages.splits[:group])
        return [page + before for page in pages]

    def num_external(self, head_refused: bool) -> int:
        """The slots behind the last whole large page."""
        return self.num_slots - self.pages.num_large * self.pages.size

    @property
    def num_loose(self) -> int:
        """Slots in large pages that are in no small page in use."""
        return self.pages.loose

    def check_books(self) -> None:
        """Small and large pages against the tables."""
        used: list[Counter[int]] = [Counter() for _ in self.groups]
        for holding in self.holdings.values():
            for counts, table in zip(used, holding.tables, strict=True):
                counts.update([page for page in table if page != NULL])
            for counts, pages in zip(used, holding.spare, strict=False):
                counts.update(pages)
        self.pages.check_integrity(used)
        extra = {
            (group, page): count - 1
            for group, counts in enumerate(used)
            for page, count in counts.items()
            if count > 1
        }
        if extra != self._extra:
            raise IntegrityError(f"shared pages({len(self._extra)}) != shared by the tables({len(extra)})")


def _order(given: tuple[int, Sequence, int, int]) -> int:
    return given[0]
