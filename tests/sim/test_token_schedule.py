"""vLLM V1's loop: its own tests told again with their numbers."""

from __future__ import annotations

from sim.prefix_cache import PrefixCache
from sim.token_schedule import Job, TokenSchedule


class Engine:
    """A loop whose jobs get a token whenever they are computed; a line a step."""

    def __init__(self, blocks: int = 10_000, block_size: int = 16, **fields) -> None:
        fields = {"max_num_seqs": 100, "max_num_batched_tokens": 1024, "max_model_len": 4096, **fields}
        self.cache = PrefixCache(blocks, block_size)
        self.loop = TokenSchedule(self.cache, **fields)
        self.jobs: list[Job] = []

    def add(self, tokens: int, priority: int = 0) -> Job:
        name = str(len(self.jobs))
        keys = [f"{name}.{index}" for index in range(400)]  # of its own, longer than it ever gets
        job = Job(name, tokens, keys, self.cache, order=len(self.jobs), priority=priority)
        self.jobs.append(job)
        self.loop.add(job)
        return job

    def step(self) -> dict[str, int]:
        batch = self.loop.plan()
        for job in batch.tokens:
            assert job.holding.computed <= job.num_tokens
            if job.holding.computed == job.num_tokens:
                job.num_tokens += 1
        self.cache.pool.check_integrity(table for job in self.jobs for table in job.holding.tables)
        self.batch = batch
        return {job.name: tokens for job, tokens in batch.tokens.items()}

    def names(self, jobs) -> str:
        return "".join(job.name for job in jobs)


def test_long_prompts_are_cut():
    engine = Engine(long_prefill_token_threshold=400)
    for _ in range(3):
        engine.add(800)
    assert engine.step() == {"0": 400, "1": 400, "2": 224}
    assert engine.step() == {"0": 400, "1": 400, "2": 224}
    assert engine.step() == {"0": 1, "1": 1, "2": 352}


def test_with_and_without_chunks():
    for chunked, first in ((True, {"0": 800, "1": 224}), (False, {"0": 800})):
        engine = Engine(max_num_seqs=3, chunked_prefill=chunked)
        for tokens in (800, 800, 10, 10):
            engine.add(tokens)
        assert engine.step() == first


def test_0_10_0_passes_over_a_prompt_that_does_not_fit_and_turns_those_around():
    engine = Engine(max_num_batched_tokens=100, chunked_prefill=False, skip_unfit=True, max_num_seqs=2)
    for tokens in (90, 80, 70, 10):
        engine.add(tokens)
    assert engine.step() == {"0": 90, "3": 10}
    assert engine.names(engine.loop.waiting) == "21"


def test_a_victim_goes_to_the_front_and_finds_what_it_had():
    engine = Engine(blocks=6, block_size=4, reserve_full_prompt=False)
    engine.add(8)
    engine.add(8)
    assert engine.step() == {"0": 8, "1": 8}
    assert engine.step() == {"0": 1, "1": 1}
    for _ in range(3):
        assert engine.step() == {"0": 1, "1": 1}
    assert engine.step() == {"0": 1}
    assert engine.names(engine.batch.preempted) == "1"
    assert engine.step() == {"0": 1}, "8 of its 12 tokens are found, one block is free, and two are hits"
    engine.loop.finish(engine.jobs[0])
    assert engine.step() == {"1": 5}
    assert engine.batch.hits == {engine.jobs[1]: 8}
    assert engine.names(engine.batch.resumed) == "1"


def test_priorities():
    engine = Engine(blocks=6, block_size=4, policy="priority", max_num_seqs=2)
    for priority in (5, 1, 3):
        engine.add(8, priority)
    assert engine.names(engine.loop.waiting) == "120"
    assert engine.step() == {"1": 8, "2": 8}
    assert engine.step() == {"1": 1, "2": 1}
    for _ in range(3):
        engine.step()
    assert engine.step() == {"1": 1}
    assert engine.names(engine.batch.preempted) == "2"
    assert engine.names(engine.loop.waiting) == "20"


def test_a_victim_that_was_scheduled_gives_its_tokens_back():
    engine = Engine(blocks=4, block_size=4, policy="priority")
    low, high = engine.add(6), engine.add(8)
    assert engine.step() == {"0": 6, "1": 8}
    low.priority, high.priority = 9, 0
    assert engine.step() == {"1": 1}, "the first had room for its token, and gave way for the second"
    assert engine.names(engine.batch.preempted) == "0"
    assert engine.names(engine.loop.running) == "1"


def test_the_whole_prompt_is_reserved():
    for reserve, first in ((True, {"0": 64}), (False, {"0": 64, "1": 36})):
        engine = Engine(blocks=8, block_size=16, max_num_batched_tokens=100, reserve_full_prompt=reserve)
        engine.add(64)
        engine.add(80)
        assert engine.step() == first


def test_the_watermark_is_not_for_the_first():
    engine = Engine()
    engine.cache = PrefixCache(10, 16, watermark_blocks=5)
    engine.loop.cache = engine.cache
    engine.add(100)
    engine.add(16)
    assert engine.step() == {"0": 100}
    engine.loop.finish(engine.jobs[0])
    assert engine.step() == {"1": 16}


def test_a_context_that_is_full_computes_no_more():
    engine = Engine(max_model_len=20)
    engine.add(18)
    assert engine.step() == {"0": 18}
    assert engine.step() == {"0": 1}
    assert engine.step() == {}
