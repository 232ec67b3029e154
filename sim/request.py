"""Requests, and the sequences that they become while they live."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import Any, Literal, Protocol

Status = Literal["waiting", "running", "swapped", "finished", "rejected"]

NEVER = -1
"""A time or tick that has not come."""


class Lineage:
    """The forks behind a branch: from `start` on it is `branch`, and before that what its parent was."""

    __slots__ = ("branch", "parent", "start")

    def __init__(self, start: int, branch: int, parent: Lineage | None) -> None:
        self.start = start
        self.branch = branch
        self.parent: Lineage | None = parent


class Window(Protocol):
    """Where a window of a sequence begins, in one group of layers (`sim/allocators/window_edge.py`)."""

    sequence: Sequence
    group: int
    turn: int


class Decoding(Protocol):
    """What a sequence decodes in: its clock, and what it counts of all who do (`sim/decode_set.py`)."""

    clock: int
    grown: int
    sliding: int
    copy_pending: list[Sequence]

    def await_turn(self, window: Window) -> None:
        """Note when a window gives back next."""


class Sequence:
    """One branch of a request while it lives.

    `num_tokens` counts tokens whose K and V have a slot; the last sampled token gets its slot with the next
    step, so a branch of P prompt and O output tokens ends with `final_tokens` = P + O - 1 of them.
    """

    steady = False

    __slots__ = (
        "block_table", "branch", "capacity", "decodes", "edges", "final_tokens", "finish_tick", "lineage",
        "order", "origin", "request", "sibling", "sliding", "tables",
    )  # fmt: skip

    def __init__(self, request: Request, branch: int, num_tokens: int, final_tokens: int) -> None:
        self.request = request
        self.branch = branch
        self.lineage: Lineage | None = None  # where it parted from others, if it did
        # Of a group that gave way: whose leading blocks it shares, and how many; kept by the allocator.
        self.sibling: tuple[Sequence, int] | None = None
        self.order = request.id << 32 | branch  # first come, first served, parents before their forks
        self.final_tokens = final_tokens
        self.capacity = 0  # slots held; kept by the allocator
        self.block_table: list[int] = []  # kept by allocators that hand out blocks
        self.tables: Ordered[list[int]] = ()  # one for each group of layers that keep tokens, likewise
        # Kept by the decode set: while a sequence decodes, its length is its origin plus the set's clock.
        self.decodes: Decoding | None = None
        self.origin = num_tokens
        self.finish_tick = NEVER
        self.sliding = 0  # slots whose tokens leave a window with every further token; kept by the allocator
        self.edges: Ordered[Window] = ()  # in order of the groups; kept by the allocator

    @property
    def num_tokens(self) -> int:
        """Tokens that have a KV slot now (the token of the step in flight included)."""
        return self.origin if self.decodes is None else self.origin + self.decodes.clock

    def __repr__(self) -> str:
        return f"sequence {self.request.id}.{self.branch}"


class TokenwiseSequence(Sequence):
    """A sequence that takes a slot with every token; while it is `steady`, the decode set counts its slots."""

    __slots__ = ("_slots", "steady")

    def __init__(self, request: Request, branch: int, num_tokens: int, final_tokens: int) -> None:
        self.steady = False
        super().__init__(request, branch, num_tokens, final_tokens)

    @property
    def capacity(self) -> int:
        """Slots held."""
        if self.steady:
            assert self.decodes is not None
            return self.origin + self.decodes.grown
        return self._slots

    @capacity.setter
    def capacity(self, slots: int) -> None:
        assert not self.steady, "its slots are counted"
        self._slots = slots


class Counted(Protocol):
    """A beam group while its blocks are counted and its beams have no tables (`sim/allocators/counted_group.py`)."""

    @property
    def num_shared(self) -> int:
        """Blocks that the beams share, each but for its first holder."""

    @property
    def demand(self) -> int:
        """Blocks that the growth of the next tick takes."""

    def grow(self) -> int:
        """Give the beams of this group alone the slot of their next token; the number of blocks copied."""

    def list_blocks(self) -> None:
        """Give every beam a block table of its own."""

    def free(self, sequence: Sequence) -> None:
        """A beam has its last token."""


class Session(Protocol):
    """Requests of which some are sent only when others are answered: a conversation, a search."""

    @property
    def over(self) -> bool:
        """Whether nothing of it is on its way and nothing will follow."""

    def answered(self, request: Request) -> Iterable[tuple[int, Request]]:
        """What the end of a request, finished or rejected, leads to: requests, each with its delay in ns."""


class Request:
    """What a client asked for, and what became of it.

    Times are integer nanoseconds (`NEVER` until they come). `output_tokens` is the true output of each
    branch; policies that could not know it must not read it. `n` parallel samples or `beam_width` beams
    share the prompt.

    `content` names what the prompt is made of, one id after the other; None is content of its own. An id stands
    for a run of tokens, which requests that use it may use the beginning of: equal ids that begin at equal
    positions behind equal ids mean equal tokens. The runs are of `content_grain` tokens each, the last one
    possibly partial; or else they end at the positions `content_ends`, behind which the prompt is of its own. What
    branch 0 generates is named by `output_content`, for prompts that repeat it, or token by token where the grain is
    1 and the content goes on behind the prompt. `session` knows what the answer
    leads to.
    """

    __slots__ = (
        "arrival_time", "beam_width", "cached_tokens", "content", "content_chains", "content_ends", "content_grain",
        "counted", "finish_time", "first_scheduled_time", "first_token_time", "id", "n", "next_branch",
        "output_content", "output_tokens", "preemptions", "prefill_tokens", "prefills", "priority",
        "prompt_tokens", "reason", "reused_tokens", "sequences", "session", "status", "tenant", "width",
    )  # fmt: skip

    def __init__(
        self,
        id: int,  # noqa: A002
        arrival_time: int,
        prompt_tokens: int,
        output_tokens: int,
        *,
        n: int = 1,
        beam_width: int = 1,
        content: tuple[int, ...] | None = None,
        content_grain: int = 0,
        content_ends: tuple[int, ...] = (),
        output_content: int | None = None,
        session: Session | None = None,
        priority: int = 0,
        tenant: int = 0,
    ) -> None:
        self.id = id
        self.arrival_time = arrival_time
        self.prompt_tokens = prompt_tokens
        self.prefill_tokens = prompt_tokens  # grows by the generated tokens after a recompute
        self.output_tokens = output_tokens
        self.n = n
        self.beam_width = beam_width
        self.width = n if n > beam_width else beam_width  # branches that run side by side
        self.content = content
        self.content_grain = content_grain
        self.content_ends = content_ends
        self.output_content = output_content
        self.content_chains: tuple[Ordered[int], list[int]] | None = None  # kept by those who need keys of it
        self.session = session
        self.priority = priority
        self.tenant = tenant
        self.status: Status = "waiting"
        self.reason = ""
        self.sequences: list[Sequence] = []
        self.next_branch = 1
        self.counted: Counted | None = None  # kept by the allocator
        self.first_scheduled_time = NEVER
        self.first_token_time = NEVER
        self.finish_time = NEVER
        self.preemptions = 0
        self.prefills = 0  # admissions, each of which computes the prompt or what is left of it
        self.cached_tokens = 0  # found at the first admission
        self.reused_tokens = 0  # most found at one of them

    def __repr__(self) -> str:
        return f"request {self.id}"


def outputs(request: Request) -> int:
    """Tokens that a request has generated so far, of several branches those of the first."""
    tokens = request.prefill_tokens  # grown by them if it was preempted
    if request.sequences and request.sequences[0].decodes is not None:
        tokens = request.sequences[0].num_tokens + 1  # the last one has no slot yet
    return tokens - request.prompt_tokens


def one_priority(workload: dict[str, Any]) -> bool:
    """Whether a configuration of a workload gives all requests the same priority."""
    return "priorities" in workload and len(workload["priorities"] or ()) < 2
