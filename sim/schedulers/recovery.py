"""Recovery: what it costs to take a request's memory and to bring it back, by moving it or by computing it again."""

from __future__ import annotations

import math
from typing import Literal, Protocol

from sim.allocators.base import Allocator
from sim.allocators.capacity import Admission
from sim.decode_set import DecodeSet
from sim.link import Link
from sim.request import NEVER, Request, Sequence
from sim.step import Step
from sim.timing.base import StepTime
from sim.timing.transfers import Transfers

Preemption = Literal["auto", "recompute", "swap", "hybrid", "partial"]


class Preempting(Protocol):
    """Whose victims these are: a scheduler, as far as recovery knows it."""

    allocator: Allocator
    decodes: DecodeSet
    preemption: Preemption
    mixes_prompts: bool


def branches(request: Request) -> int:
    """Sequences that a request counts for: those that it has or will fork, of a beam search always all."""
    if request.first_token_time == NEVER or request.beam_width > 1:
        return request.width
    return len(request.sequences)


class Recovery:
    """How a victim gives up its memory, and the seconds that the way costs.

    Moving costs both directions, and the queue on the link where copies wait for others. Computing again costs
    what the prefill of the lost tokens, cached ones aside, adds to a step of the sequences that decode now; where
    the scheduler gives prompts steps of their own, it is such a step. Several prompts in one step cost less than one by
    one, so that is multiplied by the share of it that recomputing has really added so far in the run. All of it comes
    from the run's own timing model and link. A group goes one way as a whole; what its branches share is moved once,
    and computed once.
    """

    def __init__(self, owner: Preempting) -> None:
        self._owner = owner
        self._timing: StepTime | None = None
        self._transfers: Transfers | None = None
        self._alone = 0.0  # seconds that what was computed again would have added one by one
        self._added = 0.0  # seconds that it has added

    def price(self, timing: StepTime, transfers: Transfers) -> None:
        """Take the costs of a run, and open its link; to be called before its first step."""
        self._timing, self._transfers = timing, transfers
        allocator = self._owner.allocator
        if allocator.can_fly:
            allocator.quantization = transfers.quantization
            allocator.link = Link(transfers) if transfers.asynchronous else None
        if allocator.tiers is not None:
            allocator.tiers.traffic.asynchronous = transfers.asynchronous
            for tier in allocator.tiers.tiers:
                tier.price_copies(transfers.copy_out, transfers.copy_in, transfers.copies_per_block)
            allocator.tiers.traffic.layers = transfers.overlapping_layers
            if allocator.tiers.cost is not None:
                allocator.tiers.cost.price = self.prefill_seconds

    def swaps(self, request: Request) -> bool:
        """Whether the request would be moved to the host if it gave way now; a tie is computed again."""
        if not self._may_swap(request) or not self._owner.allocator.can_swap_out(request):
            return False
        return self._swap_pays(request)

    def refused(self, request: Request) -> bool:
        """Whether it would be moved if the host had room for it."""
        allocator = self._owner.allocator
        if not allocator.can_swap or not self._may_swap(request) or allocator.can_swap_out(request):
            return False
        return self._swap_pays(request)

    def _may_swap(self, request: Request) -> bool:
        """Whether the mode lets it be moved."""
        mode = self._owner.preemption
        again = self.computes(request)
        return not again or mode in ("swap", "hybrid") or (mode == "auto" and branches(request) > 1)

    def _swap_pays(self, request: Request) -> bool:
        """Whether moving it is cheaper, where the mode asks for that."""
        if self._owner.preemption != "hybrid" or not self.computes(request):
            return True
        return self.swap_seconds(request) < self.recompute_seconds(request)

    def computes(self, request: Request) -> bool:
        """Whether the request could be computed again; V0 (auto) gives up a group that the host has no room for."""
        if len(request.sequences) == 1:
            return True
        allocator = self._owner.allocator
        return allocator.recomputes_groups and not (allocator.can_swap and self._owner.preemption == "auto")

    def seconds(self, request: Request) -> float:
        """What the request costs to recover if it gives way now; infinite for a group that could not come back."""
        if self.swaps(request):
            return self.swap_seconds(request)
        return self.recompute_seconds(request) if self.computes(request) else math.inf

    def swap_seconds(self, request: Request) -> float:
        """Seconds to move the request's blocks to the host and back, the queue on the link included.

        Infinite for one that has grown too large to be brought back.
        """
        assert self._transfers is not None, "recovery has no price before a run"
        allocator = self._owner.allocator
        if allocator.swap_in_admission(request) is Admission.NEVER:
            return math.inf
        blocks = allocator.swap_blocks(request)
        copies = self._transfers.swap_seconds(blocks, 0) + self._transfers.swap_seconds(0, blocks)
        copies += 2 * blocks * self._transfers.quantize_block
        return copies if allocator.link is None else copies + allocator.link.queue_seconds()

    def recompute_seconds(self, request: Request) -> float:
        """Seconds to compute again what the request has: hits of the prefix cache aside, what branches share once."""
        allocator, sequences = self._owner.allocator, request.sequences
        known = sequences[0].num_tokens  # branches are equally long
        cached = [min(allocator.cached_tokens(request, known), known - 1)]
        if len(sequences) > 1:
            size, shared = allocator.block_size, allocator.in_common(request)[1:]
            cached += [min(found[1] * size, known - 1) if found else 0 for found in shared]
        seconds = self._prefill_seconds(sequences, cached, known)
        return seconds * self._added / self._alone if self._alone else seconds

    def note_recomputed(self, step: Step, seconds: float) -> float:
        """What computing lost tokens again adds to a step of so many seconds, which estimates go by from now on."""
        assert self._timing is not None, "recovery has no price before a run"
        rest = step.without_recomputed()
        added = seconds if rest.empty else seconds - self._timing.seconds(rest)
        again: dict[Request, list[tuple[Sequence, int, int]]] = {}
        for index, behind in step.recomputed:
            sequence, start, tokens = step.chunks[index]
            again.setdefault(sequence.request, []).append((sequence, start, tokens - behind))
        for chunks in again.values():
            self._alone += self._chunk_seconds(chunks, step.num_decodes, step.decode_context)
        self._added += added
        return added

    def prefill_seconds(self, request: Request, cached: int) -> float:
        """Seconds to compute a request's prompt behind so many cached tokens."""
        sequence = request.sequences[0] if request.sequences else Sequence(request, 0, 0, 0)
        return self._prefill_seconds([sequence], [cached], request.prefill_tokens)

    def _prefill_seconds(self, sequences: list[Sequence], cached: list[int], known: int) -> float:
        """Seconds to compute these sequences' tokens behind the cached ones, in one step."""
        chunks = [(sequence, found, known - found) for sequence, found in zip(sequences, cached, strict=True)]
        decodes = self._owner.decodes
        if not self._owner.mixes_prompts:
            return self._chunk_seconds(chunks, 0, 0)
        return self._chunk_seconds(chunks, decodes.size, decodes.context)

    def _chunk_seconds(self, chunks: list[tuple[Sequence, int, int]], decodes: int, context: int) -> float:
        """Seconds that chunks add to a step of so many decodes, which attend over so many tokens."""
        timing = self._timing
        assert timing is not None, "recovery has no price before a run"
        step = Step()
        step.chunks = chunks
        step.num_prefill_tokens = sum([tokens for _, _, tokens in chunks])
        if not decodes:
            return timing.seconds(step)
        step.num_decodes, step.decode_context = decodes, context
        return timing.seconds(step) - timing.decode_seconds(decodes, context)
