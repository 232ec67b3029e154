"""nano-vllm's block manager and scheduler once more, plainly: the oracle of the replay through `nano_vllm`."""

from __future__ import annotations

from collections import deque

from experiments.parity.rows import Row, canonical, histogram
from tests.experiments.keys import block_keys
from tests.sim.prefix_cache import Holding, PrefixCache


def build_cache(config: Row) -> PrefixCache:
    """The blocks that a header describes, with nano-vllm's rules."""
    return PrefixCache(config["num_blocks"], config["block_size"], keyless_first=False, newest_found=True)


class NanoSequence:
    """A sequence of a recording: its tokens, what it holds, and how much of it is computed."""

    def __init__(self, name: str, tokens: list[int], max_tokens: int = 0) -> None:
        self.name = name
        self.tokens = list(tokens)
        self.max_tokens = max_tokens
        self.holding = Holding(1)
        self.num_cached = 0
        self.num_scheduled = 0
        self.num_generated = 0

    @property
    def held(self) -> bool:
        """Whether it has blocks."""
        return bool(self.holding.tables[0])

    def release(self, cache: PrefixCache) -> None:
        """Give all blocks back."""
        cache.release(self.holding)
        self.num_cached = 0

    def hash_blocks(self, cache: PrefixCache) -> None:
        """After the forward pass: blocks that are full by now can be found."""
        self.num_cached += self.num_scheduled
        self.num_scheduled = 0
        cache.register(self.holding, block_keys(self.tokens[: self.num_cached], cache.block_size))

    def try_admit(self, cache: PrefixCache) -> bool:
        """Blocks for all tokens, hits among them; False if there are too few."""
        length = len(self.tokens)
        hit, blocks = cache.hit(block_keys(self.tokens, cache.block_size), length)
        if not cache.allocate(self.holding, length - hit, (), hits=blocks):
            return False
        self.num_cached = hit
        return True

    def try_append(self, cache: PrefixCache) -> bool:
        """A block for the last token if it needs one; False if there is none."""
        return cache.allocate(self.holding, 1, ())


class ManagerDriver:
    """Performs the operations of a block manager file."""

    gave_up = False

    def __init__(self, config: Row) -> None:
        self.cache = build_cache(config)
        self.sequences: dict[str, NanoSequence] = {}

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One operation: what it returns, and the state afterwards."""
        arguments = {name: value for name, value in op.items() if name != "op"}
        return getattr(self, op["op"])(**arguments), self.state()

    def admit(self, r: str, tokens: list[int]) -> Row:
        sequence = NanoSequence(r, tokens)
        out = self._start(sequence)
        if out["ok"]:
            self.sequences[r] = sequence
        return out

    def resume(self, r: str) -> Row:
        return self._start(self.sequences[r])

    def _start(self, sequence: NanoSequence) -> Row:
        if not sequence.try_admit(self.cache):
            return {"ok": False, "hit_tokens": None}
        hit = sequence.num_cached
        sequence.num_scheduled = len(sequence.tokens) - hit
        sequence.hash_blocks(self.cache)
        return {"ok": True, "hit_tokens": hit}

    def append(self, r: str, token: int) -> Row:
        sequence = self.sequences[r]
        sequence.tokens.append(token)
        if not sequence.try_append(self.cache):
            sequence.release(self.cache)
            return {"ok": False, "preempted": True}
        sequence.num_scheduled = 1
        sequence.hash_blocks(self.cache)
        return {"ok": True, "preempted": False}

    def free(self, r: str) -> Row:
        self.sequences.pop(r).release(self.cache)
        return {}

    def probe(self, tokens: list[int]) -> Row:
        cache = self.cache
        hit, (blocks,) = cache.hit(block_keys(tokens, cache.block_size), len(tokens))
        needed = -(-len(tokens) // cache.block_size) - len(blocks) + cache.pool.unreferenced(blocks)
        ok = needed <= cache.pool.num_free
        return {"hit_tokens": hit if ok else None, "ok": ok}

    def state(self) -> Row:
        pool = self.cache.pool
        tables = {name: sequence.holding.tables[0] for name, sequence in self.sequences.items()}
        return {
            "free": pool.num_free, "used": pool.num_used, "tables": canonical(tables),
            "ref_hist": histogram(pool.references),
        }  # fmt: skip

    def check_integrity(self) -> None:
        """The pool's books against the tables."""
        self.cache.pool.check_integrity(sequence.holding.tables[0] for sequence in self.sequences.values())


