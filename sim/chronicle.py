"""The chronicle: what the recorder is told of an engine's steps, stretches and pauses."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Ordered
from itertools import accumulate

from sim.recorder import Recorder
from sim.schedulers.base import Scheduler
from sim.step import Step
from sim.timing.base import StepTime


class Chronicle:
    """Tells the recorder of what an engine does, and keeps what changes inside a stretch until it is told.

    `arrived` are arrival times since the last plan; where block sizes differ, the timing model is told of the entries
    of all block tables too.
    """

    def __init__(self, scheduler: Scheduler, timing: StepTime, recorder: Recorder) -> None:
        self.scheduler = scheduler
        self.allocator = scheduler.allocator
        self.timing = timing
        self.recorder = recorder
        self.arrived: list[int] = []
        self.counts_entries = self.allocator.num_entries is not None
        self._joined = 0  # blocks less entries of block tables in the step in flight
        recorder.num_slots = timing.num_slots = self.allocator.num_slots

    def count_entries(self) -> None:
        """Tell the timing model of the entries of all block tables, and note them for the record."""
        allocator = self.allocator
        self.timing.num_entries = entries = allocator.num_entries
        assert entries is not None
        allocator.entry_log.clear()
        self._joined = allocator.num_held // allocator.block_size - entries

    def begin(self, duration: int) -> None:
        """Note the memory in a step or pause of this duration (ns)."""
        allocator, recorder = self.allocator, self.recorder
        external = allocator.num_external(self.scheduler.head_refused)
        recorder.usage.extend((len(recorder.durations), allocator.num_held, allocator.num_internal, external))
        recorder.durations.append(duration)

    def pause(self, start: int, end: int, running: int = 0, waiting: int = 0) -> None:
        """Note that the engine stood still from `start` to `end` (ns)."""
        allocator = self.allocator
        self.begin(end - start)
        self.recorder.stretch(
            start, 1, 0, 0, running, waiting, allocator.num_tokens, 0, allocator.blocks_saved
        )

    def stretch(self, step: Step, start: int, steps: int, tokens: int) -> None:
        """Hand a stretch to the recorder, in parts that begin where requests joined the queue."""
        scheduler = self.scheduler
        recorder = self.recorder
        arrived = self.arrived
        running = len(scheduler.running)
        waiting = len(scheduler.waiting) + len(scheduler.swapped) - len(arrived)
        decodes = step.num_decodes
        added = decodes * self.allocator.slots_per_token
        saved = self.allocator.blocks_saved
        joined = 0
        regrown: Ordered[tuple[int, int]] = ()  # blocks less entries, from a step of the stretch on
        if self.counts_entries:
            joined = self._joined + saved
            if steps > 1:
                first = scheduler.decodes.clock - steps + 1
                regrown = [
                    (tick - first, less + saved) for tick, less in self.allocator.entry_log if tick > first
                ]
        if steps > 1 and (arrived or regrown):
            starts = list(accumulate(recorder.durations[-steps:-1], initial=start))
            cuts = sorted([*((bisect_left(starts, instant), -1) for instant in arrived), *regrown])
            entry = len(recorder.durations) - steps
            begin = 0
            for index, less in cuts:
                if index == steps:
                    break
                if index > begin:
                    count = index - begin
                    recorder.stretch(
                        starts[begin], count, 0, decodes, running, waiting, tokens, added, saved, joined
                    )
                    tokens += count * added - recorder.slid(entry + begin, entry + index)
                    begin = index
                if less < 0:
                    waiting += 1
                else:
                    joined = less
            start = starts[begin]
            steps -= begin
        recorder.stretch(
            start, steps, step.num_prefill_tokens, decodes, running, waiting, tokens, added, saved, joined
        )
