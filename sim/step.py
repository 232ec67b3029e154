"""A step: what the engine does in one iteration."""

from __future__ import annotations

from sim.request import Request, Sequence


class Step:
    """What one engine step does.

    `chunks` are (sequence, start, tokens): prompt tokens start .. start + tokens are computed, in all
    `num_prefill_tokens`. `num_decodes`
    sequences gain one token each and attend over `decode_context` tokens in all, the new ones included.
    `copied_blocks`, `swapped_out_blocks`, `swapped_in_blocks` are moved before it; `preempted` and `rejected`
    are requests that the plan sent back or gave up.

    A policy that tells them apart says of how many chunks no token was asked for (`num_unprompted`: they
    compute generated tokens again) and how many end in a further token, as a decode does (`num_resumed`).
    `recomputed` has, for each chunk that begins with tokens computed before a preemption, its index and the number
    of tokens behind those.
    """

    __slots__ = (
        "chunks", "copied_blocks", "decode_context", "num_decodes", "num_prefill_tokens", "num_resumed",
        "num_unprompted", "preempted", "recomputed", "rejected", "swapped_in_blocks", "swapped_out_blocks",
    )  # fmt: skip

    def __init__(self) -> None:
        self.chunks: list[tuple[Sequence, int, int]] = []
        self.num_prefill_tokens = 0
        self.num_unprompted = 0
        self.num_resumed = 0
        self.num_decodes = 0
        self.decode_context = 0
        self.copied_blocks = 0
        self.swapped_out_blocks = 0
        self.swapped_in_blocks = 0
        self.recomputed: list[tuple[int, int]] = []
        self.preempted: list[Request] = []
        self.rejected: list[Request] = []

    @property
    def empty(self) -> bool:
        """True if nothing is computed."""
        return not self.chunks and not self.num_decodes

    def without_recomputed(self) -> Step:
        """What the step would compute had nobody lost anything.

        A chunk that brings back all that was lost ends in the token that a decode would have given; that token goes
        with it.
        """
        other = Step()
        other.num_decodes, other.decode_context = self.num_decodes, self.decode_context
        other.num_unprompted, other.num_resumed = self.num_unprompted, self.num_resumed
        behind = dict(self.recomputed)
        for index, (sequence, start, tokens) in enumerate(self.chunks):
            left = behind.get(index, tokens)
            if index in behind and left < 2:
                request = sequence.request
                other.num_unprompted -= bool(self.num_unprompted) and start >= request.prompt_tokens
                other.num_resumed -= bool(self.num_resumed) and start + tokens == request.prefill_tokens
            else:
                other.chunks.append((sequence, start + tokens - left, left))
                other.num_prefill_tokens += left
        return other
