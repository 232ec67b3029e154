"""Sessions in the engine: when requests are sent, and what caches find of what came before."""

from __future__ import annotations

import pytest

from sim import Recorder, Request, Transfers, simulate, timing
from sim.audit.audit import Audit
from tests.sim.story import MS, Asked, Story, memory, scheduled
from workloads import Conversation, Streams, Synthetic, SystemPrompts, arrivals, lengths


class Chain:
    """A session of requests (pause in ms, message tokens, output tokens), one after the other."""

    def __init__(self, number: int, at: float, *turns: tuple[float, int, int]) -> None:
        self.number = number
        self.turns = list(turns)
        self.names: list[int] = []
        self.ends: list[int] = []
        self.over = False
        self.first = self._next(round(at * MS))[1]

    def _next(self, arrival: int = 0) -> tuple[int, Request]:
        pause, message, output = self.turns.pop(0)
        self.names.append(1000 * self.number + len(self.names))
        self.ends.append((self.ends[-1] if self.ends else 0) + message)
        request = Request(
            -1, arrival, self.ends[-1], output, content=tuple(self.names), content_ends=tuple(self.ends),
            output_content=1000 * self.number + len(self.names), session=self,
        )  # fmt: skip
        return round(pause * MS), request

    def answered(self, request: Request) -> list[tuple[int, Request]]:
        self.over = not self.turns or request.status == "rejected"
        self.names.append(request.output_content)
        self.ends.append(request.prompt_tokens + request.output_tokens)
        return [] if self.over else [self._next()]


def chains(*sessions: Chain, **options) -> Asked:
    return Asked([session.first for session in sessions], **options)


@pytest.mark.parametrize("kind", ["prefix", "radix"])
def test_a_turn_finds_the_whole_history_in_full_blocks(kind):
    """13 tokens are computed of the first turn, 10 + 4 - 1, and 12 of them fill blocks of four."""
    over = scheduled("vllm_v0", memory(kind, slots=64, block_size=4))
    story = Story(over, chains(Chain(0, 0, (0, 10, 4), (5, 3, 6), (5, 1, 1))))
    assert story.log == [
        "0: prompt 0(10)", "10: decode 0", "11: decode 0", "12: decode 0",
        "18: prompt 1(5)", "28: decode 1", "29: decode 1", "30: decode 1", "31: decode 1", "32: decode 1",
        "38: prompt 2(4)",
    ]  # fmt: skip
    assert story.column("requests", "cached_tokens") == [0, 12, 20]
    assert story.column("requests", "prompt_tokens") == [10, 17, 24]


def test_arrivals_go_before_what_answers_lead_to_at_the_same_instant():
    """The second turn of session 0 and session 1 both fall due at 13 ms."""
    story = Story(
        scheduled("vllm_v0", memory(slots=64)),
        chains(Chain(0, 0, (0, 4, 2), (2, 1, 1)), Chain(1, 13, (0, 4, 1))),
    )
    assert story.log == ["0: prompt 0(4)", "10: decode 0", "13: prompt 1(4) 2(7)"]
    assert story.column("requests", "arrival_time") == [0, 13, 13]


def test_a_shorter_pause_overtakes_a_longer_one():
    story = Story(
        scheduled("vllm_v0", memory(slots=64)),
        chains(Chain(0, 0, (0, 4, 1), (50, 1, 1)), Chain(1, 0, (0, 4, 2), (9, 1, 1))),
    )
    assert story.log == ["0: prompt 0(4) 1(4)", "10: decode 1", "20: prompt 2(7)", "60: prompt 3(6)"]


def test_a_client_of_a_closed_loop_stays_for_the_whole_session():
    story = Story(
        scheduled("vllm_v0", memory(slots=64)),
        chains(Chain(0, 0, (0, 4, 1), (1, 1, 1)), Chain(1, 0, (0, 5, 1)), clients=1, think_ms=30),
    )
    assert story.log == ["0: prompt 0(4)", "11: prompt 1(6)", "51: prompt 2(5)"]


def test_a_refused_turn_ends_its_session_alone():
    """The prompt of the second turn exceeds the model's 64 tokens."""
    story = Story(
        scheduled("vllm_v0", memory(slots=256)),
        chains(Chain(0, 0, (0, 40, 2), (0, 40, 1), (0, 1, 1)), Chain(1, 30, (0, 4, 1))),
    )
    assert story.column("requests", "status") == ["finished", "rejected", "finished"]
    assert story.log == ["0: prompt 0(40)", "10: decode 0", "30: prompt 2(4)"]


def talk(seed: int = 0, rate: float = 4.0) -> Synthetic:
    return Synthetic(
        Streams(seed),
        512,
        num_requests=300,
        arrivals=arrivals["poisson"](rate=rate),
        lengths=lengths["uniform"](prompt_max=40, output_max=40),
        system_prompts=SystemPrompts(count=100, zipf=0.8, tokens_median=60),
        session=Conversation(turns=3, think_time_s=1.0),
    )


@pytest.mark.parametrize("kind", ["prefix", "radix"])
@pytest.mark.parametrize("seed", range(3))
def test_a_sample_looks_at_few_sequences_of_many_that_share(kind, seed):
    """Those that are not looked at have written what is shared all the same."""
    over = scheduled("vllm_v0", memory(kind, slots=20_000, longest=512, block_size=4))
    audit = Audit(samples=200, num_requests=300)
    summary = simulate(
        talk(seed, rate=60.0),
        scheduler=over,
        timing=timing["fixed"](prefill_ms=10, decode_ms=10),
        transfers=Transfers(None, None, 4, copy_latency_us=0),
        recorder=Recorder(),
        max_model_len=512,
        probe=audit,
    )
    assert summary["requests_finished"] == 300
    assert summary["prefix_hit_rate"] > 0.2
    assert audit.num_samples > 10


def test_stretches_change_nothing_in_sessions():
    runs = [
        Story(
            scheduled("vllm_v0", memory("prefix", slots=900, longest=512, block_size=4)), talk(), stretches=on
        )
        for on in (True, False)
    ]
    assert repr(runs[0].summary) == repr(runs[1].summary)
    for column in ("arrival_time", "finish_time", "cached_tokens"):
        assert runs[0].column("requests", column) == runs[1].column("requests", column)
