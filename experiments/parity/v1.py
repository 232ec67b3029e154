"""Recordings of vLLM V1: its KV-cache manager, and its scheduler over it."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.parity.rows import Row, canonical, histogram
from experiments.parity.tokens import ENDLESS, TokenManager, Told, tokens_of
from sim import Admission, Capacity, Request, Step
from sim.allocators.grouped_prefix import GroupedPrefixAllocator
from sim.allocators.prefix import PrefixAllocator
from sim.allocators.window_edge import NULL
from sim.decode_set import arrival_order
from sim.schedulers import VllmV1
from sim.schedulers import order as orders


def windows_of(config: Row) -> list[int | None]:
    """The window of each group of layers in the header of a recording, None for all tokens."""
    return [None if group in ("full", None) else group for group in config.get("groups", ["full"])]


FIRST_OUTPUT = 100_000
"""The first token that request 0 of a file generates; the first ones of the others follow so many apart."""

Memory = PrefixAllocator | GroupedPrefixAllocator


def build_memory(
    kinds: tuple[type[PrefixAllocator], type[GroupedPrefixAllocator]],
    capacity: Capacity,
    config: Row,
    keyless_first: bool,
) -> Memory:
    """The allocator that a header describes: the first kind for one group that sees all, the second for others."""
    fields: Row = {
        "block_size": config["block_size"],
        "prefix_caching": config["prefix_caching"],
        "keyless_first": keyless_first,
    }
    alone, grouped = kinds
    windows = windows_of(config)
    return alone(capacity, **fields) if windows == [None] else grouped(capacity, windows=windows, **fields)


class _GuardedMemory(PrefixAllocator):
    """The recorded manager keeps its watermark at every admission, as if others ran."""

    @property
    def kept_free(self) -> int:
        return self.watermark_blocks


class _GuardedGroups(GroupedPrefixAllocator):
    """Likewise, over several groups of layers."""

    @property
    def kept_free(self) -> int:
        return self.watermark_blocks


class ManagerDriver(TokenManager):
    """Performs the operations of a KV-cache manager file on the allocator `prefix`."""

    memory: Memory

    def __init__(self, config: Row, *, keyless_first: bool) -> None:
        super().__init__()
        capacity = Capacity(1, ENDLESS, config["usable_blocks"])
        self.memory = build_memory((_GuardedMemory, _GuardedGroups), capacity, config, keyless_first)
        self.memory.watermark_blocks = config["watermark_blocks"]
        self.num_groups = len(windows_of(config))
        self.has_windows = windows_of(config).count(None) < self.num_groups

    def admit(self, r: str, tokens: list[int], chunk: int | None = None) -> Row:
        told = self.tell(tokens)
        out = self._start(told, chunk)
        if out["ok"]:
            self.requests[r] = told
        return out

    def _start(self, told: Told, chunk: int | None) -> Row:
        hit = self.memory.cached_tokens(told.request, told.num_tokens)
        now = told.num_tokens - hit
        if chunk is not None:
            now = min(chunk, now)
        ok = self.memory.admission(told.request, hit + now) is Admission.OK
        if ok:
            self.memory.admit(told.sequence, hit + now)
        return {"ok": ok, "hit_tokens": hit, "computed_now": now if ok else 0}

    def _continue(self, told: Told, tokens: int) -> bool:
        self.memory.pass_windows(told.sequence)
        ok = self.has_room(told, tokens)
        if ok:
            self.memory.extend(told.sequence, tokens)
        return ok

    def continue_prefill(self, r: str, chunk: int) -> Row:
        told = self.requests[r]
        now = min(chunk, told.missing)
        ok = self._continue(told, now)
        return {"ok": ok, "computed_now": now if ok else 0}

    def append(self, r: str, token: int) -> Row:
        told = self.requests[r]
        told.tell(token)
        return {"ok": self._continue(told, told.missing)}

    def preempt(self, r: str) -> Row:
        self.drop(self.requests[r])
        return {}

    def resume(self, r: str, chunk: int | None = None) -> Row:
        return self._start(self.requests[r], chunk)

    def free(self, r: str) -> Row:
        told = self.requests.pop(r)
        if told.sequence in self.memory.sequences:
            self.memory.free(told.sequence)
        return {}

    def probe(self, tokens: list[int]) -> Row:
        return {"hit_tokens": self.memory.cached_tokens(self.tell(tokens).request, len(tokens))}

    def reset_prefix_cache(self) -> Row:
        return {"ok": self.memory.pool.forget_all()}

    def _tables(self, told: Told) -> list[list[int]]:
        if isinstance(self.memory, PrefixAllocator):
            return [told.sequence.block_table]
        holding = self.memory.holdings.get(told.sequence)
        return [[] for _ in range(self.num_groups)] if holding is None else holding.tables

    def state(self) -> Row:
        pool = self.memory.pool
        tables = {
            f"{name}/g{group}" if self.num_groups > 1 else name: table
            for name, told in self.requests.items()
            for group, table in enumerate(self._tables(told))
        }
        seen: Row = {
            "free": pool.num_free, "used": pool.num_used, "tables": canonical(tables),
            "ref_hist": histogram(pool.references), "hashed_blocks": pool.num_keyed,
        }  # fmt: skip
        if self.has_windows:
            seen["null_blocks"] = {name: table.count(NULL) for name, table in tables.items()}
        return seen


class _PatientMemory(PrefixAllocator):
    """V1's scheduler gives up nobody: who can never fit waits for ever."""

    def admission(self, request: Request, num_tokens: int) -> Admission:
        admission = super().admission(request, num_tokens)
        return Admission.LATER if admission is Admission.NEVER else admission


