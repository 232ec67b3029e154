"""The engine: a SimPy process that plans a step, sleeps while it runs, and commits it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy
from simpy.events import EventPriority

from sim.beams import BeamSearch, fork
from sim.chronicle import Chronicle
from sim.decode_set import arrival_order
from sim.livelock import Livelock, standstill
from sim.probe import Probe
from sim.recorder import Recorder
from sim.request import NEVER, Request, Sequence
from sim.schedulers.base import Scheduler
from sim.step import Step
from sim.step_clock import StepClock
from sim.stretch import commit_ahead, commit_through
from sim.timing.base import StepTime
from sim.timing.transfers import Transfers
from sim.units import FOREVER

AFTER_ARRIVALS = EventPriority(2)
"""SimPy priority of the end of a step: what arrives at that instant is there when the next step is planned."""


class Engine:
    """One replica: plan, sleep, commit, as long as there is work.

    Where nothing can change between steps, a whole stretch of them is slept through and committed at once:
    no sequence finishes in it, no request arrives that could be admitted, and free memory covers all growth.
    The result is the same to the last bit as with one step at a time. While nothing else is due on the
    calendar before a step ends, the engine goes on without a detour over it.
    """

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: Scheduler,
        timing: StepTime,
        transfers: Transfers,
        recorder: Recorder,
        *,
        max_model_len: int,
        beams: BeamSearch | None = None,
        probe: Probe | None = None,
        on_done: Callable[[Request], None] | None = None,
    ) -> None:
        self.env = env
        self.scheduler = scheduler
        self.allocator = scheduler.allocator
        self.timing = timing
        self.link = self.allocator.link
        self.tiers = self.allocator.tiers
        self.clock = StepClock(timing, transfers, scheduler.recovery, self.link, self.tiers)
        self.recorder = recorder
        self.max_model_len = max_model_len
        self.beams = beams
        self.probe = probe
        self.on_done = on_done
        self.now = 0  # ahead of env.now where nothing else was due in between
        self.next_arrival = FOREVER  # kept by the source of requests
        self.num_steps = 0
        self.num_live = 0
        self._idle: simpy.Event | None = None
        self._chronicle = Chronicle(scheduler, timing, recorder)
        self._arrived = self._chronicle.arrived
        self._recorded = False  # the steps in flight are in the recorder already
        self._num_prefills = 0  # computed to their ends, with a token each
        self._livelock = Livelock(scheduler)
        if probe is not None:
            probe.start(self.allocator)
        self.process = env.process(self._run())

    def submit(self, request: Request, now: int) -> None:
        """Take a request in at this instant (ns); one that the model's length cannot serve is refused at once."""
        request.arrival_time = now
        self.recorder.last_arrival = now
        self.num_live += 1
        if request.prompt_tokens > self.max_model_len:
            request.status = "rejected"
            request.reason = (
                f"prompt of {request.prompt_tokens} tokens exceeds max_model_len {self.max_model_len}"
            )
            self._done(request)
            return
        room = self.max_model_len - request.prompt_tokens
        if request.output_tokens > room:
            request.output_tokens = room or 1
        self.scheduler.add(request)
        if self._idle is not None:
            self._idle.succeed()
            self._idle = None
        else:
            self._arrived.append(now)

    def _run(self) -> Generator[simpy.Event, Any, None]:
        env = self.env
        while True:
            step = self._plan()
            start = self.now
            if step is None:
                self._idle = simpy.Event(env)
                yield self._idle
                self.now = int(env.now)
                if self.now > start:
                    self.record_pause(start)
                continue
            if step.empty:
                yield from self._await_copies(start)
                continue
            tokens = self.allocator.num_tokens
            end, steps = self._begin(step, start)
            if env.peek() <= end:
                yield self._until(end)
            self.now = end
            if not self._recorded:
                self._chronicle.stretch(step, start, steps, tokens)
            self._recorded = False
            self._commit(step, end)
            self.num_steps += steps

    def _until(self, end: int) -> simpy.Event:
        """An event at this instant (ns), behind what arrives then."""
        pause = simpy.Event(self.env)
        pause._ok, pause._value = True, None
        self.env.schedule(pause, AFTER_ARRIVALS, end - self.env.now)
        return pause

    def _await_copies(self, start: int) -> Generator[simpy.Event, Any, None]:
        """Nobody can run before a copy in flight ends, or a request arrives."""
        scheduler = self.scheduler
        running, waiting = len(scheduler.running), scheduler.num_waiting
        end = min(self.allocator.next_landing, self.next_arrival)
        if self.env.peek() <= end:
            yield self._until(end)
        self.now = end
        if running or waiting:
            self.clock.stall_time += end - start
        self._chronicle.pause(start, end, running, waiting)

    def record_pause(self, start: int) -> None:
        """Note that the engine has had nothing to do since `start`."""
        self._chronicle.pause(start, self.now)

    def _plan(self) -> Step | None:
        """The next step that computes something, an empty one to wait for copies, None if there is nothing to do."""
        scheduler = self.scheduler
        link = self.link
        arrived = self._arrived
        moved = 0  # blocks swapped out by plans without tokens: the next step pays for them
        if link is not None:
            link.now, link.awaited = self.now, 0
            self.allocator.land(self.now)
        if self.tiers is not None:
            self.tiers.begin(self.now)
        patience = (
            self.num_live + 1
        )  # a plan without tokens rejects somebody, or preempts who is not back yet
        while patience:
            if arrived:
                arrived.clear()
            step = scheduler.next_step(self.now)
            if step.rejected:
                for request in step.rejected:
                    self._done(request)
            else:
                patience -= 1
            if step.preempted:
                self.clock.preemptions += len(step.preempted)
                self._livelock.watch(step.preempted, self._num_prefills, self.num_live, self.now)
            if step.chunks or step.num_decodes:
                step.swapped_out_blocks += moved
                return step
            moved += step.swapped_out_blocks
            if link is not None:
                self.clock.copied_blocks += step.copied_blocks
            if not step.rejected and not step.preempted:
                busy = scheduler.num_waiting or scheduler.running
                flying = link is not None and self.allocator.next_landing < FOREVER
                if busy and not flying:
                    break
                self.clock.swapped_out_blocks += moved
                return step if flying else None
        raise standstill(scheduler, self.now)

    def _begin(self, step: Step, start: int) -> tuple[int, int]:
        """Note the step, and as many after it as can be foreseen; (end of the last, their number)."""
        scheduler = self.scheduler
        allocator = self.allocator
        recorder = self.recorder
        if self._chronicle.counts_entries:
            self._chronicle.count_entries()
        duration = self.clock.duration(step, start)
        self._chronicle.begin(duration)
        if self.probe is not None and self.num_steps >= self.probe.next_sample:
            self._sample(start)
        end = start + duration
        if step.chunks or step.preempted or step.rejected or step.swapped_in_blocks:
            return end, 1  # the next plan may find the queues and the memory changed
        horizon = self.next_arrival if scheduler.open_to_arrivals else FOREVER
        if scheduler.ranking is not None:  # it looks at who arrives in any case
            horizon = min(self.next_arrival, scheduler.ranking.wakes_at)
        if self.link is not None:
            horizon = min(horizon, allocator.next_landing)
        if end >= horizon:
            return end, 1
        limit = self._foreseen()
        if limit < 1:
            return end, 1
        counted = allocator.counted
        if counted is not None and counted.groups:
            through = commit_through(scheduler, self.clock, recorder, start, end, limit, horizon)
            if through is not None:
                self._recorded = True
                return through
            limit = counted.quiet_for(limit)
            if not limit:
                return end, 1
        return commit_ahead(scheduler, self.timing, recorder, end, limit, horizon)

    def _foreseen(self) -> int:
        """Steps after the one planned in which no sequence finishes or forks and the scheduler stays quiet."""
        scheduler = self.scheduler
        decodes = scheduler.decodes
        limit = decodes.next_finish - decodes.clock
        if limit < 1 or scheduler.tight:
            return 0
        allocator = self.allocator
        if allocator.gave_back:
            allocator.gave_back = False
            if scheduler.head_refused:
                return 0
        if (
            decodes.growths
            and allocator.growth is None
            and not allocator.grows_foreseeably
            and (not self._chronicle.counts_entries or self.timing.counts_entries)
        ):  # any growth may change any part of the usage, or the next step's time
            limit = min(limit, decodes.next_growth - decodes.clock - 1)
            if limit < 1:
                return 0
        if self.tiers is not None:
            if not self.tiers.steady and scheduler.num_waiting:
                return 0
            if not self.tiers.grows_quietly:
                limit = min(limit, decodes.next_growth - decodes.clock - 1)
        if self.beams is not None:
            limit = min(limit, self.beams.next_turnover - decodes.clock)
        if self.probe is not None:
            limit = min(limit, self.probe.next_sample - self.num_steps - 1)
        if scheduler.ranking is not None:
            limit = min(limit, scheduler.ranking.quiet_for(scheduler))
        quiet = scheduler.quiet_for(self.now)
        return quiet if quiet < limit else limit

    def _sample(self, now: int) -> None:
        """Show the probe all that holds slots."""
        assert self.probe is not None
        self.probe.sample(self.num_steps, now, sorted(self.allocator.sequences, key=arrival_order))

    def _commit(self, step: Step, end: int) -> None:
        """Hand out the tokens of the last step: computed prompts start to decode, finished sequences leave."""
        decodes = self.scheduler.decodes
        for sequence, begin, tokens in step.chunks:
            request = sequence.request
            if begin + tokens < request.prefill_tokens:
                continue
            self._num_prefills += 1
            if self.allocator.keeps_freed:
                self.allocator.computed(sequence)
            if request.first_token_time == NEVER:
                request.first_token_time = end
                if request.width > 1:
                    self._fork(sequence, end)
                    continue
            if sequence.origin < sequence.final_tokens:
                decodes.join(sequence)
                if self.allocator.shares_tail(sequence):
                    decodes.copy_pending.append(sequence)
            else:
                self._complete(sequence, end)
        if step.num_decodes:
            for sequence in decodes.take_finished():
                self._complete(sequence, end)
        if self.beams is not None:
            self.beams.turn_over(self.scheduler)

    def _fork(self, parent: Sequence, end: int) -> None:
        """The prompt is computed: go on with one branch for each sample or beam."""
        request = parent.request
        decodes = self.scheduler.decodes
        beams = self.beams if request.beam_width > 1 else None
        if beams is not None and parent.origin < parent.final_tokens and beams.count(parent, self.scheduler):
            return
        for _ in range(1, request.width):
            request.sequences.append(fork(self.allocator, parent))
        if parent.origin == parent.final_tokens:
            for sequence in list(request.sequences):
                self._complete(sequence, end)
            return
        for sequence in request.sequences:
            decodes.join(sequence)
        decodes.copy_pending += request.sequences
        if beams is not None:
            beams.start(request, decodes)

    def _complete(self, sequence: Sequence, end: int) -> None:
        if self.scheduler.complete(sequence):
            request = sequence.request
            request.status = "finished"
            request.finish_time = end
            self._done(request)

    def _done(self, request: Request) -> None:
        self.num_live -= 1
        self.recorder.request(request)
        if self.on_done is not None:
            self.on_done(request)
