"""The scheduler and the allocator `nano_vllm` against the replay of nano-vllm's recorded schedules."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.parity_nano import SchedulerDriver
from sim import Capacity, Request, allocator, scheduler

SHARED = Path(os.environ.get("KVSIM_SHARED", "../shared")) / "parity" / "nano_vllm"


class RealLoop:
    """The simulator's own scheduler and allocator, a step at a time, as a recording tells of a step."""

    def __init__(self, config: dict, rows: list[dict]) -> None:
        blocks, size = config["num_blocks"], config["block_size"]
        self.memory = allocator["nano_vllm"](Capacity(blocks * size, 10**6, blocks), block_size=size)
        limits = {name: config[name] for name in ("max_num_seqs", "max_num_batched_tokens")}
        self.policy = scheduler["nano_vllm"](self.memory, **limits)
        ordered = sorted(rows, key=lambda row: row["arrival_step"])
        self.names = [row["id"] for row in ordered]
        self.coming = [(row["arrival_step"], _request(number, row)) for number, row in enumerate(ordered)]

    def perform(self, number: int) -> tuple[dict, dict]:
        policy, memory = self.policy, self.memory
        while self.coming and self.coming[0][0] <= number:
            policy.add(self.coming.pop(0)[1])
        before = list(policy.running)
        step = policy.plan(number)
        assert not step.rejected
        memory.check_integrity()
        if step.chunks:
            scheduled = [[self._name(each), tokens, start] for each, start, tokens in step.chunks]
        else:
            decoding = [request.sequences[0] for request in policy.running]
            decoding = [each for each in decoding if each.decodes is not None]
            scheduled = [[self._name(each), 1, each.num_tokens - 1] for each in decoding]
        out = {
            "prefill": bool(step.chunks),
            "scheduled": scheduled,
            "preempted": [self.names[each.id] for each in before if each in step.preempted],
        }
        queue = [*policy.partial, *policy.waiting]
        state = {
            "running": [self.names[each.id] for each in policy.running if each not in policy.partial],
            "waiting": [self.names[each.id] for each in queue],
            "free": memory.pool.num_free,
        }
        done = []
        for sequence, start, tokens in step.chunks:
            if start + tokens == sequence.request.prefill_tokens:
                memory.computed(sequence)
                if sequence.origin < sequence.final_tokens:
                    policy.decodes.join(sequence)
                else:
                    done.append(sequence)
        if step.num_decodes:
            done += policy.decodes.take_finished()
        names = {self._name(each) for each in done}
        out["finished"] = [row[0] for row in scheduled if row[0] in names]
        for name in out["finished"]:
            policy.complete(next(each for each in done if self._name(each) == name))
        state["free_after"] = memory.pool.num_free
        return out, state

    def _name(self, sequence) -> str:
        return self.names[sequence.request.id]


def _request(number: int, row: dict) -> Request:
    tokens = tuple(first + index for first, count in row["prompt"] for index in range(count))
    return Request(
        number, row["arrival_step"], len(tokens), row["max_tokens"], content=tokens, content_grain=1
    )


prompts = st.lists(
    st.tuples(st.sampled_from([0, 0, 100, 500]), st.integers(1, 9)), min_size=1, max_size=3
).map(lambda runs: [list(run) for run in runs])


@settings(max_examples=400, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 6), prompts, st.integers(1, 14)), min_size=1, max_size=10),
    num_blocks=st.integers(3, 14),
    max_num_seqs=st.sampled_from([1, 2, 3, 16]),
    budget=st.sampled_from([3, 8, 20, 200]),
)
def test_the_schedules_are_those_of_the_replay(asked, num_blocks, max_num_seqs, budget):
    config = {
        "num_blocks": num_blocks, "block_size": 4, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget,
    }  # fmt: skip
    rows = [
        {"id": f"r{number}", "arrival_step": at, "prompt": prompt, "max_tokens": output}
        for number, (at, prompt, output) in enumerate(asked)
        if sum(count for _, count in prompt) + output - 1 <= 4 * num_blocks
    ]
    replay, real = SchedulerDriver(config, rows), RealLoop(config, rows)
    for number in range(2000):
        expected = replay.perform({"step": number})
        assert real.perform(number) == expected
        assert not replay.gave_up
        if not (replay.waiting or replay.running or replay.coming):
            break
    else:
        pytest.fail("the replay comes to no end")


def test_recorded_schedules():
    """All recordings of its scheduler, where there are any."""
    files = []
    for path in sorted(SHARED.glob("*.jsonl")) if SHARED.is_dir() else ():
        header = json.loads(path.read_text().splitlines()[0])
        if "requests" in header:
            files.append(path)
    if not files:
        pytest.skip(f"no recorded schedule of nano-vllm under {SHARED}")
    for path in files:
        header, *lines = map(json.loads, path.read_text().splitlines())
        real = RealLoop(header["config"], header["requests"])
        for line in lines:
            out, state = real.perform(line["op"]["step"])
            assert {name: out[name] for name in line["out"]} == line["out"], (path.name, line["i"])
            assert {name: state[name] for name in line["state"]} == line["state"], (path.name, line["i"])
