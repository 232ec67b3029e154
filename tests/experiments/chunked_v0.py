"""V0's chunked mode once more, every group looked at in every step: the oracle of `vllm_v0` with chunked prefill."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from experiments.parity.rows import Row
from experiments.parity.tokens import ENDLESS
from experiments.parity.v0_manager import build_memory
from sim import Admission, Request, Sequence
from sim.beams import fork


class Group:
    """A request of a recording: its branches, what of its prompt is computed, and what it may grow to."""

    def __init__(self, row: Row, number: int) -> None:
        self.row = row
        self.name: str = row["id"]
        self.width: int = row.get("n", 1)
        self.beam = bool(row.get("beam"))
        self.request = Request(number, 0, row["prompt_len"], max(row["out_lens"]), n=self.width)
        self.samples: dict[Sequence, int] = {}
        self.computed = 0  # tokens of the prompt, and of what is computed again
        self.forked = False

    @property
    def branches(self) -> list[Sequence]:
        """Branches that are not done."""
        return self.request.sequences

    @property
    def rest(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        return self.request.prefill_tokens - self.computed

    @property
    def seats(self) -> int:
        """Sequences that V0 counts for it."""
        return self.width if self.beam or not self.forked else len(self.branches)

    def final(self, branch: Sequence) -> int:
        """Tokens that a branch ends with."""
        return int(self.row["prompt_len"] + self.row["out_lens"][self.samples[branch]] - 1)


class ChunkedDriver:
    """The chunked mode of vLLM 0.4.2 (`core/scheduler.py`) over the paged allocator, a step at a time.

    Running groups first, in order of arrival: a token for each branch, or what the budget leaves of a prompt.
    Then swapped groups, unless somebody gave way, then the queue. A prompt's blocks are all taken at admission.
    """

    def __init__(self, config: Row, requests: list[Row]) -> None:
        self.memory = build_memory(config, config["max_model_len"])
        self.max_num_seqs: int = config["max_num_seqs"]
        self.max_num_batched_tokens: int = config["max_num_batched_tokens"]
        self.prompt_limit: int = config["prompt_limit"]
        self.coming = sorted(requests, key=lambda row: row["arrival_step"])
        self.number = 0
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []
        self.swapped: list[Group] = []
        self.gave_up = False

    def perform(self, op: Row) -> tuple[Row, Row]:
        """One step: what was scheduled and finished, and the state before and after its execution."""
        while self.coming and self.coming[0]["arrival_step"] <= op["step"]:
            self.waiting.append(Group(self.coming.pop(0), self.number))
            self.number += 1
        self.budget, self.seats = self.max_num_batched_tokens, self.max_num_seqs
        self.out: Row = {
            "preempted": [], "swapped_out": [], "swapped_in": [], "blocks_out": 0, "blocks_in": 0, "cow": 0,
            "ignored": [],
        }  # fmt: skip
        prompts, decodes, left = self._continue()
        back = [] if self.out["preempted"] or self.out["swapped_out"] else self._swap_in()
        new = self._admit()
        for group in self.preempted:
            self.waiting.appendleft(group)
        self.swapped += self.evicted
        back_prompts = [each for each in back if each[0].rest]
        back_decodes = [each for each in back if not each[0].rest]
        self.running = left + [group for group, _ in [*new, *decodes, *prompts, *back_decodes, *back_prompts]]
        first = [*new, *prompts, *back_prompts]
        batch = [*first, *decodes, *back_decodes]
        self.out |= {
            "scheduled": [[group.name, tokens, len(group.branches)] for group, tokens in batch],
            "prefill_groups": len(first),
            "batched_tokens": self.max_num_batched_tokens - self.budget,
        }
        memory = self.memory
        state: Row = {
            "running": _names(self.running),
            "waiting": _names(self.waiting),
            "swapped": _names(self.swapped),
            "free_gpu": memory.pool.num_free,
            "free_cpu": memory.host_pool.num_free,
            "blocks": {
                group.name: [len(branch.block_table) for branch in group.branches] for group in self.running
            },
        }
        self.out["finished"] = [group.name for group, tokens in batch if self._execute(group, tokens)]
        state["free_gpu_after"] = memory.pool.num_free
        return self.out, state

    def _tokens(self, group: Group) -> int:
        """Tokens that the group would compute in this step."""
        tokens = group.rest or len(group.branches)
        return min(tokens, self.budget) if len(group.branches) <= 1 else tokens

    def _take(self, group: Group, tokens: int) -> tuple[Group, int]:
        self.budget -= tokens
        self.seats -= group.seats
        return group, tokens if group.rest else 1

    def _continue(self) -> tuple[list[tuple[Group, int]], list[tuple[Group, int]], list[Group]]:
        """Running groups: prompts and decodes of this step, and those that the budget leaves out."""
        queue = deque(sorted(self.running, key=_arrival))
        prompts: list[tuple[Group, int]] = []
        decodes: list[tuple[Group, int]] = []
        self.preempted: list[Group] = []
        self.evicted: list[Group] = []
        while queue:
            group = queue[0]
            tokens = self._tokens(group)
            if tokens == 0:
                break
            queue.popleft()
            while not self.memory.can_append(group.request):
                victim = queue.pop() if queue else group
                self._preempt(victim)
                if victim is group:
                    break
            else:
                (prompts if group.rest else decodes).append(self._take(group, tokens))
                self._append(group)
        return prompts, decodes, list(queue)

    def _append(self, group: Group) -> None:
        """Slots for the next token of every branch; a prompt has its slots."""
        if not group.rest:
            for branch in group.branches:
                self.out["cow"] += self.memory.append(branch)
            for branch in group.branches:
                branch.origin += 1
                self.memory.num_tokens += 1

    def _preempt(self, group: Group) -> None:
        if group.seats == 1:
            (branch,) = group.branches
            group.request.prefill_tokens = branch.num_tokens + (0 if group.rest else 1)
            group.computed = 0
            self.memory.free(branch)
            self.preempted.append(group)
            self.out["preempted"].append(group.name)
        elif self.memory.can_swap_out(group.request):
            self.out["blocks_out"] += self.memory.swap_out(group.request)
            self.evicted.append(group)
            self.out["swapped_out"].append(group.name)
        else:
            self.gave_up = True

    def _swap_in(self) -> list[tuple[Group, int]]:
        back: list[tuple[Group, int]] = []
        self.swapped.sort(key=_arrival)
        while self.swapped:
            group = self.swapped[0]
            admission = self.memory.swap_in_admission(group.request)
            if admission is Admission.LATER:
                break
            if admission is Admission.NEVER:
                self.swapped.pop(0)
                for branch in list(group.branches):
                    self.memory.free(branch)
                self.out["ignored"].append(group.name)
                continue
            tokens = self._tokens(group)
            if tokens == 0 or tokens > self.budget or group.seats > self.seats:
                break
            self.swapped.pop(0)
            self.out["blocks_in"] += self.memory.swap_in(group.request)
            self.out["swapped_in"].append(group.name)
            back.append(self._take(group, tokens))
            self._append(group)
        return back

    def _admit(self) -> list[tuple[Group, int]]:
        new: list[tuple[Group, int]] = []
        while self.waiting:
            group = self.waiting[0]
            request = group.request
            tokens = min(group.rest, self.budget)
            if tokens > self.prompt_limit:
                admission = Admission.NEVER
            else:
                admission = self.memory.admission(request, request.prefill_tokens)
            if admission is Admission.NEVER:
                self.out["ignored"].append(self.waiting.popleft().name)
                continue
            if admission is Admission.LATER or tokens == 0 or group.seats > self.seats:
                break
            self.waiting.popleft()
            if not request.sequences:
                request.sequences.append(Sequence(request, 0, 0, ENDLESS))
            self.memory.admit(request.sequences[0], request.prefill_tokens)
            new.append(self._take(group, tokens))
        return new

    def _execute(self, group: Group, tokens: int) -> bool:
        """Compute what was scheduled; whether the group has all its tokens then."""
        if group.rest:
            group.computed += tokens
            if group.rest:
                return False
            if not group.forked:
                self._fork(group)
        elif group.beam:
            self._turn_over(group)
        for branch in list(group.branches):
            if branch.num_tokens == group.final(branch):
                self.memory.free(branch)
                group.branches.remove(branch)
        if group.branches:
            return False
        self.running.remove(group)
        return True

    def _fork(self, group: Group) -> None:
        """The children are the first samples, the parent is the last."""
        group.forked = True
        (parent,) = group.branches
        group.branches.extend([fork(self.memory, parent) for _ in range(1, group.width)])
        for sample, branch in enumerate([*group.branches[1:], parent]):
            group.samples[branch] = sample

    def _turn_over(self, group: Group) -> None:
        """At every third token the first beam is forked and the last one dies; the fork takes its place."""
        first, last = group.branches[0], group.branches[-1]
        if (first.num_tokens + 1 - group.row["prompt_len"]) % 3:
            return
        child = fork(self.memory, first)
        group.samples[child] = group.samples[last]
        group.branches.append(child)
        self.memory.free(last)
        group.branches.remove(last)

    def check_integrity(self) -> None:
        """The allocator's books."""
        self.memory.check_integrity()


def _names(groups: Iterable[Group]) -> list[str]:
    return [group.name for group in groups]


def _arrival(group: Group) -> int:
    return group.request.id
