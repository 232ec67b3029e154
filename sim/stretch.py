"""Stretches: decode steps that follow a planned one before anything can change, committed ahead."""

from __future__ import annotations

import numpy as np

from sim.decode_set import DecodeSet
from sim.recorder import Recorder
from sim.schedulers.base import Scheduler
from sim.step_clock import StepClock
from sim.timing.base import StepTime

LONGEST_STRETCH = 4096
"""Steps committed at once at most; where a stretch ends makes no difference."""


def commit_ahead(
    scheduler: Scheduler, timing: StepTime, recorder: Recorder, end: int, limit: int, horizon: int
) -> tuple[int, int]:
    """Commit decode steps after one that ends at `end` (ns): their times first, then the growth in each.

    At most `limit` further steps, up to the first that ends at the horizon or past it, and while free memory
    covers all growth. Returns the end of the last and the number of steps, the first one included.
    """
    allocator = scheduler.allocator
    decodes = scheduler.decodes
    durations = decode_durations(timing, decodes, end, limit, horizon)
    count = len(durations)
    first = len(recorder.durations) - 1
    if decodes.sliding != recorder.sliding:
        recorder.slide(first, decodes.sliding)
    if decodes.growths or decodes.steady or decodes.turns:
        if allocator.turns:
            allocator.turns.clear()  # those of planned steps
        count, books = scheduler.grow_ahead(count)
        if count < len(durations):
            del durations[count:]
        external = allocator.num_external(scheduler.head_refused)
        offset = first - decodes.clock
        for tick, held, internal in books:
            recorder.usage.extend((tick + offset, held, internal, external))
        if allocator.turns:
            for tick, sliding in allocator.turns:
                recorder.slide(tick + offset, sliding)
            allocator.turns.clear()
    recorder.durations.extend(durations)
    decodes.advance(count)
    allocator.num_ticks += count
    allocator.num_tokens += count * decodes.size * allocator.slots_per_token
    if decodes.sliding:
        allocator.slide(count * decodes.sliding)
    return end + sum(durations), count + 1


SHORTEST = 4
"""Steps that are worth it to go through the turnovers of beams at once."""


def commit_through(
    scheduler: Scheduler, clock: StepClock, recorder: Recorder, start: int, end: int, limit: int, horizon: int
) -> tuple[int, int] | None:
    """`commit_ahead` through turnovers of beam groups whose blocks are counted, after a step from `start` to `end`.

    Only while nobody waits, whom the memory that they give back could serve, and nobody else grows. The recorder gets
    every step here. None, and nothing is done, where that is not so or not worth it.
    """
    allocator, decodes = scheduler.allocator, scheduler.decodes
    counted = allocator.counted
    assert counted is not None
    if scheduler.num_waiting or clock.link is not None or not scheduler.open_to_arrivals:
        return None
    limit = min(limit, (horizon - end) // (end - start) + SHORTEST, LONGEST_STRETCH)
    limit = counted.bounded(min(limit, decodes.next_growth - decodes.clock - 1), scheduler.widest)
    if limit < SHORTEST:
        return None
    copies = counted.copies(limit)
    durations = []
    seconds, size, context = clock.timing.decode_seconds, decodes.size, decodes.context
    now = end
    for blocks in copies:
        context += size
        time = seconds(size, context)
        if blocks:
            time += clock.copy_seconds(blocks)
        duration = round(time * 1e9) or 1
        durations.append(duration)
        now += duration
        if now >= horizon:
            break
    count = len(durations)
    held, internal, tokens, saved = counted.advance(count)
    clock.copied_blocks += sum(copies[:count])
    steps = np.zeros((count + 1, 10), np.int64)
    steps[:, 0] = np.cumsum([start, end - start, *durations[:-1]])
    steps[:, 1] = 1
    steps[:, 3] = size
    steps[:, 4] = len(scheduler.running)
    steps[:, 6] = tokens
    steps[:, 8] = saved
    usage = np.empty((count, 4), np.int64)
    usage[:, 0] = np.arange(len(recorder.durations), len(recorder.durations) + count)
    usage[:, 1], usage[:, 2] = held, internal
    usage[:, 3] = allocator.num_external(scheduler.head_refused)
    recorder.usage.frombytes(usage.tobytes())
    recorder.durations.extend(durations)
    recorder.steps(steps)
    decodes.advance(count)
    allocator.num_ticks += count
    return now, count + 1


def decode_durations(timing: StepTime, decodes: DecodeSet, end: int, limit: int, horizon: int) -> list[int]:
    """Times (ns) of the decode steps after `end`, up to the first that ends at the horizon or past it."""
    size = decodes.size
    context = decodes.context
    seconds = timing.decode_seconds
    limit = min(limit, LONGEST_STRETCH)
    if timing.context_free:
        duration = round(seconds(size, context) * 1e9) or 1
        return [duration] * min(limit, -((end - horizon) // duration))
    durations = []
    for _ in range(limit):
        context += size
        duration = round(seconds(size, context) * 1e9) or 1
        durations.append(duration)
        end += duration
        if end >= horizon:
            break
    return durations
