"""A comparison: paged attention through real block tables, against plain attention on the histories."""

from __future__ import annotations

import math
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention.functional import paged_attention, write
from attention.plain import plain_attention
from attention.rows import HEAD_DIM, NUM_KV_HEADS, NUM_ROWS, ROWS
from attention.runs import longest_run
from attention.swap.quantization import Quantization, QuantizationError
from attention.swap.swapping import swap_in, swap_out
from sim.errors import UserError
from sim.identity import UNWRITTEN, Ints
from sim.tiers.tier import Journey


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a sequence that begins with a block.

    `blocks` [num_blocks] are entries of the block table, `found` [num_blocks, block_size] the identities that
    the ledger has in them, `wanted` [num_tokens] those of the sequence's history. Windows that were seen at the
    same time have the same `layer`. With `sliding` the last token sees so many of them only. Where the cache or swaps
    are quantised, `quantized` says of which slots the ledger knows that they hold less precise K and V,
    [num_blocks, block_size], and how many of the tokens at the beginning are expected to be so. Blocks that came from
    tiers behind the device have their `journeys`, [num_blocks] if there are any: their K and V go the same way.
    """

    blocks: Ints
    found: Ints
    wanted: Ints
    layer: int = 0
    sliding: int | None = None
    quantized: tuple[NDArray[np.bool_], int] | None = None
    journeys: Ordered[Journey | None] = ()


class Comparison:
    """Paged caches as large as the simulated one, in small heads, and what they are compared with.

    The caches of all layers are one piece, so that windows of several layers are attended to at once: block b of
    layer l is block l * num_blocks + b.

    The K and V of a token are rows of a fixed table (`values`: `random`, or those that a `model` computes), looked up
    by the token's identity; a slot that is unwritten holds no numbers. Attention runs in float32, what it is compared
    with in float64.

    Where tables are made of runs of blocks, of `longest_run` at most, attention is told so (`run_blocks`).

    Where the cache or swaps are quantised, quantised tokens have the K and V that a round trip leaves of theirs, on
    both sides of the comparison; `distance` is the largest difference from attention over what they were before, None
    where no window has such tokens. `elements` is the error of single K and V, with its bound.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        device: str = "auto",
        quantization: str | None = None,
        longest_run: int = 1,
        values: str = "random",
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._num_blocks = num_blocks
        self._longest_run = longest_run
        shape = (num_layers * num_blocks, block_size, NUM_KV_HEADS, HEAD_DIM)
        try:
            self.device = torch.device(device)
            # numpy's zeros take no memory until they are written
            self.k_cache = torch.from_numpy(np.zeros(shape, np.float32)).to(self.device)
            self.v_cache = torch.from_numpy(np.zeros(shape, np.float32)).to(self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"probe.device: got {device!r}, expected auto or a device of torch: {reason}"
            ) from None
        self._q, self._k, self._v = ROWS[values]()
        self.distance: float | None = None
        self.elements: QuantizationError | None = None
        if quantization is not None:  # rows as they are, then rows after a round trip
            trip = Quantization.named(quantization)
            self.elements = trip.measure(torch.cat([self._k, self._v]))
            self._k, self._v = (
                torch.cat([row, trip.dequantize(trip.quantize(row), HEAD_DIM, row.dtype)])
                for row in (self._k, self._v)
            )

    def errors(self, windows: Ordered[Window]) -> list[float]:
        """The largest difference in each window, for the query of its last token; not a number if it reads none."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so little is computed here that more of them would only wait for work
        try:
            return self._errors(windows)
        finally:
            torch.set_num_threads(threads)

    def _errors(self, windows: Ordered[Window]) -> list[float]:
        tables_of = [window.blocks + window.layer * self._num_blocks for window in windows]
        self._fill(windows, tables_of)
        tables = np.full((len(windows), max(map(len, tables_of))), -1)
        for index, blocks in enumerate(tables_of):
            tables[index, : len(blocks)] = blocks
        whole = [torch.from_numpy(window.wanted % NUM_ROWS) for window in windows]
        rows = [
            row
            if window.quantized is None
            else row + NUM_ROWS * (torch.arange(len(row)) < window.quantized[1])
            for row, window in zip(whole, windows, strict=True)
        ]
        queries = torch.stack([self._q[row[-1]] for row in whole])
        lengths = torch.tensor([len(row) for row in rows])
        out = torch.empty_like(queries)
        kinds = [
            (window.sliding, self._run(table, length))
            for window, table, length in zip(windows, tables, lengths, strict=True)
        ]
        for sliding, run in set(kinds):
            of = torch.tensor([index for index, kind in enumerate(kinds) if kind == (sliding, run)])
            out[of] = paged_attention(
                queries[of].to(self.device),
                self.k_cache,
                self.v_cache,
                torch.from_numpy(tables)[of].to(self.device),
                lengths[of].to(self.device),
                sliding_window=sliding,
                run_blocks=run,
            ).cpu()
        scale = 1 / math.sqrt(HEAD_DIM)
        errors = []
        for got, query, row, window in zip(out, queries, rows, windows, strict=True):
            row = row[-(window.sliding or len(row)) :]
            plain, _ = plain_attention(
                query[None].double(), self._k[row].double(), self._v[row].double(), scale
            )
            errors.append(float((got - plain[0]).abs().max()))
        for window, got, query, row in zip(windows, out, queries, whole, strict=True):
            if window.quantized is not None and window.quantized[1] > 0:
                row = row[-(window.sliding or len(row)) :]
                plain, _ = plain_attention(
                    query[None].double(), self._k[row].double(), self._v[row].double(), scale
                )
                self.distance = max(self.distance or 0.0, float((got - plain[0]).abs().max()))
        return errors

    def _run(self, table: Ints, length: Tensor) -> int:
        """Of how many blocks the aligned runs of a table are."""
        if self._longest_run == 1:
            return 1
        return longest_run(torch.from_numpy(table)[None], length[None], self.k_cache, self._longest_run)

    def _fill(self, windows: Ordered[Window], tables: list[Ints]) -> None:
        """Put into the cache what the ledger has in the windows' blocks, those that they share once."""
        blocks, first = np.unique(np.concatenate(tables), return_index=True)
        found = torch.from_numpy(np.concatenate([window.found for window in windows])[first].reshape(-1))
        block_size = self.k_cache.shape[1]
        slots = torch.from_numpy((blocks[:, None] * block_size + np.arange(block_size)).reshape(-1))
        empty = (found == UNWRITTEN)[:, None, None]
        rows = found % NUM_ROWS
        if windows[0].quantized is not None:
            flags = np.concatenate(
                [window.quantized[0] for window in windows if window.quantized is not None]
            )
            rows = rows + NUM_ROWS * torch.from_numpy(flags[first].reshape(-1))
        k = self._k[rows].masked_fill(empty, math.nan).to(self.device)
        v = self._v[rows].masked_fill(empty, math.nan).to(self.device)
        write(k, v, self.k_cache, self.v_cache, slots.to(self.device), check=False)
        for window, table in zip(windows, tables, strict=True):
            for block, journey in zip(table.tolist(), window.journeys, strict=False):
                if journey is not None:
                    self._travel(journey, block, window.layer * self._num_blocks)

    def _travel(self, journey: Journey, end: int, first: int) -> None:
        """Move a block's K and V from where they were computed through every tier to where the table has them.

        Tiers behind the device are in host memory here, one block each. `first` is the first block of the layer; what
        is in the block where the journey begins is put back.
        """
        (_, begin), *stops, (_, target) = journey.places
        assert first + target == end, "a journey ends in another block"
        caches = [self.k_cache, self.v_cache]
        start = first + begin
        before = [cache[start].clone() for cache in caches]
        for cache in caches:
            cache[end] = math.nan
        rows = torch.from_numpy(journey.row % NUM_ROWS + NUM_ROWS * journey.quantized)
        empty = torch.from_numpy(journey.row == UNWRITTEN)
        for cache, values in zip(caches, (self._k, self._v), strict=True):
            cache[start] = values[rows].masked_fill(empty[:, None, None], math.nan).to(self.device)
        kept = [torch.zeros(1, *cache.shape[1:]) for cache in caches]
        swap_out(caches, kept, torch.tensor([[start, 0]]))
        for cache, values in zip(caches, before, strict=True):
            if start != end:
                cache[start] = values
        for _ in stops[1:]:
            kept = [values.clone() for values in kept]
        swap_in(caches, kept, torch.tensor([[0, end]]))
