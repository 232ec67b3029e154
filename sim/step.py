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
    """

    __slots__ = (
        "chunks", "copied_blocks", "decode_context", "num_decodes", "num_prefill_tokens", "num_resumed",
        "num_unprompted", "preempted", "rejected", "swapped_in_blocks", "swapped_out_blocks",
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
        self.preempted: list[Request] = []
        self.rejected: list[Request] = []

    @property
    def empty(self) -> bool:
        """True if nothing is computed."""
        return not self.chunks and not self.num_decodes
