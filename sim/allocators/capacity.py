"""What a device offers its allocator, the allocator's answers, and where the slots are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sim.layer_groups import LayerKind

STAYS_CACHED = (
    "what a preempted request had stays cached until others need it, its end first, and is found again: "
    "take recompute"
)
"""Why an allocator with prefix caching has no partial preemption."""


class Admission(Enum):
    """Whether a request can be given memory: now, after others have left, or not in this pool at all."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a device offers: KV slots (one token each), and the longest sequence that the engine serves.

    `num_blocks` is set when the user gave a number of blocks; it then wins over `num_slots`. `token_bytes` is what
    a token's K, or its V, takes in one of `num_layers` layers on one device; both are 0 where no model is known.
    A model whose layers are of several kinds says so in `layers`, with the bytes that there are for all of them;
    `num_slots` are then tokens without any window. A quantised cache has its precision in `kv_cache_dtype`.
    """

    num_slots: int
    max_model_len: int
    num_blocks: int | None = None
    token_bytes: float = 0.0
    num_layers: int = 0
    layers: tuple[LayerKind, ...] = ()
    kv_bytes: int = 0
    kv_cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Where the KV slots of the device are at an instant; the five parts add up to the capacity.

    token_states: slots that hold a live token, a shared slot once. reserved: held, and used later by their
    holder. internal: held, and never used by their holder. external: rounding of a reservation up to its
    chunk, and free chunks that no reservation fits into. free: everything else.
    """

    token_states: int
    reserved: int
    internal: int
    external: int
    free: int

    @property
    def total(self) -> int:
        """All slots."""
        return self.token_states + self.reserved + self.internal + self.external + self.free