class SchedulerDriver:
    """nano-vllm's scheduler (`engine/scheduler.py`), a step at a time.

    Prompts first; a step is prompts only or decodes only. Only the first prompt of a step may be cut to the
    budget; it stays at the head of the queue with its blocks. Where no block is left for a decode the last
    running sequence gives way, to the front of the queue.
    """

    def __init__(self, config: Row, requests: list[Row]) -> None:
        self.cache = build_cache(config)
        self.max_num_seqs: int = config["max_num_seqs"]
        self.max_num_batched_tokens: int = config["max_num_batched_tokens"]
        self.coming = sorted(enumerate(requests), key=lambda pair: pair[1]["arrival_step"])
        self.numbers = {row["id"]: number for number, row in enumerate(requests)}
        self.waiting: deque[NanoSequence] = deque()
        self.running: deque[NanoSequence] = deque()
        self.gave_up = False

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One step: what was scheduled and finished, and the state before and after its execution."""
        while self.coming and self.coming[0][1]["arrival_step"] <= op["step"]:
            _, row = self.coming.pop(0)
            prompt = [first + index for first, count in row["prompt"] for index in range(count)]
            self.waiting.append(NanoSequence(row["id"], prompt, row["max_tokens"]))
        before = list(self.running)
        scheduled = self._prompts()
        prefill = bool(scheduled)
        if not prefill:
            scheduled = self._decodes()
            self.gave_up = not scheduled and bool(self.waiting)
        out: Row = {
            "prefill": prefill,
            "scheduled": [[each.name, each.num_scheduled, each.num_cached] for each in scheduled],
            "preempted": [each.name for each in before if each not in self.running],
        }
        state: Row = {
            "running": [each.name for each in self.running],
            "waiting": [each.name for each in self.waiting],
            "free": self.cache.pool.num_free,
        }
        out["finished"] = [each.name for each in scheduled if self._execute(each)]
        state["free_after"] = self.cache.pool.num_free
        return out, state

    def _prompts(self) -> list[NanoSequence]:
        scheduled: list[NanoSequence] = []
        budget = self.max_num_batched_tokens
        while self.waiting and len(scheduled) < self.max_num_seqs and budget:
            sequence = self.waiting[0]
            if not sequence.held and not self._admit_within(sequence, budget, first=not scheduled):
                break
            rest = len(sequence.tokens) - sequence.num_cached
            if rest > budget and scheduled:
                break
            sequence.num_scheduled = min(rest, budget)
            budget -= sequence.num_scheduled
            scheduled.append(sequence)
            if sequence.num_scheduled == rest:
                self.running.append(self.waiting.popleft())
        return scheduled

    def _admit_within(self, sequence: NanoSequence, budget: int, first: bool) -> bool:
        """Admit the head of the queue; behind the first of a step only if its rest fits into the budget."""
        length = len(sequence.tokens)
        if not first:
            hit, _ = self.cache.hit(block_keys(sequence.tokens, self.cache.block_size), length)
            if length - hit > budget:
                return False
        return sequence.try_admit(self.cache)

    def _decodes(self) -> list[NanoSequence]:
        scheduled: list[NanoSequence] = []
        while self.running and len(scheduled) < self.max_num_seqs:
            sequence = self.running.popleft()
            while not sequence.try_append(self.cache):
                victim = self.running.pop() if self.running else sequence
                victim.release(self.cache)
                self.waiting.appendleft(victim)
                if victim is sequence:
                    break
            else:
                sequence.num_scheduled = 1
                scheduled.append(sequence)
        self.running.extendleft(reversed(scheduled))
        return scheduled

    def _execute(self, sequence: NanoSequence) -> bool:
        """Compute what was scheduled and sample a token if all is; whether that was the last."""
        sequence.hash_blocks(self.cache)
        if sequence.num_cached < len(sequence.tokens):
            return False
        sequence.num_generated += 1
        sequence.tokens.append(-(100_000 * (self.numbers[sequence.name] + 1) + sequence.num_generated))
        if sequence.num_generated < sequence.max_tokens:
            return False
        sequence.release(self.cache)
        self.running.remove(sequence)
        return True

    def check_integrity(self) -> None:
        """The pool's books against the tables."""
        self.cache.pool.check_integrity(each.holding.tables[0] for each in [*self.waiting, *self.running])
