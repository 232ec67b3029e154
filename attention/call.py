"""A call of paged attention: checked tensors and host integers, as every implementation gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What `paged_attention` was asked for, checked.

    `max_query_len` and `max_seq_len` are upper bounds that need no look at the device; `query_start_loc` is None
    where every sequence has one query token.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None
    max_query_len: int
    max_seq_len: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    num_splits: int | None
    return_lse: bool

    def rows(self) -> Iterator[tuple[int, int, int, int]]:
        """(sequence, first row of q, row behind its last, sequence length) of those that have both.

        Looks at the values, which waits for the device.
        """
        lengths = self.seq_lens.tolist()
        starts = list(range(len(lengths) + 1))
        if self.query_start_loc is not None:
            starts = self.query_start_loc.tolist()
        for index, length in enumerate(lengths):
            if length and starts[index] < starts[index + 1]:
                yield index, starts[index], starts[index + 1], length


Implementation = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]
"""(out, lse) as `paged_attention` returns them; lse may be None where it was not asked for."""
