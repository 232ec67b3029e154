"""What an allocator is: who owns which KV slots, and what is wasted."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sim.block_pool import BlockPool
from sim.errors import IntegrityError
from sim.layer_groups import LayerKind
from sim.link import Link
from sim.probe import Witness
from sim.registry import Registry
from sim.request import Request, Sequence
from sim.tiered_store import TieredStore
from sim.units import FOREVER

if TYPE_CHECKING:
    from sim.allocators.counted_beams import CountedBeams
    from sim.beams import BeamSearch
    from sim.decode_set import DecodeSet
    from sim.timing.transfers import Transfers

allocator: Registry[type[Allocator]] = Registry("allocator")


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


class Allocator(ABC):
    """Owner of the KV slots of one device.

    A policy says whether a request fits (`admission`), gives slots (`reserve`), takes them back (`release`)
    and tells where a sequence's tokens live (`slots`). Accounting is done here, in a handful of counters that
    change only when a sequence comes, grows or leaves; `num_tokens` is moved by the engine with every step,
    `num_ticks` with every step that decodes.
    Its first parameter is the `Capacity`; the keyword-only ones are its YAML fields.
    """

    can_fork: ClassVar[bool] = False
    recomputes_groups: ClassVar[bool] = False
    """Whether a group of branches that gives way can be computed again, each branch on its own."""
    can_swap: ClassVar[bool] = False
    can_grow: ClassVar[bool] = True
    """Whether a running sequence may need more slots, and others may have to give way for it."""
    can_stop: ClassVar[bool] = False
    """Whether a sequence that does not run may keep its blocks until somebody needs them (partial preemption)."""
    can_fly: ClassVar[bool] = False
    """Whether swaps may go on beside the computation, and at another precision than the cache's."""
    yielding: int = 0
    """Part of the headroom: blocks that somebody still has, and gives up when they are asked for."""
    asks_exactly: ClassVar[bool] = False
    """Whether `can_append` refuses only requests that need a slot, and takes one out of the headroom for each."""
    growth: int | None = None
    """Slots that every growth adds, which then leaves `num_external` alone; None if that differs."""
    groups_layers: ClassVar[bool] = False
    """Whether layers of several kinds each keep what they need, states too; else all keep every token."""
    grows_foreseeably: ClassVar[bool] = False
    """Whether growths that differ change no more than what `grow` tells, `num_external` for one."""
    slides: bool = False
    """Whether running sequences give slots back, as windows slide past them."""
    gave_back: bool = False
    """Whether a running sequence gave slots back since somebody last looked (and cleared it)."""
    counts_beams: bool = False
    """Whether the blocks of a beam group can be counted without a table for each beam (`count_beams`)."""
    counted: CountedBeams | None = None
    """Groups that are counted now."""
    block_size: int = 1
    slots_per_token: int = 1
    """Token states that a further token adds, before any slides out of a window."""
    can_offload: ClassVar[bool] = False
    """Whether the cached prefixes can go on to tiers behind the device."""
    keeps_freed: bool = False
    """Whether freed blocks keep what they hold and may be handed out again with it (prefix caching)."""
    foresees: bool = False
    """Whether it is told all requests of the workload beforehand, by `foresee`: a bound, as no server knows them."""
    probe: Witness | None = None
    quantization: str | None = None
    """Precision of what is swapped out, where that is not the cache's own."""
    tiers: TieredStore | None = None
    """Where cached prefixes go on, behind the device."""
    link: Link[Transfers] | None = None
    """Where swaps take their time beside the computation; without one they are over at once."""

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

    # What a policy decides

    @abstractmethod
    def admission(self, request: Request, num_tokens: int) -> Admission:
        """Whether the request can be given slots for its first `num_tokens` tokens; changes nothing."""

    @abstractmethod
    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Give the sequence slots for at least `num_tokens` tokens, on top of those it holds; the new total."""

    @abstractmethod
    def release(self, sequence: Sequence) -> None:
        """Take back all slots of the sequence."""

    @abstractmethod
    def slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Slot of every token of the sequence, shape [num_tokens], in order of position."""

    def admission_in_chunks(self, request: Request, num_tokens: int, chunk: int) -> Admission:
        """`admission` of a request that computes at most `chunk` tokens in a step, and gets slots for no more."""
        return self.admission(request, num_tokens)

    def refusal(self, request: Request, num_tokens: int) -> str:
        """Why the request can never be admitted, in numbers."""
        return f"{num_tokens} tokens do not fit into {self.num_slots} slots"

    def num_external(self, head_refused: bool) -> int:
        """Slots that no request can get: rounding of chunks, and free chunks that are too small.

        `head_refused` is true while the head of the queue waits for memory.
        """
        return 0

    @property
    def headroom(self) -> int:
        """Sequences that can each outgrow their slots once more without a refusal; unlimited by default."""
        return FOREVER

    def can_append(self, request: Request) -> bool:
        """Whether every running branch of the request may have one more token."""
        return True

    def demand(self, sequence: Sequence, num_tokens: int) -> int:
        """What the next tokens of a sequence would take of the headroom."""
        lacking = sequence.num_tokens + num_tokens - sequence.capacity
        if lacking <= 0:
            return 0
        return 1 if self.growth is None else -(-lacking // self.growth)

    def cached_tokens(self, request: Request, num_tokens: int) -> int:
        """How many leading tokens of the request an admission would find cached; at least one is not."""
        return 0

    def foresee(self, requests: Iterable[Request]) -> None:
        """Know the workload; called before the first request where `foresees` is true."""
        raise TypeError(f"{type(self).__name__} foresees nothing")

    def shared_tokens(self, request: Request, num_tokens: int) -> int:
        """How many of those are in slots that somebody holds, so that finding them takes none of the free ones."""
        return 0

    # What the engine calls

    def admit(self, sequence: Sequence, num_tokens: int, filled: int | None = None) -> int:
        """Give a sequence that holds nothing slots for `num_tokens` tokens, all filled with this step or so many.

        Returns how many of these tokens need not be computed, since cached blocks hold them.
        """
        if filled is None:
            filled = num_tokens
        held = self.reserve(sequence, num_tokens)
        sequence.capacity = held
        sequence.origin = filled
        self.num_tokens += filled
        self.num_held += held
        if held > sequence.final_tokens:
            self.num_internal += held - sequence.final_tokens
        self.sequences.add(sequence)
        if self.keeps_freed and self.probe is not None:
            self.probe.begin(sequence)
        return 0

    def computed(self, sequence: Sequence) -> None:  # noqa: B027 - most need not know
        """The sequence's prompt is computed by now; told to allocators that keep freed blocks."""

    def pass_windows(self, sequence: Sequence) -> None:  # noqa: B027 - most have none
        """Give back what no further token of a sequence that does not decode looks at."""

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Fill the next slots of a sequence that does not decode, after taking those that it lacks."""
        filled = sequence.origin + num_tokens
        if filled > sequence.capacity:
            self._grow_to(sequence, filled)
        sequence.origin = filled
        self.num_tokens += num_tokens

    def grow(self, batches: Collection[tuple[int, list[Sequence]]]) -> list[tuple[int, int, int]]:
        """Give each sequence, whose slots are all filled, room for one more token; batch by batch.

        A batch is a tick and the sequences that grow at it. Those that will need no more are taken off the
        list. Returns (tick, slots held, internal waste) after each batch.
        """
        books = []
        for tick, sequences in batches:
            for sequence in sequences:
                self._grow_to(sequence, sequence.capacity + 1)
            sequences[:] = [sequence for sequence in sequences if sequence.capacity < sequence.final_tokens]
            books.append((tick, self.num_held, self.num_internal))
        return books

    def _grow_to(self, sequence: Sequence, num_tokens: int) -> None:
        before = sequence.capacity
        sequence.capacity = held = self.reserve(sequence, num_tokens)
        self.num_held += held - before
        if held > sequence.final_tokens:
            self.num_internal += held - max(before, sequence.final_tokens)

    def gives_back(self, growing: Iterable[Sequence], awaited: bool) -> bool:
        """Whether one of these sequences gives slots back where it grows next.

        If they are not `awaited`, whether that changes more than the slots held and internal waste.
        """
        return False

    def settle(self) -> None:  # noqa: B027 - most have nothing to do
        """All decoding sequences have the slots of the coming tick; told to allocators that slide."""

    def unfill(self, sequence: Sequence, num_tokens: int) -> None:
        """Take the last tokens from a sequence that does not decode; it keeps its slots."""
        sequence.origin -= num_tokens
        self.num_tokens -= num_tokens

    def slide(self, slots: int) -> None:
        """The tokens in so many slots left their windows."""
        self.num_tokens -= slots
        self.num_internal += slots

    def append(self, sequence: Sequence) -> int:
        """Make sure that the next token of the sequence has a slot of its own; the number of blocks copied."""
        if sequence.num_tokens >= sequence.capacity:
            self._grow_to(sequence, sequence.capacity + 1)
        return 0

    def free(self, sequence: Sequence) -> None:
        """Take everything back from a sequence that does not decode."""
        self.num_tokens -= sequence.origin
        self.num_held -= sequence.capacity
        self.num_internal -= max(0, sequence.capacity - sequence.final_tokens)
        self.sequences.discard(sequence)
        self.release(sequence)
        sequence.capacity = 0

    def retire(self, request: Request) -> None:
        """Note that the branches of a request are done but keep their slots: nothing in them is used again."""
        for sequence in request.sequences:
            self.num_tokens -= sequence.num_tokens
            self.num_internal += sequence.capacity - max(0, sequence.capacity - sequence.final_tokens)
            sequence.origin = sequence.final_tokens = 0

    # What a probe asks

    @property
    def pools(self) -> list[BlockPool]:
        """The block pools among the attributes; one without any hands out slots in its own way."""
        # Not vars(self): once its __dict__ is read, CPython 3.11 finds every attribute of an object more slowly.
        values = gc.get_referents(self)
        found = dict.fromkeys(
            value for value in values + gc.get_referents(*values) if isinstance(value, BlockPool)
        )
        return list(found)

    def watch(self, probe: Witness) -> None:
        """Tell a probe of everything that happens to slots."""
        self.probe = probe
        if self.tiers is not None:
            self.tiers.probe = probe

    def held_slots(self, sequence: Sequence) -> NDArray[np.int64]:
        """Slots of all tokens that the sequence has room for, shape [capacity]."""
        room = sequence.capacity - sequence.num_tokens
        sequence.origin += room  # as if it had filled them
        try:
            return self.slots(sequence)
        finally:
            sequence.origin -= room

    def shares_tail(self, sequence: Sequence) -> bool:
        """Whether its next token needs a copy of its last block, which a cache gave to another request too."""
        return False

    # Optional powers, refused unless `can_fork`, `can_stop`, `can_swap`, `can_fly` or `can_offload` says otherwise

    def open_tiers(self, tiers: TieredStore) -> None:
        """Keep cached prefixes in these tiers too; to be called before the first request."""
        raise TypeError(f"{type(self).__name__} has no cached prefixes to offload")

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child share everything that the parent holds."""
        raise TypeError(f"{type(self).__name__} cannot share slots between sequences")

    def count_beams(self, decodes: DecodeSet, search: BeamSearch) -> CountedBeams:
        """What counts the blocks of beam groups in this decode set."""
        raise TypeError(f"{type(self).__name__} has no count of the blocks of beams")

    def stop(self, sequence: Sequence) -> None:
        """Leave a sequence that does not decode what it holds until others need it: its last blocks go first.

        Only blocks that it shares with nobody are given up; `admit` brings back what it lacks then.
        """
        raise TypeError(f"{type(self).__name__} cannot take a part of what a sequence holds")

    def swap_blocks(self, request: Request) -> int:
        """Blocks that swapping the request out would move."""
        return 0

    def can_swap_out(self, request: Request) -> bool:
        """Whether the host has room for what the request holds."""
        return False

    def swap_out(self, request: Request) -> int:
        """Move what the request holds to the host; the number of blocks moved."""
        raise TypeError(f"{type(self).__name__} cannot swap")

    def swap_in_admission(self, request: Request) -> Admission:
        """Whether a swapped request can come back."""
        return Admission.NEVER

    def swap_in(self, request: Request) -> int:
        """Move a swapped request back to the device; the number of blocks moved."""
        raise TypeError(f"{type(self).__name__} cannot swap")

    def land(self, now: int) -> None:  # noqa: B027 - most have nothing in flight
        """Free what has been copied by now (ns)."""

    @property
    def next_landing(self) -> int:
        """When the next copy in flight ends (ns); FOREVER if there is none."""
        return FOREVER

    @property
    def blocks_saved(self) -> int:
        """Blocks that would be held beside those held now if nothing were shared."""
        return 0

    @property
    def figures(self) -> dict[str, float]:
        """Figures of a finished run that only this policy has, by their names in the summary."""
        return {}

    @property
    def num_entries(self) -> int | None:
        """Entries of all block tables on the device where blocks differ in size; None where each block has one.

        Where it says so, a growth changes nothing but what is held, wasted and listed, and `entry_log` has the ticks
        of growths with the blocks less the entries after each; the engine clears it.
        """
        return None

    @property
    def block_slots(self) -> int:
        """Slots of a block as `blocks_saved` counts them."""
        return self.block_size

    # Books

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

    def check_books(self) -> None:  # noqa: B027 - most have no more books than those here
        """Compare a policy's own books; called by `check_integrity`."""

    @classmethod
    def finds_prefixes(cls, fields: dict[str, Any]) -> bool:
        """Whether an allocator of this kind with these fields finds blocks again by their content."""
        return cls.keeps_freed and fields.get("prefix_caching") is not False

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """(dotted path, complaint) for options of a whole experiment that contradict each other."""
        return ()


def _equal(left: str, left_value: int, right: str, right_value: int) -> None:
    if left_value != right_value:
        raise IntegrityError(f"{left}({left_value}) != {right}({right_value})")
