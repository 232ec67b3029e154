"""The books of an allocator: how many slots are held, and what is in them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from sim.allocators.capacity import Capacity, MemoryUsage
from sim.allocators.powers import Powers
from sim.errors import IntegrityError
from sim.request import Sequence


class Books(Powers, ABC):
    """Counters of slots, and their recount from what sequences hold.

    `num_held` slots are handed out; of them `num_tokens` hold tokens and `num_internal` will never be used. The second
    is moved by the engine with every step, `num_ticks` with every step that decodes.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.entry_log: list[tuple[int, int]] = []
        self.num_slots = capacity.num_slots
        self.kv_cache_dtype = capacity.kv_cache_dtype
        self.max_model_len = capacity.max_model_len
        self.num_tokens = 0
        self.num_ticks = 0
        self.num_held = 0
        self.num_internal = 0
        self.sequences: set[Sequence] = set()
        self.turns: list[tuple[int, int]] = []
        """Of the last growths, ticks from which on so many slots slide out of windows with every tick."""

    @abstractmethod
    def slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Slot of every token of the sequence, shape [num_tokens], in order of position."""

    def num_external(self, head_refused: bool) -> int:
        """Slots that no request can get: rounding of chunks, and free chunks that are too small.

        `head_refused` is true while the head of the queue waits for memory.
        """
        return 0

    def usage(self, head_refused: bool = False) -> MemoryUsage:
        """Where the slots are now."""
        external = self.num_external(head_refused)
        return MemoryUsage(
            token_states=self.num_tokens,
            reserved=self.num_held - self.num_tokens - self.num_internal,
            internal=self.num_internal,
            external=external,
            free=self.num_slots - self.num_held - external,
        )

    def check_integrity(self) -> None:
        """Recount everything from the sequences' slots. Raises IntegrityError with the equation that failed."""
        tables = [self.slots(sequence) for sequence in self.sequences]
        for sequence, table in zip(self.sequences, tables, strict=True):
            tokens = sequence.num_tokens
            if len(table) != tokens:
                raise IntegrityError(f"{sequence}: slots({len(table)}) != tokens({tokens})")
            if tokens > sequence.capacity:
                raise IntegrityError(f"{sequence}: tokens({tokens}) > held({sequence.capacity})")
        slots = np.concatenate(tables) if tables else np.empty(0, np.int64)
        if len(slots) and (slots.min() < 0 or slots.max() >= self.num_slots):
            raise IntegrityError(f"slots {slots.min()}..{slots.max()} are not inside 0..{self.num_slots - 1}")
        used = np.zeros(self.num_slots, np.bool_)
        used[slots] = True
        distinct = int(np.count_nonzero(used))
        if distinct < len(slots):
            for sequence, table in zip(self.sequences, tables, strict=True):
                _equal(f"{sequence}: distinct slots", len(np.unique(table)), "slots", len(table))
        if not self.can_fork and not self.keeps_freed:
            _equal("distinct slots of all sequences", distinct, "slots of all sequences", len(slots))
            held = [(sequence.capacity, sequence.final_tokens) for sequence in self.sequences]
            _equal("held", self.num_held, "slots held by all sequences", sum(slots for slots, _ in held))
            unused = sum(max(0, slots - final) for slots, final in held)
            _equal("internal", self.num_internal, "slots that no sequence will use", unused)
        _equal("token states", self.num_tokens, "distinct slots", distinct)
        for refused in (False, True):
            usage = self.usage(refused)
            _equal(
                "token_states + reserved + internal + external + free",
                usage.total,
                "capacity",
                self.num_slots,
            )
            for name in ("token_states", "reserved", "internal", "external", "free"):
                if getattr(usage, name) < 0:
                    raise IntegrityError(f"{name}({getattr(usage, name)}) < 0 in {usage}")
        self.check_books()

    def check_books(self) -> None:
        """Compare a policy's own books; called by `check_integrity`."""


def _equal(left: str, left_value: int, right: str, right_value: int) -> None:
    if left_value != right_value:
        raise IntegrityError(f"{left}({left_value}) != {right}({right_value})")