class _PatientScheduler(VllmV1):
    """The same for who exceeds any step. And all tokens are told here: what decodes fill can be found at once."""

    def hopeless(self, request: Request) -> str:
        return ""

    def plan(self, now: int) -> Step:
        step = super().plan(now)
        self._tell()
        return step

    def _admit_waiting(self, step: Step, now: int, left: int) -> None:
        self._tell()
        super()._admit_waiting(step, now, left)

    def _tell(self) -> None:
        """Let the blocks be found that decodes have filled, in a run they are when their holder leaves them."""
        size = self.allocator.block_size
        for request in self.running:
            (sequence,) = request.sequences
            if sequence.decodes is not None and sequence.num_tokens % size == 0:
                assert isinstance(self.allocator, PrefixAllocator | GroupedPrefixAllocator)
                self.allocator.held(sequence, sequence.num_tokens)


class _PatientGroups(GroupedPrefixAllocator):
    """Likewise, over several groups of layers."""

    def admission_in_chunks(
        self, request: Request, num_tokens: int, chunk: int, first: int | None = None
    ) -> Admission:
        admission = super().admission_in_chunks(request, num_tokens, chunk, first)
        return Admission.LATER if admission is Admission.NEVER else admission


class SchedulerDriver:
    """Performs the steps of a scheduler file on `vllm_v1` over `prefix`: a plan, then the effect of its execution."""

    gave_up = False

    def __init__(self, config: Row, requests: list[Row], *, oldest: bool) -> None:
        blocks = config["num_blocks_including_null"]
        capacity = Capacity(1, config["max_model_len"], config["usable_blocks"])
        self.memory = build_memory((_PatientMemory, _PatientGroups), capacity, config, not oldest)
        self.memory.watermark_blocks = config.get(
            "watermark_blocks", int(config.get("watermark", 0.0) * blocks)
        )
        self.policy = _PatientScheduler(
            self.memory,
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
            order=orders[config["policy"]],
            chunked_prefill=config["chunked_prefill"],
            long_prefill_token_threshold=config["long_prefill_token_threshold"],
            reserve_full_prompt=config.get("reserve_full_isl", not oldest),  # the default of main
            skip_unfit=oldest,
        )
        self.numbers = {row["id"]: number for number, row in enumerate(requests)}
        self.coming = sorted(requests, key=lambda row: row["arrival_step"])
        self.names: dict[Request, str] = {}
        self.started: set[Request] = set()

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One step: what was scheduled and finished, and the state before and after its execution."""
        while self.coming and self.coming[0]["arrival_step"] <= op["step"]:
            self._add(self.coming.pop(0))
        policy, before = self.policy, list(self.policy.running)
        step = policy.next_step(op["step"])
        chunks = {sequence.request: (start, tokens) for sequence, start, tokens in step.chunks}
        batch = {request: 1 for request in policy.running if request.sequences[0].decodes}
        batch |= {request: tokens for request, (_, tokens) in chunks.items()}
        batch = {request: batch[request] for request in policy.running if request in batch}
        admitted = [request for request in batch if request not in before]
        out: Row = {
            "scheduled": {self.names[request]: tokens for request, tokens in batch.items()},
            "order": self._named(batch),
            "total": step.num_prefill_tokens + step.num_decodes,
            "new": self._named(request for request in admitted if request not in self.started),
            "resumed": self._named(request for request in admitted if request in self.started),
            "cached_tokens_at_admission": {self.names[request]: chunks[request][0] for request in admitted},
            "preempted": self._named(request for request in before if request in step.preempted),
        }
        self.started.update(admitted)
        state: Row = {
            "running": self._named(policy.running),
            "waiting": self._named(policy.waiting),
            "free": self.memory.pool.num_free,
            "blocks": {
                self.names[request]: len(request.sequences[0].block_table) for request in policy.running
            },
        }
        out["finished"] = self._execute(step)
        state["free_after"] = self.memory.pool.num_free
        return out, state

    def _named(self, requests: Iterable[Request]) -> list[str]:
        return [self.names[request] for request in requests]

    def _add(self, row: Row) -> None:
        prompt = tokens_of(row["prompt"])
        outputs = min(row["max_tokens"], self.memory.max_model_len - len(prompt))
        first = FIRST_OUTPUT * (self.numbers[row["id"]] + 1)
        request = Request(
            len(self.names), 0, len(prompt), outputs, content=(*prompt, *range(first, first + outputs)),
            content_grain=1, priority=row.get("priority", 0),
        )  # fmt: skip
        self.names[request] = row["id"]
        self.policy.add(request)

    def _execute(self, step: Step) -> list[str]:
        """A token for everybody who is computed; those who have their last one leave in the order of the batch."""
        policy = self.policy
        finished = []
        for sequence, start, tokens in step.chunks:
            if start + tokens < sequence.request.prefill_tokens:
                continue
            if sequence.origin < sequence.final_tokens:
                policy.decodes.join(sequence)
            else:
                finished.append(sequence)
        if step.num_decodes:
            finished += policy.decodes.take_finished()
        finished.sort(key=arrival_order)
        for sequence in finished:
            policy.complete(sequence)
        return self._named(sequence.request for sequence in finished)

    def check_integrity(self) -> None:
        """The allocator's books."""
        self.memory.check_integrity()
