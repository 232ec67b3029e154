"""V0's prefix caching: `paged` with `prefix_caching` against V0's rules written down block by block."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.parity.rows import canonical
from experiments.parity.v0_manager import CachedManagerDriver
from sim import Admission, Request, Sequence
from sim.decode_set import DecodeSet
from tests.experiments import plain_v0_cached
from tests.experiments.test_parity_managers import Caller
from tests.sim.story import memory


@settings(max_examples=200)
@given(
    random=st.randoms(use_true_random=False),
    block_size=st.sampled_from([1, 2, 4]),
    blocks=st.integers(4, 20),
    host=st.sampled_from([0, 6, 20]),
    watermark=st.sampled_from([0, 0, 1]),
)
def test_every_operation_is_v0s(random, block_size, blocks, host, watermark):
    config = {
        "block_size": block_size, "num_gpu_blocks": blocks, "num_cpu_blocks": host, "watermark_blocks": watermark,
    }  # fmt: skip
    do = Caller(random, CachedManagerDriver(config), plain_v0_cached.CachedManagerDriver(config))
    members: dict[str, list[int]] = {}
    away: set[str] = set()
    count = 0
    for _ in range(50):
        op = random.choice(
            ["alloc", "alloc", "append", "append", "append", "finish", "fork", "swap_out", "swap_in"]
        )
        there = [group for group in members if group not in away]
        if op == "alloc":
            count += 1
            group = do.new()
            if do("alloc", g=group, s=count, tokens=do.tokens(18))["status"] == "OK":
                members[group] = [count]
        elif op == "swap_in" and away:
            group = do.pick(sorted(away))
            if do("swap_in", g=group)["status"] == "OK":
                away.remove(group)
        elif op == "finish" and members:
            group = do.pick(list(members))
            gone = random.choice(members[group])
            do("finish", g=group, s=gone)
            members[group].remove(gone)
            if not members[group]:
                del members[group]
                away.discard(group)
        elif there:
            group = do.pick(there)
            if op == "append":
                do("append", g=group, tokens={str(each): do.token() for each in members[group]})
            elif op == "fork":
                count += 1
                do("fork", g=group, parent=random.choice(members[group]), child=count)
                members[group].append(count)
            elif op == "swap_out" and do("swap_out", g=group)["ok"]:
                away.add(group)


class PlainSteps(plain_v0_cached.CachedManagerDriver):
    """The plain manager in a scheduler's hands: what a step computes counts as computed when it is over."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.marked: list[plain_v0_cached.Branch] = []

    def mark(self, branch) -> None:
        self.marked.append(branch)

    def end_step(self) -> None:
        for branch in self.marked:
            super().mark(branch)
        self.marked = []


