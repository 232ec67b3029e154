"""What a step's attention needs beside K and V: tables, lengths and slots as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention.in_flight import Fence


@dataclass(slots=True)
class CachedSequence:
    """A sequence in a cache: its block table, and how many tokens it has."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """What one step's attention needs beside K and V: built once, shared by all layers (vLLM's name and fields).

    `query_start_loc` `[num_seqs + 1]`, `slot_mapping` `[num_tokens]`, `block_tables` `[num_seqs, max_blocks]`,
    `seq_lens` `[num_seqs]`, `positions` `[num_tokens]`, the place of each token in its sequence; all int64, on
    the cache's device. On the host, `query_lens` are the tokens of each sequence, and `copied_blocks` counts the
    blocks that were copied before they are written, and `fences` are copies in flight that a layer waits for.
    """

    query_start_loc: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    positions: Tensor
    query_lens: tuple[int, ...]
    max_query_len: int
    max_seq_len: int
    copied_blocks: int
    fences: tuple[Fence, ...] = ()

    def wait(self, layer: int) -> None:
        """Compute started from now on waits for the copies of this layer's blocks that the step reads or writes."""
        for fence in self.fences:
            fence.wait(layer)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `paged_attention` that come from here."""
        decode = all(length == 1 for length in self.query_lens)
        return {
            "block_tables": self.block_tables,
            "seq_lens": self.seq_lens,
            "query_start_loc": None if decode else self.query_start_loc,
            "max_query_len": self.max_query_len,
            "max_seq_len": self.max_seq_len,
        }

    @classmethod
    def of(
        cls,
        sequences: Sequence[CachedSequence],
        counts: Sequence[int],
        block_size: int,
        device: torch.device | str,
        copied_blocks: int = 0,
        fences: tuple[Fence, ...] = (),
    ) -> AttentionMetadata:
        """That of sequences whose last `counts` tokens are new; their block tables have room for these already."""
        widest = max([len(sequence.blocks) for sequence in sequences], default=0)
        tables = np.zeros((len(sequences), widest), np.int64)
        positions = [np.zeros(0, np.int64)]
        slots = [np.zeros(0, np.int64)]
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            tables[row, : len(sequence.blocks)] = sequence.blocks
            places = np.arange(sequence.length - count, sequence.length)
            positions.append(places)
            slots.append(tables[row, places // block_size] * block_size + places % block_size)
        lengths = [sequence.length for sequence in sequences]
        return cls(
            query_start_loc=torch.from_numpy(np.cumsum([0, *counts])).to(device),
            slot_mapping=torch.from_numpy(np.concatenate(slots)).to(device),
            block_tables=torch.from_numpy(tables).to(device),
            seq_lens=torch.tensor(lengths, dtype=torch.int64, device=device),
            positions=torch.from_numpy(np.concatenate(positions)).to(device),
            query_lens=tuple(counts),
            max_query_len=max(counts, default=0),
            max_seq_len=max(lengths, default=0),
            copied_blocks=copied_blocks,
            fences=fences,
        )
