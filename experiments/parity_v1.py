"""Recordings of vLLM V1: its KV-cache manager, and its scheduler over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiments.parity import Row, block_keys, canonical, histogram
from sim import Admission, Capacity, Request, Step
from sim.allocators.grouped_prefix import GroupedPrefixAllocator
from sim.allocators.prefix import PrefixAllocator
from sim.decode_set import arrival_order
from sim.prefix_cache import NULL, Holding, PrefixCache
from sim.schedulers import VllmV1
from sim.schedulers import order as orders


def windows_of(config: Row) -> list[int | None]:
    """The window of each group of layers in the header of a recording, None for all tokens."""
    return [None if group in ("full", None) else group for group in config.get("groups", ["full"])]


class _Request:
    """A request of a recording: its tokens, with a key for each full block, and what it holds."""

    def __init__(self, tokens: Sequence[int], cache: PrefixCache) -> None:
        self.tokens = list(tokens)
        self.keys: list[int] = []
        self.holding = Holding(len(cache.windows))
        self.preempted = False
        self.extend((), cache.block_size)

    def extend(self, tokens: Sequence[int], block_size: int) -> None:
        self.tokens += tokens
        if len(self.tokens) // block_size > len(self.keys):
            self.keys = block_keys(self.tokens, block_size, self.keys)


class ManagerDriver:
    """Performs the operations of a KV-cache manager file on a prefix cache."""

    gave_up = False

    def __init__(self, config: Row, *, keyless_first: bool) -> None:
        self.cache = PrefixCache(
            config["usable_blocks"],
            config["block_size"],
            windows=windows_of(config),
            caching=config["prefix_caching"],
            watermark_blocks=config["watermark_blocks"],
            keyless_first=keyless_first,
        )
        self.requests: dict[str, _Request] = {}

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One operation: what it returns, and the state afterwards."""
        arguments = {name: value for name, value in op.items() if name != "op"}
        return getattr(self, op["op"])(**arguments), self.state()

    def admit(self, r: str, tokens: list[int], chunk: int | None = None) -> Row:
        request = _Request(tokens, self.cache)
        out = self._start(request, chunk)
        if out["ok"]:
            self.requests[r] = request
        return out

    def _start(self, request: _Request, chunk: int | None) -> Row:
        hit, blocks = self.cache.hit(request.keys, len(request.tokens))
        now = len(request.tokens) - hit
        if chunk is not None:
            now = min(chunk, now)
        ok = self.cache.allocate(request.holding, now, request.keys, hits=blocks, watermark=True)
        return {"ok": ok, "hit_tokens": hit, "computed_now": now if ok else 0}

    def continue_prefill(self, r: str, chunk: int) -> Row:
        request = self.requests[r]
        now = min(chunk, len(request.tokens) - request.holding.computed)
        ok = self.cache.allocate(request.holding, now, request.keys)
        return {"ok": ok, "computed_now": now if ok else 0}

    def append(self, r: str, token: int) -> Row:
        request = self.requests[r]
        request.extend([token], self.cache.block_size)
        missing = len(request.tokens) - request.holding.computed
        return {"ok": self.cache.allocate(request.holding, missing, request.keys)}

    def preempt(self, r: str) -> Row:
        self.cache.release(self.requests[r].holding)
        return {}

    def resume(self, r: str, chunk: int | None = None) -> Row:
        return self._start(self.requests[r], chunk)

    def free(self, r: str) -> Row:
        self.cache.release(self.requests.pop(r).holding)
        return {}

    def probe(self, tokens: list[int]) -> Row:
        hit, _ = self.cache.hit(block_keys(tokens, self.cache.block_size), len(tokens))
        return {"hit_tokens": hit}

    def reset_prefix_cache(self) -> Row:
        return {"ok": self.cache.pool.forget_all()}

    def state(self) -> Row:
        pool = self.cache.pool
        tables = {
            f"{name}/g{group}" if len(self.cache.windows) > 1 else name: table
            for name, request in self.requests.items()
            for group, table in enumerate(request.holding.tables)
        }
        seen: Row = {
            "free": pool.num_free, "used": pool.num_used, "tables": canonical(tables),
            "ref_hist": histogram(pool.references), "hashed_blocks": pool.num_keyed,
        }  # fmt: skip
        if any(window is not None for window in self.cache.windows):
            seen["null_blocks"] = {name: table.count(NULL) for name, table in tables.items()}
        return seen

    def check_integrity(self) -> None:
        """The pool's books against the tables."""
        self.cache.pool.check_integrity(
            [block for block in table if block != NULL]
            for request in self.requests.values()
            for table in request.holding.tables
        )


class _PatientMemory(PrefixAllocator):
    """V1's scheduler gives up nobody: who can never fit waits for ever."""

    def admission(self, request: Request, num_tokens: int) -> Admission:
        admission = super().admission(request, num_tokens)
        return Admission.LATER if admission is Admission.NEVER else admission


class _PatientScheduler(VllmV1):
    """The same for who exceeds any step."""

    def hopeless(self, request: Request) -> str:
        return ""


class _PatientGroups(GroupedPrefixAllocator):
    """Likewise, over several groups of layers."""

    def admission_in_chunks(self, request: Request, num_tokens: int, chunk: int) -> Admission:
        admission = super().admission_in_chunks(request, num_tokens, chunk)
        return Admission.LATER if admission is Admission.NEVER else admission


class SchedulerDriver:
    """Performs the steps of a scheduler file on `vllm_v1` over `prefix`: a plan, then the effect of its execution."""

    gave_up = False

    def __init__(self, config: Row, requests: list[Row], *, oldest: bool) -> None:
        blocks = config["num_blocks_including_null"]
        capacity = Capacity(1, config["max_model_len"], config["usable_blocks"])
        fields = {
            "block_size": config["block_size"],
            "prefix_caching": config["prefix_caching"],
            "keyless_first": not oldest,
        }
        windows = windows_of(config)
        self.memory: _PatientMemory | _PatientGroups
        if windows == [None]:
            self.memory = _PatientMemory(capacity, **fields)
        else:
            self.memory = _PatientGroups(capacity, windows=windows, **fields)
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
            reserve_full_prompt=config.get("reserve_full_isl", False),
            skip_unfit=oldest,
        )
        self.coming = sorted(requests, key=lambda row: row["arrival_step"])
        self.names: dict[Request, str] = {}
        self.started: set[Request] = set()

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One step: what was scheduled and finished, and the state before and after its execution."""
        while self.coming and self.coming[0]["arrival_step"] <= op["step"]:
            self._add(self.coming.pop(0))
        policy, before = self.policy, list(self.policy.running)
        step = policy.plan(op["step"])
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
        prompt = tuple(first + index for first, count in row["prompt"] for index in range(count))
        room = self.memory.max_model_len - len(prompt)
        request = Request(
            len(self.names), 0, len(prompt), min(row["max_tokens"], room),
            content=prompt, content_grain=1, priority=row.get("priority", 0),
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
