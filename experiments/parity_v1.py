"""Recordings of vLLM V1: its KV-cache manager, and its scheduler over it."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.parity import Row, block_keys, canonical, histogram
from sim.prefix_cache import NULL, Holding, PrefixCache
from sim.token_schedule import Batch, Job, TokenSchedule


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
            windows=[None if group in ("full", None) else group for group in config["groups"]],
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


class SchedulerDriver:
    """Performs the steps of a scheduler file: a plan, then the whole effect of its execution."""

    gave_up = False

    def __init__(self, config: Row, requests: list[Row], *, oldest: bool) -> None:
        blocks = config["num_blocks_including_null"]
        self.cache = PrefixCache(
            config["usable_blocks"],
            config["block_size"],
            caching=config["prefix_caching"],
            watermark_blocks=config.get("watermark_blocks", int(config.get("watermark", 0.0) * blocks)),
            keyless_first=not oldest,
        )
        self.loop = TokenSchedule(
            self.cache,
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
            max_model_len=config["max_model_len"],
            chunked_prefill=config["chunked_prefill"],
            long_prefill_token_threshold=config["long_prefill_token_threshold"],
            policy=config["policy"],
            reserve_full_prompt=config.get("reserve_full_isl", False),
            skip_unfit=oldest,
        )
        self.coming = sorted(enumerate(requests), key=lambda pair: pair[1]["arrival_step"])
        self.order = 0
        self.rows: dict[Job, Row] = {}
        self.numbers: dict[Job, int] = {}
        self.tokens: dict[Job, list[int]] = {}
        self.keys: dict[Job, list[int]] = {}
        self.generated: dict[Job, int] = {}

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One step: what was scheduled and finished, and the state before and after its execution."""
        while self.coming and self.coming[0][1]["arrival_step"] <= op["step"]:
            self._add(*self.coming.pop(0))
        loop, before = self.loop, list(self.loop.running)
        batch = loop.plan()
        out: Row = {
            "scheduled": {job.name: tokens for job, tokens in batch.tokens.items()},
            "order": [job.name for job in batch.tokens],
            "total": sum(batch.tokens.values()),
            "new": [job.name for job in batch.new],
            "resumed": [job.name for job in batch.resumed],
            "cached_tokens_at_admission": {job.name: hit for job, hit in batch.hits.items()},
            "preempted": [job.name for job in before if job in batch.preempted],
        }
        state: Row = {
            "running": [job.name for job in loop.running],
            "waiting": [job.name for job in loop.waiting],
            "free": self.cache.pool.num_free,
            "blocks": {job.name: len(job.holding.tables[0]) for job in loop.running},
        }
        out["finished"] = self._execute(batch)
        state["free_after"] = self.cache.pool.num_free
        return out, state

    def _add(self, number: int, row: Row) -> None:
        prompt = [first + index for first, count in row["prompt"] for index in range(count)]
        keys = block_keys(prompt, self.cache.block_size)
        job = Job(row["id"], len(prompt), keys, self.cache, order=self.order, priority=row.get("priority", 0))
        self.order += 1
        self.keys[job] = keys
        self.rows[job], self.numbers[job], self.tokens[job], self.generated[job] = row, number, prompt, 0
        self.loop.add(job)

    def _execute(self, batch: Batch) -> list[str]:
        """A token for everybody who is computed; those who have their last one are gone."""
        finished = []
        for job in batch.tokens:
            if job.holding.computed < job.num_tokens:
                continue
            self.tokens[job].append(100_000 * (self.numbers[job] + 1) + self.generated[job])
            self.generated[job] += 1
            job.num_tokens += 1
            job.keys = self.keys[job] = block_keys(self.tokens[job], self.cache.block_size, self.keys[job])
            done = self.generated[job] >= self.rows[job]["max_tokens"]
            if done or job.num_tokens >= self.loop.max_model_len:
                self.loop.finish(job)
                finished.append(job.name)
        return finished

    def check_integrity(self) -> None:
        """The pool's books against the tables."""
        self.cache.pool.check_integrity(
            table for job in [*self.loop.running, *self.loop.waiting] for table in job.holding.tables
        )
