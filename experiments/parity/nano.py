"""Recordings of nano-vllm: its block manager, and its scheduler over it."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.parity.rows import Row, canonical, histogram
from experiments.parity.tokens import TokenManager, Told, tokens_of
from sim import Admission, Capacity, Request, Sequence, Step
from sim.allocators.nano_vllm import NanoAllocator
from sim.schedulers import NanoVLLM


class _PatientMemory(NanoAllocator):
    """nano-vllm gives up nobody: who can never fit waits for ever."""

    def admission(self, request: Request, num_tokens: int) -> Admission:
        admission = super().admission(request, num_tokens)
        return Admission.LATER if admission is Admission.NEVER else admission


def build_memory(config: Row) -> NanoAllocator:
    """The blocks that a header describes."""
    blocks, size = config["num_blocks"], config["block_size"]
    return _PatientMemory(Capacity(blocks * size, blocks * size, blocks), block_size=size)


class ManagerDriver(TokenManager):
    """Performs the operations of a block manager file on the allocator `nano_vllm`."""

    memory: NanoAllocator

    def __init__(self, config: Row) -> None:
        super().__init__()
        self.memory = build_memory(config)

    def admit(self, r: str, tokens: list[int]) -> Row:
        told = self.tell(tokens)
        out = self._start(told)
        if out["ok"]:
            self.requests[r] = told
        return out

    def resume(self, r: str) -> Row:
        return self._start(self.requests[r])

    def _start(self, told: Told) -> Row:
        if self.memory.admission(told.request, told.num_tokens) is not Admission.OK:
            return {"ok": False, "hit_tokens": None}
        hit = self.memory.admit(told.sequence, told.num_tokens)
        self.memory.computed(told.sequence)
        return {"ok": True, "hit_tokens": hit}

    def append(self, r: str, token: int) -> Row:
        told = self.requests[r]
        told.tell(token)
        if not self.has_room(told, 1):
            self.drop(told)
            return {"ok": False, "preempted": True}
        self.memory.extend(told.sequence, 1)
        self.memory.computed(told.sequence)
        return {"ok": True, "preempted": False}

    def free(self, r: str) -> Row:
        self.memory.free(self.requests.pop(r).sequence)
        return {}

    def probe(self, tokens: list[int]) -> Row:
        request = self.tell(tokens).request
        ok = self.memory.admission(request, len(tokens)) is Admission.OK
        return {"hit_tokens": self.memory.cached_tokens(request, len(tokens)) if ok else None, "ok": ok}

    def state(self) -> Row:
        pool = self.memory.pool
        tables = {name: told.sequence.block_table for name, told in self.requests.items()}
        return {
            "free": pool.num_free, "used": pool.num_used, "tables": canonical(tables),
            "ref_hist": histogram(pool.references),
        }  # fmt: skip


class SchedulerDriver:
    """Performs the steps of a scheduler file on `nano_vllm` over the allocator of that name."""

    def __init__(self, config: Row, requests: list[Row]) -> None:
        self.memory = build_memory(config)
        self.policy = NanoVLLM(
            self.memory,
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
        )
        self.coming = sorted(requests, key=lambda row: row["arrival_step"])
        self.names: dict[Request, str] = {}
        self.gave_up = False  # nothing could be scheduled, though somebody waits: nano-vllm stops there

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One step: what was scheduled and finished, and the state before and after its execution."""
        while self.coming and self.coming[0]["arrival_step"] <= op["step"]:
            self._add(self.coming.pop(0))
        policy, pool = self.policy, self.memory.pool
        before = list(policy.running)
        step = policy.plan(op["step"])
        self.gave_up = not step.chunks and not step.num_decodes and bool(policy.waiting)
        batch = list(step.chunks)
        if not batch:
            decoding = [sequence for request in policy.running for sequence in request.sequences]
            batch = [(each, each.num_tokens - 1, 1) for each in decoding if each.decodes is not None]
        scheduled = [(sequence.request, tokens, start) for sequence, start, tokens in batch]
        out: Row = {
            "prefill": bool(step.chunks),
            "scheduled": [[self.names[request], tokens, start] for request, tokens, start in scheduled],
            "preempted": self._named(each for each in before if each in step.preempted),
        }
        state: Row = {
            "running": self._named(each for each in policy.running if each not in policy.partial),
            "waiting": self._named([*policy.partial, *policy.waiting]),
            "free": pool.num_free,
        }
        over = self._execute(step)
        for request in [request for request, *_ in scheduled if request in over]:
            policy.complete(over[request])
        out["finished"] = self._named(request for request, *_ in scheduled if request in over)
        state["free_after"] = pool.num_free
        return out, state

    def _named(self, requests: Iterable[Request]) -> list[str]:
        return [self.names[request] for request in requests]

    def _add(self, row: Row) -> None:
        prompt = tokens_of(row["prompt"])
        number = len(self.names)
        request = Request(number, 0, len(prompt), row["max_tokens"], content=prompt, content_grain=1)
        self.names[request] = row["id"]
        self.policy.add(request)

    def _execute(self, step: Step) -> dict[Request, Sequence]:
        """A token for everybody who is computed; who had the last one."""
        decodes = self.policy.decodes
        over = []
        for sequence, start, tokens in step.chunks:
            if start + tokens < sequence.request.prefill_tokens:
                continue
            self.memory.computed(sequence)
            if sequence.origin < sequence.final_tokens:
                decodes.join(sequence)
            else:
                over.append(sequence)
        if step.num_decodes:
            over += decodes.take_finished()
        return {sequence.request: sequence for sequence in over}

    def check_integrity(self) -> None:
        """The allocator's books."""
        self.memory.check_integrity()
