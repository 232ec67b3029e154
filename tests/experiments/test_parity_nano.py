"""`nano_vllm` over its allocator, step by step against nano-vllm's loop written down plainly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.parity.nano import SchedulerDriver
from tests.experiments import plain_nano

prompts = st.lists(
    st.tuples(st.sampled_from([0, 0, 100, 500]), st.integers(1, 9)), min_size=1, max_size=3
).map(lambda runs: [list(run) for run in runs])


@settings(max_examples=400)
@given(
    asked=st.lists(st.tuples(st.integers(0, 6), prompts, st.integers(1, 14)), min_size=1, max_size=10),
    num_blocks=st.integers(3, 14),
    max_num_seqs=st.sampled_from([1, 2, 3, 16]),
    budget=st.sampled_from([3, 8, 20, 200]),
)
def test_every_step_is_nanos(asked, num_blocks, max_num_seqs, budget):
    config = {
        "num_blocks": num_blocks, "block_size": 4, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget,
    }  # fmt: skip
    rows = [
        {"id": f"r{number}", "arrival_step": at, "prompt": prompt, "max_tokens": output}
        for number, (at, prompt, output) in enumerate(asked)
    ]
    ours, plain = SchedulerDriver(config, rows), plain_nano.SchedulerDriver(config, rows)
    for number in range(2000):
        expected = plain.perform({"step": number})
        answer = ours.perform({"step": number})
        ours.check_integrity()
        assert ours.gave_up == plain.gave_up, f"step {number}"
        assert answer == expected, f"step {number}"
        if plain.gave_up or not (plain.waiting or plain.running or plain.coming):
            return
    pytest.fail("the plain loop comes to no end")
