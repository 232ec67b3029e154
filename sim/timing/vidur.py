"""Step times as Vidur's predictor puts them together."""

from __future__ import annotations

import math
from pathlib import Path

from sim.hardware import Device, Model
from sim.registry import NonNegativeFloat, PositiveInt
from sim.step import Step
from sim.timing.base import StepTime, timing
from sim.timing.table import Table


@timing("vidur")
class Vidur(StepTime):
    """Operator tables, looked up as Vidur does (Agrawal et al., MLSys 2024; `sklearn_execution_time_predictor.py`).

    The tables are those of `table`. Decodes count as a batch over the whole tokens of their mean context,
    prompts as one of the rounded root of the sum of their squares; attention over several of either takes
    longer by a fixed share.

    Fields:
        tables: Folder of the three tables.
        num_layers: Layers of the model; by default those of the experiment's model.
        batching_overhead: Share that attention over more than one sequence takes longer.
    """

    def __init__(
        self,
        model: Model | None,
        device: Device | None,
        *,
        tables: Path,
        num_layers: PositiveInt | None = None,
        batching_overhead: NonNegativeFloat = 0.1,
    ) -> None:
        self.tables = Table(model, device, tables=tables, num_layers=num_layers)
        self.several = 1 + batching_overhead

    def seconds(self, step: Step) -> float:
        """Linear layers over all tokens, then attention of both kinds."""
        prefill = 0.0
        if step.chunks:
            squares = sum([tokens * (2 * start + tokens) for _, start, tokens in step.chunks])
            prefill = self.tables.prefill(round(math.sqrt(squares)))
            if len(step.chunks) > 1:
                prefill *= self.several
        return self._total(step.num_decodes, step.decode_context, step.num_prefill_tokens, prefill)

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        """One token for each sequence."""
        return self._total(num_decodes, context, 0, 0.0)

    def _total(self, num_decodes: int, context: int, prefill_tokens: int, prefill: float) -> float:
        tables = self.tables
        decode = 0.0
        if num_decodes:
            decode = tables.decode(num_decodes, context // num_decodes)
            if num_decodes > 1:
                decode *= self.several
        linear = tables.linear(num_decodes + prefill_tokens)
        return tables.per_layer * (linear + decode + prefill)
