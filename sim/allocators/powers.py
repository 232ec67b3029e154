"""What an allocator may be able to do beyond giving and taking slots."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from sim.allocators.capacity import Admission
from sim.genealogy import Ints
from sim.link import Link
from sim.request import Request, Sequence
from sim.tiers.tiered_store import TieredStore
from sim.timing.transfers import Transfers
from sim.units import FOREVER
from sim.witness import Witness


class CountedGroups(Protocol):
    """Beam groups whose blocks are counted, as schedulers and the engine see them (`CountedBeams`)."""

    groups: dict[Request, Any]

    @property
    def demand(self) -> int:
        """Blocks that the growth of the next tick takes."""

    def grow(self) -> int:
        """Give all beams the slot of their next token; the number of blocks copied."""

    def growing(self) -> list[Request]:
        """Requests whose beams need blocks with the next tick."""

    def quiet_for(self, limit: int) -> int:
        """Ticks, at most so many, before which nothing turns over and in which nothing grows."""

    def bounded(self, limit: int, spare: int) -> int:
        """Ticks, at most so many, in which all may grow and leave `spare` free blocks each time."""

    def copies(self, ticks: int) -> list[int]:
        """Blocks copied in each of the next ticks."""

    def advance(self, ticks: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Go through so many ticks: slots held and wasted in each, tokens and blocks saved from this one on."""

    def list_all(self) -> None:
        """Give every beam of every group a block table."""

    def all_listed(self) -> AbstractContextManager[None]:
        """For the time being every beam has its block table."""


class Powers:
    """Optional powers: what says whether an allocator has them, and their methods, which refuse by default."""

    absent: ClassVar[dict[str, str]] = {}
    """Fields that other allocators have, and why this one does not."""
    reasons: ClassVar[dict[str, str]] = {}
    """Powers that other allocators have, and why this one does not."""
    can_fork: bool = False
    recomputes_groups: ClassVar[bool] = False
    """Whether a group of branches that gives way can be computed again, what branches share once."""
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
    stride: int | None = None
    """Tokens between two growths of a sequence, and two turns of a window, where they differ in slots; None if that
    differs too."""
    grows_steadily: bool = False
    """Whether every token takes a slot of its own, which can be counted without looking at the sequence."""
    groups_layers: ClassVar[bool] = False
    """Whether layers of several kinds each keep what they need, states too; else all keep every token."""
    grows_foreseeably: ClassVar[bool] = False
    """Whether growths that differ change no more than what `grow` tells, `num_external` for one."""
    slides: bool = False
    """Whether running sequences give slots back, as windows slide past them."""
    gave_back: bool = False
    """Whether a running sequence gave slots back since somebody last looked (and cleared it)."""
    counts_beams: bool = False
    """Whether the blocks of a beam group can be counted without a table for each beam (`CountableAllocator`)."""
    counted: CountedGroups | None = None
    """Groups that are counted now."""
    block_size: int = 1
    longest_run: int = 1
    """Most blocks of a table that are handed out as one aligned run, which a kernel may read at once."""
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

    def offloaded_bytes(self, token_bytes: float) -> float:
        """Bytes of a block in a tier, by those that a token takes over all layers."""
        return token_bytes * self.block_size

    def open_tiers(self, tiers: TieredStore) -> None:
        """Keep cached prefixes in these tiers too; to be called before the first request."""
        raise TypeError(f"{type(self).__name__} has no cached prefixes to offload")

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child share everything that the parent holds."""
        raise TypeError(f"{type(self).__name__} cannot share slots between sequences")

    def copies(self, branches: list[Sequence]) -> int:
        """Blocks that the next tokens of branches take which share the blocks that these go to, all who have them."""
        return len(branches)

    def list_blocks(self, sequence: Sequence) -> None:
        """Bring the sequence's block table up to date, where growth only counts blocks."""

    def stop(self, sequence: Sequence) -> None:
        """Leave a sequence that does not decode what it holds until others need it: its last blocks go first.

        Only blocks that it shares with nobody are given up; `admit` brings back what it lacks then.
        """
        raise TypeError(f"{type(self).__name__} cannot take a part of what a sequence holds")

    def clear_for(self, request: Request) -> bool:
        """Take all that other requests have which stopped, where nobody runs; whether there were any."""
        return False

    def in_common(self, request: Request) -> list[tuple[Sequence, int] | None]:
        """Of each branch an earlier one, and the full leading blocks that both would have if they were computed again.

        None where there are none.
        """
        return [None] * len(request.sequences)

    def remember(self, request: Request) -> None:
        """Note what the branches of a group that gives way have in common, where it is not found by its content."""

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

    def land(self, now: int) -> None:
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