class Server:
    """Steps as V0's scheduler takes them, on the class as it runs and on the plain manager beside it.

    A step computes prompts, or gives all that run a token; the tokens are nobody else's.
    """

    def __init__(self, block_size: int, blocks: int) -> None:
        self.over = memory(
            "paged", slots=blocks * block_size, longest=10**6, block_size=block_size, watermark=0.0,
            prefix_caching=True,
        )  # fmt: skip
        config = {
            "block_size": block_size, "num_gpu_blocks": blocks, "num_cpu_blocks": 0, "watermark_blocks": 0,
        }  # fmt: skip
        self.plain = PlainSteps(config)
        self.decodes = DecodeSet()
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.tokens: dict[Sequence, list[int]] = {}
        self.step = 0
        self.found = 0

    def arrive(self, prompt: list[int], outputs: int) -> None:
        request = Request(len(self.tokens), 0, len(prompt), outputs, content=tuple(prompt), content_grain=1)
        sequence = Sequence(request, 0, 0, len(prompt) + outputs - 1)
        request.sequences.append(sequence)
        self.tokens[sequence] = prompt
        self.waiting.append(sequence)

    def admit(self, most: int) -> None:
        """A step of prompts; `computed` is told of all of them when it is over."""
        self.step += 1
        admitted = []
        while self.waiting and len(admitted) < most:
            sequence = self.waiting[0]
            tokens, request = self.tokens[sequence], sequence.request
            answer = self.over.admission(request, len(tokens))
            self.plain.clock = self.step - 1
            told = self.plain.alloc(str(request.id), request.id, tokens)
            assert told["status"] == answer.name
            if answer is not Admission.OK:
                break
            expected = self.over.cached_tokens(request, len(tokens))
            cached = self.over.admit(sequence, len(tokens))
            assert cached == expected == told["computed_blocks"] * self.over.block_size
            self.found += cached
            admitted.append(self.waiting.pop(0))
        self.plain.end_step()
        for sequence in admitted:
            self.over.computed(sequence)
            if sequence.origin < sequence.final_tokens:
                self.decodes.join(sequence)
                self.running.append(sequence)
            else:
                self.over.free(sequence)
                self.plain.finish(str(sequence.request.id), sequence.request.id)

    def decode(self) -> None:
        """A step in which all that run gain a token; the last ones give way while blocks are short."""
        index = 0
        self.step += 1
        while index < len(self.running):
            sequence = self.running[index]
            request = sequence.request
            if not self.over.can_append(request):
                self.preempt(self.running[-1])
                continue
            token = 10**6 * (request.id + 1) + len(self.tokens[sequence])
            self.tokens[sequence] = [*self.tokens[sequence], token]
            copies = self.over.append(sequence)
            self.plain.clock = self.step - 1
            told = self.plain.append(str(request.id), {str(request.id): token})
            assert told == {"ok": True, "cow": copies, "cow_seqs": [request.id] * copies}
            index += 1
        self.decodes.copy_pending = []
        self.decodes.note_grown(
            self.decodes.clock + 1, self.decodes.growths.pop(self.decodes.clock + 1, []), None
        )
        self.plain.end_step()
        if self.running:
            self.decodes.advance()
            self.over.num_ticks += 1
            self.over.num_tokens += self.decodes.size
        for sequence in self.decodes.take_finished():
            self.running.remove(sequence)
            self.over.free(sequence)
            self.plain.finish(str(sequence.request.id), sequence.request.id)

    def preempt(self, sequence: Sequence) -> None:
        """The slots are given back; what is computed again is all that was generated too."""
        request = sequence.request
        self.decodes.leave(sequence)
        self.running.remove(sequence)
        token = 10**6 * (request.id + 1) + len(self.tokens[sequence])  # sampled, and without a slot
        self.tokens[sequence] = [*self.tokens[sequence], token]
        request.prefill_tokens = sequence.origin + 1
        request.preemptions += 1
        self.over.free(sequence)
        self.plain.finish(str(request.id), request.id)
        self.waiting.insert(0, sequence)

    def compare(self) -> None:
        self.over.check_integrity()
        assert self.over.pool.num_free == self.plain.device.num_free
        tables = {str(each.request.id): each.block_table for each in self.running}
        assert canonical(tables) == self.plain.state()["tables"]


@settings(max_examples=150)
@given(
    random=st.randoms(use_true_random=False),
    block_size=st.sampled_from([1, 2, 4]),
    blocks=st.integers(6, 30),
)
def test_what_is_left_for_later_comes_to_the_same(random, block_size, blocks):
    """In a run, keys and times of use are set when somebody leaves; V0 sets them with every step."""
    server = Server(block_size, blocks)
    for _ in range(60):
        if random.random() < 0.4:
            family = random.randrange(3)
            prompt = [100 * family + index for index in range(random.randint(1, 14))]
            if random.random() < 0.3:
                prompt.append(7)
            server.arrive(prompt, random.randint(1, 8))
        if server.waiting and (random.random() < 0.5 or not server.running):
            server.admit(random.randint(1, 3))
        else:
            server.decode()
        server.compare()
    while server.running:
        server.decode()
        server.compare()


@pytest.mark.parametrize(("blocks", "hits"), [(8, 0), (40, 1)])
def test_the_comparison_has_hits_and_preemptions(blocks, hits):
    server = Server(2, blocks)
    for number in range(4):
        server.arrive([1, 2, 3, 4, 5], 6)
        server.admit(1)
        server.decode()
        server.compare()
        if number == 2 and server.running:
            server.preempt(server.running[-1])
            server.compare()
    assert server.found > 0 or not hits
