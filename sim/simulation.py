"""A simulation: one workload through one engine, from the first arrival to the last token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import simpy

from sim.beams import BeamSearch
from sim.engine import Engine
from sim.errors import Stalled, UserError
from sim.genealogy import Turnover
from sim.probe import Probe
from sim.recorder import Recorder
from sim.request import Request
from sim.schedulers.base import Scheduler
from sim.source import Source
from sim.timing.base import StepTime
from sim.timing.transfers import Transfers

Summary = dict[str, float]

PROGRESS_EVERY = 500


class Workload(Protocol):
    """Where requests come from: in order of arrival, ids from 0, made one at a time."""

    @property
    def clients(self) -> int | None:
        """Clients of a closed loop, whose requests carry no arrival time; None in an open one."""

    @property
    def think_time(self) -> int:
        """Time (ns) between a client's answer and its next request."""

    @property
    def beams(self) -> tuple[Turnover | float, int] | None:
        """Turnover of beams and the seed of its draws; None without beam search."""

    def requests(self) -> Iterator[Request]:
        """The requests."""


def simulate(
    workload: Workload,
    *,
    scheduler: Scheduler,
    timing: StepTime,
    transfers: Transfers,
    recorder: Recorder,
    max_model_len: int,
    probe: Probe | None = None,
    progress: Callable[[int], None] | None = None,
) -> Summary:
    """Run a workload to its end; the figures of the summary.

    `progress` is called now and then with the number of requests that are over. Raises Stalled if nothing can
    proceed before all requests are over, UserError if an allocator must foresee what cannot be foreseen.
    """
    env = simpy.Environment(initial_time=0)
    over = 0
    source = Source(env, workload.requests(), clients=workload.clients, think_time=workload.think_time)

    if scheduler.allocator.foresees:
        if workload.clients is not None:
            raise UserError("clients of a closed loop send what nobody can foresee, expected an open loop")
        scheduler.allocator.foresee(workload.requests())

    def on_done(request: Request) -> None:
        nonlocal over
        over += 1
        if progress is not None and over % PROGRESS_EVERY == 0:
            progress(over)
        source.done(request)

    scheduler.recovery.price(timing, transfers)
    beams = None if workload.beams is None else BeamSearch(*workload.beams)
    engine = Engine(
        env,
        scheduler,
        timing,
        transfers,
        recorder,
        max_model_len=max_model_len,
        beams=beams,
        probe=probe,
        on_done=on_done,
    )
    source.attach(engine)
    env.run()
    if engine.num_live:
        raise Stalled(f"{engine.num_live} requests never came to an end")
    if probe is not None:
        probe.finish()
    engine.record_pause(engine.now)
    recorder.close()
    if progress is not None:
        progress(over)
    return summarize(engine, recorder)


def summarize(engine: Engine, recorder: Recorder) -> Summary:
    """The figures of a finished run; shares and mean_running over the loaded period."""
    requests, memory, clock = recorder.latencies, recorder.memory, engine.clock
    duration = memory.end / 1e9
    unshared = memory.held + memory.saved * engine.allocator.block_slots
    prompts = requests.admitted_prompt_tokens
    allocator = engine.allocator
    swapped = clock.swapped_out_blocks + clock.swapped_in_blocks
    averages = memory.averages(allocator.block_size if allocator.pools else 0)
    shares = {name: averages.pop(name) for name in list(averages) if name.endswith("_share")}
    return {
        "duration_s": duration,
        "steps": recorder.num_steps,
        "requests_finished": requests.finished,
        "requests_rejected": requests.rejected,
        "request_throughput": requests.finished / duration if duration else 0.0,
        "output_token_throughput": requests.output_tokens / duration if duration else 0.0,
        **requests.statistics(),
        **averages,
        "preemptions": clock.preemptions,
        "recomputed_tokens": engine.scheduler.recomputed_tokens,
        "requests_thrashed": requests.thrashed,
        "max_prefills": requests.most_prefills,
        "swapped_out_blocks": clock.swapped_out_blocks,
        "swapped_in_blocks": clock.swapped_in_blocks,
        "copied_blocks": clock.copied_blocks,
        "recompute_s": clock.recompute_time / 1e9,
        "swap_refused": engine.scheduler.swap_refused,
        "swapped_gb": swapped * clock.transfers.swapped_bytes / 1e9,
        "swap_transfer_s": (clock.transfer_time if clock.link is None else clock.link.busy_time) / 1e9,
        "swap_stall_s": clock.stall_time / 1e9,
        "recovery_s": (clock.recompute_time + clock.stall_time) / 1e9,
        "prefix_hit_tokens": requests.hit_tokens,
        "prefix_hit_rate": requests.hit_tokens / prompts if prompts else 0.0,
        "blocks_saved_share": memory.saved * engine.allocator.block_slots / unshared if unshared else 0.0,
        **shares,
        **engine.allocator.figures,
        **(allocator.tiers.figures(prompts) if allocator.tiers is not None else {}),
    }
