"""Refining: the decode cost of a profile, corrected by what the steps of a run themselves took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from attention.calibration.fitting import Errors, Observation, fit, halves, predict
from attention.calibration.trials import Heads
from sim.timing.profile import DecodeCost

MIN_STEPS = 4
"""Fewer steps than this refine nothing: half of them has to predict the other half."""


@dataclass(frozen=True, slots=True)
class RefinementReport:
    """How well attention's time was predicted on the sampled steps of a run.

    `before` are the errors of the profile (None where the run had none), `after` those of a refined cost on steps
    that it was not fitted to, each half of the steps by the other (None where there are too few).
    """

    steps: int
    before: Errors | None
    after: Errors | None
    cost: DecodeCost | None

    def figures(self) -> dict[str, float | int | None]:
        """The report as columns of a run's summary."""
        told: dict[str, float | int | None] = {"calibrated_steps": self.steps}
        for name, errors in (("before", self.before), ("after", self.after)):
            told[f"attention_error_{name}_median"] = errors.median if errors else None
            told[f"attention_error_{name}_max"] = errors.largest if errors else None
        return told


class Refinement:
    """Decode steps as they were predicted and measured; a better cost for the shapes of this run.

    The kernel is timed on a step's real shape (`trials.StepTimer`, one layer) and told here with that
    shape. The refined cost stays near the profile's where the steps say little, and is fitted afresh where the
    run had no profile.

    Args:
        block_size: Of the run's allocator.
        heads: Those that the kernel is timed with.
        itemsize: Bytes of a K or V value that the kernel is timed with.
        cost: The profile's decode cost, if the run has one.
    """

    def __init__(
        self, block_size: int, heads: Heads, itemsize: int = 4, cost: DecodeCost | None = None
    ) -> None:
        self.block_size = block_size
        self.heads = heads
        self.itemsize = itemsize
        self.cost = cost
        self.observations: list[Observation] = []

    def observe(self, seq_lens: Sequence[int], seconds: float) -> None:
        """A sampled step: the contexts of its decodes, the new token included, and one layer's measured time.

        A step without decodes says nothing. Raises ValueError for a time that is not above 0.
        """
        if not seq_lens:
            return
        if not seconds > 0:
            raise ValueError(f"seconds: got {seconds}, expected a time above 0")
        self.observations.append(Observation(self.amounts(seq_lens), seconds))

    def amounts(self, seq_lens: Sequence[int]) -> dict[str, float]:
        """What a decode step over these contexts adds up to, as `DecodeCost.amounts`."""
        tokens = sum(seq_lens)
        blocks = sum(-(-length // self.block_size) for length in seq_lens)
        kv_bytes = tokens * self.heads.kv_values * self.itemsize
        return DecodeCost.amounts(len(seq_lens), blocks, kv_bytes, tokens * self.heads.pair_flops)

    def predicted(self, seq_lens: Sequence[int]) -> float | None:
        """Seconds that the profile says of such a step, None without one."""
        if self.cost is None:
            return None
        return predict(asdict(self.cost), [Observation(self.amounts(seq_lens), 0.0)])[0]

    def fit(self) -> DecodeCost | None:
        """The refined cost: of all steps so far; the profile's where they are too few."""
        if len(self.observations) < MIN_STEPS:
            return self.cost
        return DecodeCost(**self._fitted()(self.observations))

    def report(self) -> RefinementReport:
        """Predicted against measured, before and after."""
        measured = [observation.seconds for observation in self.observations]
        before = after = None
        if measured and self.cost is not None:
            before = Errors.of(predict(asdict(self.cost), self.observations), measured)
        if len(measured) >= MIN_STEPS:
            after = Errors.of(halves(self.observations, self._fitted()), measured)
        return RefinementReport(len(measured), before, after, self.fit())

    def _fitted(self) -> Callable[[Sequence[Observation]], Mapping[str, float]]:
        return partial(fit, prior=asdict(self.cost) if self.cost is not None else None)
