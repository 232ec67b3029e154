"""vLLM V1's loop once more, every request looked at in every step: the oracle of `vllm_v1`."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Literal

from experiments.parity.rows import Row
from experiments.parity.v1 import windows_of
from tests.experiments.keys import block_keys
from tests.sim.prefix_cache import Holding, PrefixCache


class Job:
    """A request in the loop: its tokens so far, the keys of its full blocks, and what it holds."""

    __slots__ = ("holding", "keys", "name", "num_tokens", "order", "priority", "started")

    def __init__(
        self,
        name: str,
        num_tokens: int,
        keys: Ordered[Hashable],
        cache: PrefixCache,
        *,
        order: int,
        priority: int = 0,
    ) -> None:
        self.name = name
        self.num_tokens = num_tokens  # prompt and generated
        self.keys = keys
        self.order = order
        self.priority = priority
        self.holding = Holding(len(cache.windows))
        self.started = False  # was scheduled before: it is resumed, not new

    @property
    def rank(self) -> tuple[int, int]:
        """By which priority scheduling orders: the least goes first, the greatest gives way."""
        return self.priority, self.order


@dataclass(slots=True)
class Batch:
    """What one step does: tokens of each job, in order, and how the queues changed."""

    tokens: dict[Job, int] = field(default_factory=dict)
    new: list[Job] = field(default_factory=list)
    resumed: list[Job] = field(default_factory=list)
    hits: dict[Job, int] = field(default_factory=dict)  # tokens found at admission
    preempted: list[Job] = field(default_factory=list)  # in order of preemption


class TokenSchedule:
    """The loop of vLLM V1 (`v1/core/sched/scheduler.py`) over one prefix cache.

    Running jobs come first, in order of admission; each gets what it lacks, within the budget. While blocks
    are short the last running job gives way (fcfs), or the one of the greatest rank (priority), to the front
    of the queue; what it had computed can be found again. Then, if nobody gave way, jobs are admitted from the
    head of the queue, behind what the cache has of them.

    `reserve_full_prompt` admits a job only if all its tokens fit now, chunked or not. Without chunked prefill
    a prompt beyond the budget stops the queue, or is passed over (`skip_unfit`, vLLM 0.10.0).
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        policy: Literal["fcfs", "priority"] = "fcfs",
        reserve_full_prompt: bool = True,
        skip_unfit: bool = False,
    ) -> None:
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.chunked_prefill = chunked_prefill
        self.threshold = long_prefill_token_threshold
        self.by_priority = policy == "priority"
        self.reserve_full_prompt = reserve_full_prompt
        self.skip_unfit = skip_unfit
        self.waiting: list[Job] = []
        self.running: list[Job] = []

    def add(self, job: Job) -> None:
        """Queue a job."""
        self.waiting.append(job)
        self._sort()

    def _sort(self) -> None:
        if self.by_priority:
            self.waiting.sort(key=_rank)

    def plan(self) -> Batch:
        """The tokens of the next step; their slots are taken, and count as computed."""
        batch = Batch()
        budget = self._continue(batch, self.max_num_batched_tokens)
        if not batch.preempted:
            self._admit(batch, budget)
        return batch

    def _share(self, missing: int, computed: int, budget: int) -> int:
        """Tokens of a running job that this step may compute."""
        return min(self._cut(missing), budget, self.max_model_len - 1 - computed)

    def _cut(self, missing: int) -> int:
        return self.threshold if 0 < self.threshold < missing else missing

    def _continue(self, batch: Batch, budget: int) -> int:
        """Give the running jobs their tokens; what is left of the budget."""
        index = 0
        while index < len(self.running) and budget > 0:
            job = self.running[index]
            computed = job.holding.computed
            tokens = self._share(job.num_tokens - computed, computed, budget)
            if tokens <= 0:
                index += 1
                continue
            while not self.cache.allocate(job.holding, tokens, job.keys):
                victim = max(self.running, key=_rank) if self.by_priority else self.running[-1]
                self.running.remove(victim)
                if victim in batch.tokens:
                    budget += batch.tokens.pop(victim)
                    index -= 1
                self._preempt(victim, batch)
                if victim is job:
                    return budget
            batch.tokens[job] = tokens
            budget -= tokens
            index += 1
        return budget

    def _preempt(self, job: Job, batch: Batch) -> None:
        self.cache.release(job.holding)
        self.waiting.insert(0, job)
        self._sort()
        batch.preempted.append(job)

    def _admit(self, batch: Batch, budget: int) -> None:
        passed = self._admit_from(batch, budget)
        if not self.by_priority:  # vLLM 0.10.0 puts those that it passes over back in reverse
            self.waiting[:passed] = self.waiting[:passed][::-1]

    def _admit_from(self, batch: Batch, budget: int) -> int:
        """Admit what fits, in order; how many at the head of the queue were passed over."""
        index = 0  # of the head, behind those
        while index < len(self.waiting) and budget > 0 and len(self.running) < self.max_num_seqs:
            job = self.waiting[index]
            hit, blocks = self.cache.hit(job.keys, job.num_tokens)
            tokens = self._cut(job.num_tokens - hit)
            if not self.chunked_prefill and tokens > budget:
                if not self.skip_unfit:
                    break
                index += 1
                continue
            tokens = min(tokens, budget)
            whole = job.num_tokens if self.reserve_full_prompt else 0
            watermark = bool(self.running)
            if not self.cache.allocate(
                job.holding,
                tokens,
                job.keys,
                hits=blocks,
                watermark=watermark,
                whole=whole,
                batched=self.max_num_batched_tokens,
            ):
                break
            del self.waiting[index]
            self.running.append(job)
            (batch.resumed if job.started else batch.new).append(job)
            job.started = True
            batch.hits[job] = hit
            batch.tokens[job] = tokens
            budget -= tokens
        return index

    def finish(self, job: Job) -> None:
        """A running job has its last token."""
        self.cache.release(job.holding)
        self.running.remove(job)


def _rank(job: Job) -> tuple[int, int]:
    return job.rank


class TokenDriver:
    """Performs the steps of a scheduler file: a plan, then the whole effect of its execution."""

    gave_up = False

    def __init__(self, config: Row, requests: list[Row], *, oldest: bool) -> None:
        blocks = config["num_blocks_including_null"]
        self.cache = PrefixCache(
            config["usable_blocks"],
            config["block_size"],
            windows=windows_of(config),
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
