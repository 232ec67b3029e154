"""Decoding: whole generations of a batch of requests over a KV cache, with forks, copies on write and kills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attention.generation.kv import KV
from attention.generation.search import Choice, DecodingRequest, Output, Search
from attention.generation.transformer import Transformer

BetweenSteps = Callable[[int, Any], Mapping[int, int] | None]
"""Called with the steps computed so far and the cache, before the next one; see `decode`."""


@dataclass(slots=True)
class Sharing:
    """What sharing blocks came to. Blocks are counted in every step, after it took its own.

    `logical_blocks` would be held if none were shared, `physical_blocks` are. `copied_tokens` counts slots of
    blocks copied on write (of whole histories, where a fork is a clone), `kills` branches that died while others
    of their request went on or had an output.
    """

    logical_blocks: list[int] = field(default_factory=list)
    physical_blocks: list[int] = field(default_factory=list)
    copied_tokens: int = 0
    forks: int = 0
    kills: int = 0

    @property
    def saved_share(self) -> float:
        """Blocks saved over blocks without sharing, both summed over the steps (SOSP 2023, figure 15)."""
        logical = sum(self.logical_blocks)
        return (logical - sum(self.physical_blocks)) / logical if logical else 0.0

    @property
    def peak_saved_share(self) -> float:
        """The largest share of blocks that sharing saved in one step."""
        steps = zip(self.logical_blocks, self.physical_blocks, strict=True)
        return max(((logical - physical) / logical for logical, physical in steps), default=0.0)

    @property
    def peak_saved_blocks(self) -> int:
        """The largest number of blocks that sharing saved in one step."""
        steps = zip(self.logical_blocks, self.physical_blocks, strict=True)
        return max((logical - physical for logical, physical in steps), default=0)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Outputs of each request in the order of the batch, what sharing came to, and the searches behind it."""

    outputs: list[list[Output]]
    sharing: Sharing
    searches: list[Search]


def decode(
    model: Transformer,
    kv: KV,
    requests: Sequence[DecodingRequest],
    *,
    between_steps: BetweenSteps | None = None,
    keep_decisions: bool = False,
) -> Decoded:
    """Generate for all requests at once: the prompts in one ragged step, then every branch one token a step.

    Args:
        model: Computes logits.
        kv: Keeps K and V of the model's layers. Sequences that it holds already are left alone.
        requests: Prompts, each with its way of decoding.
        between_steps: Called as `between_steps(step, kv.cache)` before every step but the first. It may swap
            sequences out and in again, or drop them: it returns the new name of every sequence that it replaced,
            if any. Tokens that a new sequence does not have are computed again in the next step.
        keep_decisions: Keep what `agreement.compare` needs of each step.

    Raises OutOfBlocks when the cache has too few blocks; everything that was taken is free again then.
    """
    decoding = Decoding(model, kv, requests, keep_decisions=keep_decisions)
    try:
        while decoding.live:
            if decoding.steps and between_steps is not None:
                decoding.rename(between_steps(decoding.steps, kv.cache) or {})
            decoding.step()
    finally:
        decoding.close()
    return Decoded(
        [list(search.outputs()) for search in decoding.searches], decoding.sharing, decoding.searches
    )


@dataclass(slots=True)
class Branch:
    """A live continuation: its sequence in the cache, and its tokens from the prompt on.

    The cache lacks the last token at least, as it is computed with the next step.
    """

    seq_id: int
    tokens: list[int]


class Decoding:
    """A batch of requests on its way. `live` holds the branches of each request that is not done, by its index."""

    def __init__(
        self, model: Transformer, kv: KV, requests: Sequence[DecodingRequest], *, keep_decisions: bool = False
    ) -> None:
        for request in requests:
            _check_prompt(request, model.config.vocab_size)
        self.model = model
        self.kv = kv
        self.searches = [request.method.start(request, keep_decisions) for request in requests]
        self.live = {
            index: [Branch(kv.new(), list(request.prompt))] for index, request in enumerate(requests)
        }
        self.sharing = Sharing()
        self.steps = 0

    def branches(self) -> Iterator[Branch]:
        """All live branches, in the order of the batch's rows."""
        for branches in self.live.values():
            yield from branches

    def step(self) -> None:
        """Compute every token that the cache lacks, and let each request choose how it goes on."""
        logits = self._compute(list(self.branches()))
        first = 0
        for index, branches in list(self.live.items()):
            choice = self.searches[index].choose(logits[first : first + len(branches)])
            first += len(branches)
            self.live[index] = self._branch(branches, choice)
            if not choice.live:
                del self.live[index]
        self.steps += 1

    def _compute(self, rows: list[Branch]) -> Tensor:
        """Logits `[num_branches, vocab_size]` behind the last token of each branch."""
        kv, device = self.kv, self.kv.device
        seq_ids = [branch.seq_id for branch in rows]
        known = [kv.length(seq_id) for seq_id in seq_ids]
        missing = [len(branch.tokens) - length for branch, length in zip(rows, known, strict=True)]
        copied = kv.copied_tokens
        metadata = kv.extend(seq_ids, missing)
        self.sharing.copied_tokens += kv.copied_tokens - copied
        logical, physical = kv.blocks(seq_ids)
        self.sharing.logical_blocks.append(logical)
        self.sharing.physical_blocks.append(physical)
        pairs = list(zip(rows, known, strict=True))
        tokens = [token for branch, length in pairs for token in branch.tokens[length:]]
        positions = [place for branch, length in pairs for place in range(length, len(branch.tokens))]
        logits: Tensor = self.model(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), kv, metadata
        )
        return logits[torch.tensor(missing, device=device).cumsum(0) - 1]

    def _branch(self, parents: list[Branch], choice: Choice) -> list[Branch]:
        """The branches that a choice leaves: a parent's first child goes on in its place, others are forks."""
        copied = self.kv.copied_tokens
        inherited: set[int] = set()
        children = []
        for row, token in choice.live:
            parent = parents[row]
            seq_id = parent.seq_id
            if row in inherited:
                seq_id = self.kv.fork(seq_id)
                self.sharing.forks += 1
            inherited.add(row)
            children.append(Branch(seq_id, [*parent.tokens, token]))
        for row, parent in enumerate(parents):
            if row not in inherited:
                self.kv.free(parent.seq_id)
                self.sharing.kills += row not in choice.finished
        self.sharing.copied_tokens += self.kv.copied_tokens - copied
        return children

    def rename(self, names: Mapping[int, int]) -> None:
        """Go on in other sequences: old name to new. Raises ValueError for names that are not live."""
        held = {branch.seq_id for branch in self.branches()}
        if unknown := names.keys() - held:
            raise ValueError(
                f"between_steps: got {sorted(unknown)} replaced, expected some of {sorted(held)}"
            )
        for branch in self.branches():
            branch.seq_id = names.get(branch.seq_id, branch.seq_id)

    def close(self) -> None:
        """Free every sequence that is live still."""
        for branch in self.branches():
            self.kv.free(branch.seq_id)
        self.live = {}


def _check_prompt(request: DecodingRequest, vocab_size: int) -> None:
    for token in request.prompt:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"prompt of request {request.request_id}: got token {token}, expected 0 to {vocab_size - 1}"
            )
