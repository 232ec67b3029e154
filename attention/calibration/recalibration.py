"""Recalibration: a run's own decode steps, timed on the real kernel, correct the profile that the run uses."""

from __future__ import annotations

from collections.abc import Sequence

from attention.calibration.refining import Refinement
from attention.calibration.trials import Heads, StepTimer
from sim.hardware import Model
from sim.timing.base import StepTime
from sim.timing.calibrated import Calibrated

MAX_BYTES = 1 << 30
"""Steps whose K and V of one layer are larger are not timed: the memory for it is taken beside the run."""


class Recalibration:
    """Times steps on one layer of a model, and refines the calibrated timing of the run, if that is what it has.

    Raises UserError for a device that is not there.
    """

    def __init__(self, model: Model, timing: StepTime | None, block_size: int, device: str) -> None:
        heads = Heads(model.num_heads, model.num_kv_heads, model.head_dim)
        self.timing = timing if isinstance(timing, Calibrated) else None
        self.timer = StepTimer(block_size, heads, device)
        cost = self.timing.profile.decode if self.timing is not None else None
        self.refinement = Refinement(block_size, heads, self.timer.dtype.itemsize, cost)

    def observe(self, contexts: Sequence[int]) -> None:
        """A step that decodes sequences of these lengths, the new tokens included; too large a one is left out."""
        size = sum(contexts) * self.timer.heads.kv_values * self.timer.dtype.itemsize
        if contexts and size <= MAX_BYTES:
            self.refinement.observe(contexts, self.timer.seconds(contexts))
            cost = self.refinement.fit()
            if self.timing is not None and cost is not None:
                self.timing.refine(cost)

    def figures(self) -> dict[str, float | int | None]:
        """Predicted against measured, for a run's summary."""
        return self.refinement.report().figures()
