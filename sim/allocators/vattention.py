"""Contiguous virtual memory, mapped by the page group: vAttention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import Allocator, allocator
from sim.allocators.blocks import block_slots
from sim.allocators.capacity import Admission, Capacity
from sim.errors import IntegrityError, UserError
from sim.pools.group_pool import GroupPool
from sim.registry import Bounds
from sim.request import Request, Sequence

PAGE_BYTES = {"64 KiB": 1 << 16, "128 KiB": 1 << 17, "256 KiB": 1 << 18, "2 MiB": 1 << 21}
WITHOUT_MODEL = 16
"""Tokens of a group where no model's shape is known."""


@allocator("vattention")
class VAttentionAllocator(Allocator):
    """A contiguous range of virtual memory for each batch slot, backed by page groups as a sequence grows.

    vAttention (Prabhu et al., ASPLOS 2025; `vattention.cu`, `vattention_block_space_manager.py`). Every layer has a
    buffer for K and one for V, in which a batch slot owns a range as long as the longest sequence. A page of each
    of them, mapped together, is a page group: the unit in which memory is given, as a block is elsewhere. So any
    kernel works on it, and what is wasted is the rest of the last group. A request is admitted if its prompt's
    groups leave the watermark; a sequence may go on while any group is free. There are no forks and no swapping.

    A freed range keeps its groups until others need them, and counts as free memory. Mapping takes no time here:
    the results count the groups mapped and unmapped, and of those mapped the ones that a step had to wait for.

    Fields:
        page_size: Bytes of a page; all but 2 MiB need a changed driver.
        megacache: Whether the layers lie interleaved in one buffer for K and one for V, so that a page holds
            some tokens of every layer.
        watermark: Share of the groups that an admission leaves free.
        reclamation: deferred leaves the groups of a freed range mapped until others need them; eager unmaps
            them at once.
        map_ahead: Whether a background thread maps what decoding sequences need in the next steps, so that no
            step waits for it.
    """

    pool: GroupPool
    absent: ClassVar = {"prefix_caching": "a batch slot's range is its own, no page group is mapped twice"}
    reasons: ClassVar = {
        "can_fork": "a batch slot's range is its own, no page group is mapped twice",
        "can_swap": "who gives way leaves its batch slot, and what is mapped there is the next one's",
        "can_stop": "who gives way leaves its batch slot, and what is mapped there is the next one's",
        "can_offload": "a batch slot's range is its own",
    }

    def __init__(
        self,
        capacity: Capacity,
        *,
        page_size: Literal["64 KiB", "128 KiB", "256 KiB", "2 MiB"] = "2 MiB",
        megacache: bool = False,
        watermark: Annotated[float, Bounds(ge=0, lt=1)] = 0.01,
        reclamation: Literal["deferred", "eager"] = "deferred",
        map_ahead: bool = True,
    ) -> None:
        super().__init__(capacity)
        size, num_groups = WITHOUT_MODEL, self.num_slots // WITHOUT_MODEL
        if capacity.token_bytes:
            page, bytes_per_token = PAGE_BYTES[page_size], capacity.token_bytes
            if megacache:
                bytes_per_token *= capacity.num_layers
            size, num_groups = int(page // bytes_per_token), int(self.num_slots * bytes_per_token // page)
            if not size:
                raise UserError(
                    f"a page of {page_size} holds no token, which takes {bytes_per_token:g} bytes of it"
                )
        if capacity.num_blocks is not None:
            num_groups = capacity.num_blocks
            self.num_slots = num_groups * size
        self.block_size = self.growth = size
        self.watermark_blocks = int(watermark * num_groups)
        self.pool = GroupPool(num_groups, deferred=reclamation == "deferred")
        self.map_ahead = map_ahead
        self.num_waited_for = 0  # groups mapped while a step waited
        self._places: dict[Sequence, int] = {}  # range of each sequence
        self._remainder = (
            self.num_slots - num_groups * size
        )  # too short for a group, or for a token in a page

    def num_external(self, head_refused: bool) -> int:
        """What is behind the last whole group, and behind the last whole token of each page."""
        return self._remainder

    def admission(self, request: Request, num_tokens: int) -> Admission:
        """Groups for all of the prompt beside the watermark."""
        needed = -(-num_tokens // self.block_size)
        if needed > self.pool.num_blocks - self.watermark_blocks:
            return Admission.NEVER
        return Admission.OK if self.pool.num_free - needed >= self.watermark_blocks else Admission.LATER

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Groups needed against groups there."""
        needed = -(-num_tokens // self.block_size)
        return (
            f"{num_tokens} tokens need {needed} page groups of {self.block_size} tokens, "
            f"the pool has {self.pool.num_blocks} and keeps {self.watermark_blocks} as watermark"
        )

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Have the range of the sequence backed so far; a newcomer gets one first."""
        pool, table = self.pool, sequence.block_table
        needed = -(-num_tokens // self.block_size)
        place = self._places.get(sequence)
        if place is None:
            place = self._places[sequence] = pool.enter(needed)
        before = pool.num_mapped
        table += pool.extend(place, needed)
        if sequence.decodes is None or not self.map_ahead:
            self.num_waited_for += pool.num_mapped - before
        return len(table) * self.block_size

    def release(self, sequence: Sequence) -> None:
        """Leave the range."""
        self.pool.leave(self._places.pop(sequence))
        sequence.block_table = []

    @property
    def headroom(self) -> int:
        """Free groups."""
        return self.pool.num_free

    def can_append(self, request: Request) -> bool:
        """Any group is free, whether one is needed or not."""
        return self.pool.num_free > 0

    def slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Group times tokens of a group plus offset, shape [num_tokens]: where in physical memory a token is."""
        return block_slots(sequence.block_table, self.block_size, sequence.num_tokens)

    @property
    def figures(self) -> dict[str, float]:
        """Page groups mapped and unmapped, and how many of those mapped a step waited for."""
        return {
            "mapped_groups": self.pool.num_mapped,
            "mapped_groups_waited_for": self.num_waited_for,
            "unmapped_groups": self.pool.num_unmapped,
        }

    def check_books(self) -> None:
        """The ranges against the tables."""
        self.pool.check_integrity(sequence.block_table for sequence in self.sequences)
        for sequence, place in self._places.items():
            backed = self.pool.mapped[place][: self.pool.needed[place]]
            if backed != sequence.block_table:
                raise IntegrityError(
                    f"{sequence}: groups of its range({backed}) != table({sequence.block_table})"
                )
            if sequence.capacity != len(backed) * self.block_size:
                slots = len(backed) * self.block_size
                raise IntegrityError(f"{sequence}: held({sequence.capacity}) != slots of its range({slots})")

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """A page holds as many tokens as the model's shape says."""
        if config["model"] is None:
            yield "allocator", "vattention needs a model: its shape says how many tokens a page holds"
