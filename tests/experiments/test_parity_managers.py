"""Managers of recordings: the replay through the allocators that run against the same rules written down plainly."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.parity import nano as parity_nano
from experiments.parity import radix as parity_radix
from experiments.parity import v1 as parity_v1
from tests.experiments import plain_nano, plain_radix, plain_v1

Row = dict[str, Any]


class Caller:
    """Calls two managers alike, at random, and compares all that they answer and show."""

    def __init__(self, random: Random, *drivers) -> None:
        self.random = random
        self.drivers = drivers
        self.live: list[str] = []  # requests that hold something
        self.away: list[str] = []  # and those that were preempted
        self.lengths: dict[str, int] = {}
        self.counter = 0

    def __call__(self, op: str, **arguments) -> Row:
        ours, plain = (driver.perform({"op": op, **arguments}) for driver in self.drivers)
        assert ours == plain, (op, arguments)
        self.drivers[0].check_integrity()
        return ours[0]

    def new(self) -> str:
        self.counter += 1
        return f"r{self.counter}"

    def tokens(self, longest: int = 24) -> list[int]:
        """Prompts that begin alike, some with a few tokens of their own behind."""
        random = self.random
        family = random.randrange(3)
        prompt = [1000 * family + index for index in range(random.randint(1, longest))]
        if random.random() < 0.3:
            prompt += [random.randrange(5) for _ in range(random.randint(1, 4))]
        return prompt

    def token(self) -> int:
        """Few enough that generated tokens repeat those of others, and of prompts."""
        return self.random.choice([self.random.randrange(3), 1000 + self.random.randrange(24)])

    def pick(self, names: list[str]) -> str:
        return names[self.random.randrange(len(names))]


def randoms():
    return st.randoms(use_true_random=False)


@settings(max_examples=120)
@given(
    random=randoms(),
    block_size=st.sampled_from([1, 2, 4]),
    blocks=st.integers(4, 20),
    watermark=st.sampled_from([0, 0, 2]),
    caching=st.sampled_from([True, True, False]),
    groups=st.sampled_from([["full"], ["full"], ["full", 5], [4], [6, "full", 3], [1], [None, None]]),
    oldest=st.booleans(),
)
def test_v1(random, block_size, blocks, watermark, caching, groups, oldest):
    config = {
        "block_size": block_size, "usable_blocks": blocks, "watermark_blocks": watermark, "prefix_caching": caching,
        "groups": groups,
    }  # fmt: skip
    drivers = [module.ManagerDriver(config, keyless_first=not oldest) for module in (parity_v1, plain_v1)]
    do = Caller(random, *drivers)
    for _ in range(50):
        op = random.choice(["admit", "admit", "append", "append", "append", "more", "free", "preempt", "resume",
                            "probe", "reset"])  # fmt: skip
        chunk = {"chunk": random.randint(1, 9)} if random.random() < 0.4 else {}
        if op == "admit":
            name = do.new()
            if do("admit", r=name, tokens=do.tokens(), **chunk)["ok"]:
                do.live.append(name)
        elif op == "probe":
            do("probe", tokens=do.tokens())
        elif op == "reset":
            do("reset_prefix_cache")
        elif op == "resume" and do.away:
            name = do.pick(do.away)
            if do("resume", r=name, **chunk)["ok"]:
                do.away.remove(name)
                do.live.append(name)
        elif do.live:
            name = do.pick(do.live)
            if op == "append":
                do("append", r=name, token=do.token())
            elif op == "more" and drivers[0].requests[name].missing:
                do("continue_prefill", r=name, chunk=random.randint(1, 9))
            elif op == "free":
                do.live.remove(name)
                do("free", r=name)
            elif op == "preempt":
                do.live.remove(name)
                do.away.append(name)
                do("preempt", r=name)


@settings(max_examples=80)
@given(random=randoms(), block_size=st.sampled_from([1, 2, 4]), blocks=st.integers(3, 16))
def test_nano(random, block_size, blocks):
    config = {"block_size": block_size, "num_blocks": blocks}
    do = Caller(random, parity_nano.ManagerDriver(config), plain_nano.ManagerDriver(config))
    for _ in range(50):
        op = random.choice(["admit", "admit", "append", "append", "append", "free", "resume", "probe"])
        if op == "admit":
            name = do.new()
            if do("admit", r=name, tokens=do.tokens())["ok"]:
                do.live.append(name)
        elif op == "probe":
            do("probe", tokens=do.tokens())
        elif op == "resume" and do.away:
            name = do.pick(do.away)
            if do("resume", r=name)["ok"]:
                do.away.remove(name)
                do.live.append(name)
        elif do.live:
            name = do.pick(do.live)
            if op == "append" and not do("append", r=name, token=do.token())["ok"]:
                do.live.remove(name)
                do.away.append(name)
            elif op == "free":
                do.live.remove(name)
                do("free", r=name)


@settings(max_examples=80)
@given(random=randoms(), page_size=st.sampled_from([1, 2, 4]), pages=st.integers(3, 30))
def test_mini_sglang(random, page_size, pages):
    config = {"page_size": page_size, "num_pages": pages}
    do = Caller(random, parity_radix.CacheDriver(config), plain_radix.CacheDriver(config))
    left: dict[str, int] = {}
    prompts: list[str] = []  # admitted, and not computed yet
    for _ in range(60):
        op = random.choice(["admit", "admit", "decode", "decode", "decode", "finish", "probe", "prefill"])
        if op == "admit":
            name, outputs = do.new(), random.randint(1, 6)
            if do("admit", r=name, tokens=do.tokens(), out_len=outputs)["ok"]:
                prompts.append(name)
                left[name] = outputs
        elif op == "probe":
            do("probe", tokens=do.tokens())
        elif op == "prefill" and prompts:
            name = prompts.pop(random.randrange(len(prompts)))
            do("prefill_done", r=name, token=do.token())
            left[name] -= 1
            do.live.append(name)
        elif do.live:
            name = do.pick(do.live)
            if op == "decode" and left[name]:
                left[name] -= 1
                do("decode", r=name, token=do.token())
            elif op == "finish":  # some before their last token
                do.live.remove(name)
                do("finish", r=name)
