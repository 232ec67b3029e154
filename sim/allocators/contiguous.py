"""Contiguous reservations: one chunk per request, held to its end."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sim.allocators.base import Allocator, allocator
from sim.allocators.capacity import Admission, Capacity
from sim.errors import IntegrityError
from sim.pools.placement import PLACEMENTS, Placement
from sim.request import Request, Sequence


@allocator("contiguous")
class ContiguousAllocator(Allocator):
    """One contiguous chunk per request, reserved at admission and held until it finishes.

    These are the baselines of Orca (Yu et al., OSDI 2022) as the PagedAttention paper models them (Kwon et
    al., SOSP 2023, section 6.1). Nothing grows, nothing is shared. A chunk's rounding to the sizes that the
    placement has counts as external fragmentation.

    Fields:
        reserve: max reserves the longest sequence that the engine serves; pow2 the prompt and the output
            rounded up to a power of two, at most the longest sequence; oracle the prompt and the true output.
        placement: Which free chunk is taken; Orca's baselines use the buddy system.
    """

    can_grow = False
    absent: ClassVar = {"prefix_caching": "a contiguous reservation is one request's alone, its prefix too"}
    reasons: ClassVar = {
        "can_fork": "a reservation is one sequence's alone",
        "can_offload": "a reservation is given back as a whole",
    }

    def __init__(
        self,
        capacity: Capacity,
        *,
        reserve: Literal["max", "pow2", "oracle"] = "max",
        placement: Literal["buddy", "first_fit", "best_fit"] = "buddy",
    ) -> None:
        super().__init__(capacity)
        self.policy = reserve
        self.placement: Placement = PLACEMENTS[placement](self.num_slots)
        self._whole = self.placement.largest()
        # A prompt of one token and an output of one are the least that anyone reserves.
        self._smallest = self.max_model_len if reserve == "max" else min(2, self.max_model_len)
        self._chunks: dict[Sequence, tuple[int, int]] = {}  # first slot, slots reserved
        self._rounding = 0
        self._stale = True
        self._too_small = 0

    def reservation(self, request: Request) -> int:
        """Slots reserved for a request."""
        if self.policy == "max":
            return self.max_model_len
        output = request.output_tokens
        if self.policy == "pow2":
            output = 1 << (output - 1).bit_length()
        return min(self.max_model_len, request.prompt_tokens + output)

    def admission(self, request: Request, num_tokens: int) -> Admission:
        """A free chunk for the whole reservation."""
        size = self.placement.rounded(self.reservation(request))
        if size > self._whole:
            return Admission.NEVER
        return Admission.OK if size <= self.placement.largest() else Admission.LATER

    def refusal(self, request: Request, num_tokens: int) -> str:
        """The reservation against the largest chunk there can be."""
        size = self.reservation(request)
        return (
            f"a reservation of {size} slots takes a chunk of {self.placement.rounded(size)}, "
            f"the largest of {self.num_slots} slots has {self._whole}"
        )

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """The whole reservation at once."""
        size = self.reservation(sequence.request)
        self._chunks[sequence] = (self.placement.take(size), size)
        self._rounding += self.placement.rounded(size) - size
        self._stale = True
        return size

    def release(self, sequence: Sequence) -> None:
        """Give the chunk back."""
        base, size = self._chunks.pop(sequence)
        self.placement.give(base, size)
        self._rounding -= self.placement.rounded(size) - size
        self._stale = True

    def num_external(self, head_refused: bool) -> int:
        """Rounding, and free chunks too small for the smallest reservation, or for a head that was refused."""
        if head_refused:  # it was refused because no free chunk holds it
            return self._rounding + self.placement.num_free
        if self._stale:
            self._too_small = self.placement.too_small(self._smallest)
            self._stale = False
        return self._rounding + self._too_small

    def slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Base plus offset, shape [num_tokens]."""
        base, _ = self._chunks[sequence]
        return np.arange(base, base + sequence.num_tokens, dtype=np.int64)

    def check_books(self) -> None:
        """Chunks held and chunks free tile the slots."""
        for sequence, (_, size) in self._chunks.items():
            if sequence.capacity != size:
                raise IntegrityError(f"{sequence}: held({sequence.capacity}) != slots of its chunk({size})")
        held = [(base, self.placement.rounded(size)) for base, size in self._chunks.values()]
        end = 0
        for base, size in sorted(held + self.placement.chunks()):
            if base != end:
                raise IntegrityError(f"chunk at({base}) != end of the chunk before({end})")
            end = base + size
        if end != self.num_slots:
            raise IntegrityError(f"end of the last chunk({end}) != slots({self.num_slots})")
        rounding = sum(self.placement.rounded(size) - size for _, size in self._chunks.values())
        if rounding != self._rounding:
            raise IntegrityError(f"rounding({self._rounding}) != recount over the chunks({rounding})")
