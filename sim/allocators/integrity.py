"""The books of an allocator recounted from the slots of its sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sim.errors import IntegrityError

if TYPE_CHECKING:
    from sim.allocators.base import Allocator


def recount(allocator: Allocator) -> None:
    """Recount everything from the sequences' slots. Raises IntegrityError with the equation that failed."""
    tables = [allocator.slots(sequence) for sequence in allocator.sequences]
    for sequence, table in zip(allocator.sequences, tables, strict=True):
        tokens = sequence.num_tokens
        if len(table) != tokens:
            raise IntegrityError(f"{sequence}: slots({len(table)}) != tokens({tokens})")
        if tokens > sequence.capacity:
            raise IntegrityError(f"{sequence}: tokens({tokens}) > held({sequence.capacity})")
    slots = np.concatenate(tables) if tables else np.empty(0, np.int64)
    if len(slots) and (slots.min() < 0 or slots.max() >= allocator.num_slots):
        raise IntegrityError(
            f"slots {slots.min()}..{slots.max()} are not inside 0..{allocator.num_slots - 1}"
        )
    used = np.zeros(allocator.num_slots, np.bool_)
    used[slots] = True
    distinct = int(np.count_nonzero(used))
    if distinct < len(slots):
        for sequence, table in zip(allocator.sequences, tables, strict=True):
            _equal(f"{sequence}: distinct slots", len(np.unique(table)), "slots", len(table))
    if not allocator.can_fork and not allocator.keeps_freed:
        _equal("distinct slots of all sequences", distinct, "slots of all sequences", len(slots))
        held = [(sequence.capacity, sequence.final_tokens) for sequence in allocator.sequences]
        _equal("held", allocator.num_held, "slots held by all sequences", sum(slots for slots, _ in held))
        unused = sum(max(0, slots - final) for slots, final in held)
        _equal("internal", allocator.num_internal, "slots that no sequence will use", unused)
    _equal("token states", allocator.num_tokens, "distinct slots", distinct)
    for refused in (False, True):
        usage = allocator.usage(refused)
        _equal(
            "token_states + reserved + internal + external + free",
            usage.total,
            "capacity",
            allocator.num_slots,
        )
        for name in ("token_states", "reserved", "internal", "external", "free"):
            if getattr(usage, name) < 0:
                raise IntegrityError(f"{name}({getattr(usage, name)}) < 0 in {usage}")


def _equal(left: str, left_value: int, right: str, right_value: int) -> None:
    if left_value != right_value:
        raise IntegrityError(f"{left}({left_value}) != {right}({right_value})")
