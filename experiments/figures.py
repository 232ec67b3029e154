"""Figures of a run that take model, memory and timing together, beside those of its simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sim.allocators import Allocator
from sim.hardware import Model
from sim.timing import Calibrated, StepTime


def further_figures(
    figures: Mapping[str, Any], over: Allocator, model: Model | None, clock: StepTime, content_grain: int
) -> dict[str, Any]:
    """What stands behind the figures of the simulation in its summary."""
    further: dict[str, Any] = {"prefix_hits_exact": _hits_exact(over, content_grain)}
    if model is not None:
        further["kv_bytes_per_token"] = model.kv_bytes_per_token
        further["kv_bytes_saved_share"] = 1 - model.kv_bytes_per_token / model.full_kv_bytes_per_token
    if isinstance(clock, Calibrated):
        further["decode_attention_ms"] = _attention_ms(clock, figures, over)
    return further


def _hits_exact(over: Allocator, grain: int) -> bool | None:
    """Whether prefix hits are exact, not a lower bound; None where nothing is cached."""
    if not over.keeps_freed:
        return None
    return not grain or over.block_size % grain == 0


def _attention_ms(clock: Calibrated, figures: Mapping[str, Any], over: Allocator) -> float | None:
    """What attention of one token takes in the mean batch: exact, as the profile is linear in batch, context, entries.

    None where sequences share slots, as those are counted once and read by each.
    """
    batch, entries = figures["mean_running"], figures["mean_table_length"]
    if figures["blocks_saved_share"] or not batch > 0 or math.isnan(entries):
        return None
    context = figures["token_states_share"] * over.num_slots
    return float(1e3 * clock.attention_seconds(batch, context, batch * entries) / batch)
