"""Recordings of vLLM V0's scheduler over its block manager."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from experiments.parity.v0_manager import build_memory
from sim import Request, Sequence, Step
from sim.beams import fork
from sim.request import NEVER
from sim.schedulers import VllmV0


class _PatientScheduler(VllmV0):
    """Leaves a swapped group that will never come back where it is, as the engine does."""

    nobody_left = False


class SchedulerDriver:
    """Performs the steps of a scheduler file on the V0 scheduler over the paged allocator.

    It does what the engine does between plans, and beside it what only these files have: samples of one
    request that end at different lengths, and beams that turn over at fixed lengths.
    """

    def __init__(self, config: dict[str, Any], requests: list[dict[str, Any]]) -> None:
        self.memory = build_memory(config, config["max_model_len"])
        self.policy = _PatientScheduler(
            self.memory,
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
            chunked_prefill=config["chunked_prefill"],
        )
        assert self.policy.prompt_limit == config["prompt_limit"]
        self.coming = sorted(requests, key=lambda row: row["arrival_step"])
        self.rows: dict[Request, dict[str, Any]] = {}
        self.samples: dict[Sequence, int] = {}
        self.running: list[Request] = []  # in the order in which V0 keeps them
        self.swapped: list[Request] = []
        self.gave_up = False  # a group was preempted that the host has no room for

    def perform(self, op: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """One step: what was scheduled and finished, and the state before and after its execution."""
        while self.coming and self.coming[0]["arrival_step"] <= op["step"]:
            self._add(self.coming.pop(0))
        policy, memory = self.policy, self.memory
        step = policy.plan(op["step"])
        groups = self._follow_chunks(step) if policy.chunked_prefill else self._follow(step)
        self.gave_up = any(request.status == "rejected" for request in step.preempted)
        out = {
            "scheduled": groups,
            "prefill_groups": len(step.chunks),
            "batched_tokens": step.num_prefill_tokens + step.num_decodes,
            "preempted": self._names(each for each in step.preempted if each.status == "waiting"),
            "swapped_out": self._names(each for each in step.preempted if each.status == "swapped"),
            "swapped_in": self._names(self.returned),
            "blocks_out": step.swapped_out_blocks,
            "blocks_in": step.swapped_in_blocks,
            "cow": step.copied_blocks,
            "ignored": self._names(step.rejected),
        }
        state = {
            "running": self._names(self.running),
            "waiting": self._names(policy.waiting),
            "swapped": self._names(self.swapped),
            "free_gpu": memory.pool.num_free,
            "free_cpu": memory.host_pool.num_free,
            "blocks": {
                self.rows[request]["id"]: [len(branch.block_table) for branch in request.sequences]
                for request in self.running
            },
        }
        names = [name for name, *_ in groups]
        out["finished"] = sorted(self._names(self._execute(step)), key=names.index)
        state["free_gpu_after"] = memory.pool.num_free
        return out, state

    def check_integrity(self) -> None:
        """The pools' books; what is waste is not told, as only here samples of one request end apart."""
        memory = self.memory
        memory.pool.check_integrity(branch.block_table for branch in memory.sequences)
        memory.host_pool.check_integrity(
            branch.block_table for request in self.policy.swapped for branch in request.sequences
        )

    def _add(self, row: dict[str, Any]) -> None:
        request = Request(
            len(self.rows), 0, row["prompt_len"], max(row["out_lens"]),
            n=1 if row.get("beam") else row.get("n", 1), beam_width=row.get("n", 1) if row.get("beam") else 1,
        )  # fmt: skip
        self.rows[request] = row
        self.policy.add(request)

    def _follow(self, step: Step) -> list[list[Any]]:
        """Keep the orders that V0 shows, and name the step's batch: [group, tokens, running sequences]."""
        stayed = [request for request in self.running if request in self.policy.running]
        joined = [request for request in self.policy.running if request not in stayed]
        self.returned = [] if step.chunks else joined
        self.swapped = [request for request in self.swapped if request in self.policy.swapped]
        if step.chunks:
            batch = [[self.rows[sequence.request]["id"], tokens, 1] for sequence, _, tokens in step.chunks]
        else:  # V0 sorts its queues by arrival when it uses them
            stayed.sort(key=lambda request: request.id)
            if not step.preempted:
                self.swapped.sort(key=lambda request: request.id)
            batch = [[self.rows[each]["id"], 1, len(each.sequences)] for each in [*stayed, *joined]]
        self.swapped += [request for request in step.preempted if request.status == "swapped"]
        self.running = stayed + joined
        return batch

    def _follow_chunks(self, step: Step) -> list[list[Any]]:
        """The same where a step has chunks and decodes, in the order in which V0 puts them together."""
        policy = self.policy
        tokens = {sequence.request: tokens for sequence, _, tokens in step.chunks}
        stayed = sorted([each for each in self.running if each in policy.running], key=lambda each: each.id)
        self.returned = [each for each in policy.running if each in self.swapped]
        admitted = [each for each in tokens if each not in self.running and each not in self.swapped]
        going_on = [each for each in stayed if each in tokens]
        decoding = [each for each in stayed if each.sequences[0].decodes is not None]
        back = [each for each in self.returned if each in tokens]
        decoding_again = [each for each in self.returned if each not in tokens]
        idle = [each for each in stayed if each not in tokens and each not in decoding]
        self.running = [*idle, *admitted, *decoding, *going_on, *decoding_again, *back]
        self.swapped = [each for each in self.swapped if each in policy.swapped]
        if not step.preempted:
            self.swapped.sort(key=lambda each: each.id)
        self.swapped += [request for request in step.preempted if request.status == "swapped"]
        batch = [[self.rows[each]["id"], tokens[each], 1] for each in [*admitted, *going_on, *back]]
        return batch + [
            [self.rows[each]["id"], 1, len(each.sequences)] for each in [*decoding, *decoding_again]
        ]

    def _names(self, requests: Iterable[Request]) -> list[str]:
        return [self.rows[request]["id"] for request in requests]

    def _execute(self, step: Step) -> list[Request]:
        """Give every scheduled sequence its token; the requests that are done with it."""
        over: list[Request] = []
        decoding = [request for request in self.running if request.sequences[0].decodes is not None]
        for sequence, start, tokens in step.chunks:
            request = sequence.request
            if start + tokens < request.prefill_tokens:
                continue
            if request.first_token_time == NEVER:
                request.first_token_time = 0
                self._start(sequence)
            for branch in list(request.sequences):
                if branch.origin == branch.final_tokens:
                    self._complete(branch, over)
                else:
                    self.policy.decodes.join(branch)
        if step.num_decodes:
            for request in decoding:
                if self.rows[request].get("beam"):
                    self._turn_over(request)
            for sequence in self.policy.decodes.take_finished():
                self._complete(sequence, over)
        return over

    def _complete(self, sequence: Sequence, over: list[Request]) -> None:
        pending = self.policy.decodes.copy_pending
        if sequence in pending:  # it was forked with its last token
            pending.remove(sequence)
        if self.policy.complete(sequence):
            sequence.request.status = "finished"
            over.append(sequence.request)

    def _start(self, parent: Sequence) -> None:
        """Fork the samples: the children are the first ones, the parent is the last."""
        request = parent.request
        request.sequences += [fork(self.memory, parent) for _ in range(1, request.width)]
        for sample, branch in enumerate([*request.sequences[1:], parent]):
            self._assign(branch, sample)
        if request.width > 1:
            self.policy.decodes.copy_pending += request.sequences

    def _assign(self, branch: Sequence, sample: int) -> None:
        row = self.rows[branch.request]
        self.samples[branch] = sample
        branch.final_tokens = row["prompt_len"] + row["out_lens"][sample] - 1

    def _turn_over(self, request: Request) -> None:
        """At every third token the first beam is forked and the last one dies; the fork takes its place."""
        decodes = self.policy.decodes
        first, last = request.sequences[0], request.sequences[-1]
        generated = first.num_tokens + 1 - request.prompt_tokens
        if generated % 3:
            return
        child = fork(self.memory, first)
        self._assign(child, self.samples[last])
        request.sequences.append(child)
        decodes.leave(last)
        self.policy.release(last)
        request.sequences.remove(last)
        decodes.join(child)
        decodes.copy_pending += [
            each for each in (first, child) if each is not last and each not in decodes.copy_pending
        ]
