"""Overlap: a decode step of a transformer beside the swap-in of sequences, one after the other or layer by layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attention.calibration.measuring import one_thread
from attention.calibration.trials import default_dtype
from attention.generation.transformer import Transformer, TransformerConfig
from attention.swap.swap_space import SwapSpace

BLOCK_SIZE = 16
LAPS = {"cpu": 7, "cuda": 15}
LAYERS_AT_ONCE = {"all layers at once": None, "layer by layer": 1}


@dataclass(frozen=True, slots=True)
class Load:
    """A model, how many sequences stay and how many come back, and how many tokens each has."""

    config: TransformerConfig
    num_staying: int
    num_coming: int
    num_tokens: int


def load_of(device: torch.device) -> Load:
    """On a GPU about as long on the link as in the step."""
    if device.type == "cpu":
        small = TransformerConfig(hidden_dim=512, num_layers=8, num_heads=8, num_kv_heads=4, ffn_dim=1024)
        return Load(small, 8, 4, 256)
    config = TransformerConfig(
        hidden_dim=2048,
        num_layers=8,
        num_heads=16,
        num_kv_heads=16,
        ffn_dim=5632,
        dtype=default_dtype(device),
    )
    return Load(config, 64, 2, 1000)


class SwapOverlap:
    """Sequences that decode, and others that come back from the host for the same step or for a later one.

    On a GPU laps are wall time up to the end of all work; on a CPU, where copies and compute share a thread, they
    are CPU time.
    """

    def __init__(self, device: torch.device, load: Load | None = None) -> None:
        self.device = device
        load = load or load_of(device)
        self.model = Transformer(load.config, device)
        laps = LAPS[device.type] * 8
        each = -(-(load.num_tokens + laps) // BLOCK_SIZE)
        self.kv = self.model.paged_kv((load.num_staying + load.num_coming) * each, BLOCK_SIZE)
        self.staying = [self.kv.new() for _ in range(load.num_staying)]
        self.coming = [self.kv.new() for _ in range(load.num_coming)]
        everyone = [*self.staying, *self.coming]
        self.kv.extend(
            everyone, [load.num_tokens] * len(everyone)
        )  # what K and V hold does not matter to the time
        self.spaces = {
            name: SwapSpace(self.kv.cache, load.num_coming * each, layers_per_copy=layers)
            for name, layers in LAYERS_AT_ONCE.items()
        }
        self.num_bytes = 0

    def seconds(self) -> dict[str, float]:
        """Median seconds of each way, taken in turn."""
        whole = self.spaces["all layers at once"]
        ways: dict[str, tuple[SwapSpace, Callable[[SwapSpace], None]]] = {
            "step of those that stay": (whole, lambda _: self._step(self.staying)),
            "swap-in alone": (whole, self._arrive),
            "swap-in, then a step of all": (whole, self._blocking),
            "all layers at once, step of all": (whole, self._beside),
            "layer by layer, step of all": (self.spaces["layer by layer"], self._beside),
            "prefetch, step of those that stay": (self.spaces["layer by layer"], self._prefetch),
        }
        laps: dict[str, list[float]] = {name: [] for name in ways}
        with one_thread():
            for _ in range(LAPS[self.device.type]):
                for name, (space, way) in ways.items():
                    laps[name].append(self._lap(space, way))
        return {name: statistics.median(each[1:]) for name, each in laps.items()}

    def _lap(self, space: SwapSpace, way: Callable[[SwapSpace], None]) -> float:
        space.swap_out(self.coming)
        space.synchronize()
        start = self._now()
        way(space)
        if self.device.type == "cuda" and way != self._prefetch:
            torch.cuda.synchronize(self.device)
        elif self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        taken = self._now() - start
        if space.seq_ids:
            space.swap_in(self.coming)
        space.synchronize()
        return taken

    def _now(self) -> float:
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def _step(self, seq_ids: Sequence[int]) -> None:
        metadata = self.kv.extend(seq_ids, [1] * len(seq_ids))
        self.model(torch.zeros_like(metadata.positions), metadata.positions, self.kv, metadata)

    def _arrive(self, space: SwapSpace) -> None:
        self.num_bytes = space.swap_in(self.coming).num_bytes
        space.synchronize()

    def _blocking(self, space: SwapSpace) -> None:
        self._arrive(space)
        self._step([*self.staying, *self.coming])

    def _beside(self, space: SwapSpace) -> None:
        space.swap_in(self.coming)
        self._step([*self.staying, *self.coming])

    def _prefetch(self, space: SwapSpace) -> None:
        space.swap_in(self.coming)
        self._step(self.staying)
