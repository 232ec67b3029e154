"""The attention probe: on sampled steps, real paged attention through the simulator's own block tables."""

from __future__ import annotations

import random
import re
import time as clock
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sim.allocators.base import Allocator
from sim.audit.audit import Audit
from sim.audit.grouped_ledger import GroupedLedger
from sim.errors import ProbeError, UserError
from sim.hardware import Model
from sim.identity import Ints
from sim.registry import PositiveFloat, PositiveInt
from sim.request import Sequence
from sim.tiers.tier import Journey
from sim.timing.base import StepTime

if TYPE_CHECKING:
    from attention.calibration.recalibration import Recalibration
    from attention.comparison import Comparison, Window

MAX_SEQUENCES = 4
MAX_TOKENS = 256
LAYERS = 8
"""Samples that attention runs on together, each in a layer of the cache of its own."""

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

ROUNDING = 1e-4
"""Share of a bound that floating point may add to the error of an element."""


class AttentionProbe:
    """Sampled steps that prove the block tables right: every slot by an audit, some with real attention.

    After the audit of every slot of every sequence, paged attention runs over a few sequences drawn anew each
    time, at most 256 tokens in all: through the real block tables, over a cache that holds what the ledger
    says, against plain attention over what the sequences' histories say. torch is imported for the first of
    them, not before. Its first parameters are the number of requests, None if nobody knows it, and the run's model
    and timing.

    Fields:
        samples: Sampled steps at most, spread over the run; the first eight steps are always among them.
        every: Sample every so many steps instead.
        share: Share of the run's CPU time that samples may take, so that short runs have fewer of them.
        device: Where torch runs: auto, cpu, cuda, ...
        tolerance: Largest difference from plain attention.
        values: The Q, K and V of tokens: a fixed random table, or the rows that the core's own transformer, whose
            weights are random, has in its cache. Errors of quantised K and V are those of such values.
        calibrate: Time attention on the real shapes of sampled steps, correct a calibrated timing by it, and
            report predicted against measured; such a run cannot be repeated to the bit.
    """

    def __init__(
        self,
        num_requests: int | None = None,
        model: Model | None = None,
        timing: StepTime | None = None,
        *,
        samples: PositiveInt = 64,
        every: PositiveInt | None = None,
        share: PositiveFloat = 0.05,
        device: str = "auto",
        tolerance: PositiveFloat = 1e-5,
        values: Literal["random", "model"] = "random",
        calibrate: bool = False,
    ) -> None:
        if calibrate and model is None:
            raise UserError("calibrate needs a model, as attention is timed with its heads")
        self.audit = Audit(samples=samples, every=every, num_requests=num_requests, share=share)
        self.device = device
        self.tolerance = tolerance
        self.values = values
        self.next_sample = self.audit.next_sample
        self.max_error: float | None = None
        self._sampling_s = 0.0
        self._random = random.Random(0)
        self._comparison: Comparison | None = None
        self._windows: list[tuple[str, Window]] = []  # of samples that attention has not run on yet
        self._layer = 0  # the number of those samples
        self._model = model if calibrate else None
        self._timing = timing
        self._recalibration: Recalibration | None = None

    @classmethod
    def check(cls, config: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """Fields of an experiment that have no meaning, each with the reason."""
        fields = config["probe"]
        if not isinstance(fields, dict):
            return
        device = fields.get("device", "auto")
        if not DEVICE.fullmatch(device):
            yield (
                "probe.device",
                f"not a device: got {device!r}, expected auto, cpu, or a GPU as cuda or cuda:1",
            )

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the samples and of what the ledger was told between them."""
        return self._sampling_s + self.audit.telling_s

    @property
    def num_samples(self) -> int:
        """Steps looked at so far."""
        return self.audit.num_samples

    def start(self, allocator: Allocator) -> None:
        """Open the ledger."""
        self.audit.start(allocator)
        if self.audit.ledger.on_event is not None:
            self.audit.ledger.on_event = self._hurry

    def _hurry(self) -> None:
        self.next_sample = 0

    def sample(self, step: int, time: int, sequences: Ordered[Sequence]) -> None:
        """The audit, then attention, which waits for a few samples to come together where samples are rare.

        Raises ProbeError with the first thing that is wrong.
        """
        begin = clock.process_time()
        self.audit.sample(step, time, sequences)
        self._draw(step)
        if self.audit.steps.every is not None or self._layer == LAYERS:
            self._attend()
        if self._model is not None:
            self._measure(self._model, sequences)
        self.next_sample = self.audit.next_sample
        self._sampling_s += clock.process_time() - begin

    def finish(self) -> None:
        """Attention over what is left, and the audit's last checks."""
        begin = clock.process_time()
        self._attend()
        self.audit.finish()
        self._sampling_s += clock.process_time() - begin

    @property
    def figures(self) -> dict[str, float | int | None]:
        """What the samples came to, for the summary of the run."""
        told: dict[str, float | int | None] = {
            "probe_steps": self.num_samples,
            "probe_max_error": self.max_error,
        }
        if self._comparison is not None and self._comparison.elements is not None:
            told["quantization_max_error"] = self._comparison.distance
            told["quantization_value_error"] = self._comparison.elements.max_error
            told["quantization_bound_share"] = self._comparison.elements.share
        return told | (self._recalibration.figures() if self._recalibration is not None else {})

    def _measure(self, model: Model, sequences: Ordered[Sequence]) -> None:
        """Time attention over the sequences that decode in this step."""
        if self._recalibration is None:
            from attention.calibration.recalibration import Recalibration

            block_size = self.audit.ledger.device.block_size
            self._recalibration = Recalibration(model, self._timing, block_size, self.device)
        self._recalibration.observe(
            [sequence.num_tokens for sequence in sequences if sequence.decodes is not None]
        )

    def _draw(self, step: int) -> None:
        """Note windows of a few of the sequences that the audit looked at, as they are now."""
        live = self.audit.looked_at
        if not live:
            return
        block_size = self.audit.ledger.device.block_size
        most, tokens = (
            (MAX_SEQUENCES, MAX_TOKENS) if self.audit.thorough else (MAX_SEQUENCES // 2, MAX_TOKENS // 2)
        )
        number = max(1, min(most, len(live), tokens // block_size))
        for sequence in self._random.sample(live, number):
            self._windows.append((f"step {step}: {sequence}", self._window(sequence, tokens // number)))
        self._layer += 1

    def _attend(self) -> None:
        """Attention over the windows noted."""
        if not self._windows:
            return
        windows = [window for _, window in self._windows]
        for (where, window), error in zip(self._windows, self._errors(windows), strict=True):
            if not error <= self.tolerance:
                raise ProbeError(
                    f"{where}, {len(window.wanted)} tokens in blocks {window.blocks.tolist()}: "
                    f"paged attention differs from plain attention by {error:g}, expected at most {self.tolerance:g}"
                )
            self.max_error = max(self.max_error or 0.0, error)
        self._windows.clear()
        self._layer = 0

    def _window(self, sequence: Sequence, limit: int) -> Window:
        """At most `limit` tokens of the sequence, from the start of a block drawn at random."""
        from attention.comparison import Window

        ledger = self.audit.ledger
        if isinstance(ledger, GroupedLedger):
            blocks, found, wanted, sliding = ledger.piece(sequence, limit, self._random)
            flags = None if ledger.precision is None else (ledger.device.quantized[blocks], len(wanted))
            return Window(blocks, found, wanted, self._layer, sliding, flags, self._journeys(blocks))
        size = ledger.device.block_size
        tokens = sequence.num_tokens
        width = max(1, limit // size)
        first = self._random.randrange(max(1, -(-tokens // size) - width + 1))
        begin, end = first * size, min(tokens, first * size + min(limit, width * size))
        if sequence.block_table and ledger.allocator.pools:
            blocks = np.array(sequence.block_table[first : -(-end // size)], np.int64)
        else:
            blocks = ledger.allocator.slots(sequence)[begin:end:size] // size
        found, wanted = ledger.device.rows[blocks], ledger.contents(sequence)[begin:end]
        quantized = None
        if ledger.allocator.kv_cache_dtype is not None:
            quantized = ledger.device.quantized[blocks], len(wanted)
        elif ledger.allocator.quantization is not None:
            quantized = ledger.device.quantized[blocks], ledger.live[sequence].quantized - begin
        return Window(blocks, found, wanted, self._layer, None, quantized, self._journeys(blocks))

    def _journeys(self, blocks: Ints) -> list[Journey | None]:
        """How each of these blocks came from the tiers behind the device, if any did."""
        ledger = self.audit.ledger
        return [ledger.journey(block) for block in blocks.tolist()] if ledger.loaded else []

    def _errors(self, windows: list[Window]) -> list[float]:
        if self._comparison is None:
            from attention.comparison import Comparison

            ledger = self.audit.ledger
            self._comparison = Comparison(
                LAYERS,
                *ledger.device.rows.shape,
                self.device,
                ledger.precision,
                ledger.allocator.longest_run,
                self.values,
            )
            elements = self._comparison.elements
            if elements is not None and not elements.share <= 1 + ROUNDING:
                raise ProbeError(
                    f"K and V after a round trip through {ledger.precision}: an element is off by {elements.share:.3g} "
                    f"times its bound (errors up to {elements.max_error:g}, bounds up to {elements.max_bound:g}), "
                    "expected at most once"
                )
        return self._comparison.errors(windows)
