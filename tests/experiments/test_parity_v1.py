"""`vllm_v1` over `prefix`, step by step against vLLM V1's loop written down plainly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.parity.replay import replay
from experiments.parity.v1 import SchedulerDriver
from tests.experiments.token_schedule import TokenDriver


def test_all_shared_scheduler_recordings(shared):
    files = sorted((shared / "parity" / "vllm_v1").glob("v1_*_sched_*.jsonl"))
    assert files
    for path in files:
        assert replay(path) == len(path.read_text(encoding="utf-8").splitlines()) - 1


runs = st.builds(
    lambda begin, more: [*begin, *more],
    st.lists(st.tuples(st.sampled_from([0, 100, 200]), st.integers(1, 8)), min_size=1, max_size=3),
    # what one of the requests generates, sometimes behind its prompt, as in the next turn of a conversation
    st.lists(st.tuples(st.sampled_from([100_000, 200_000, 300_000]), st.integers(1, 8)), max_size=1),
)
rows = st.lists(
    st.builds(
        lambda prompt, outputs, step, priority: {
            "prompt": prompt, "max_tokens": outputs, "arrival_step": step, "priority": priority
        },
        runs, st.sampled_from([1, 1, 2, 5, 12]), st.integers(0, 8), st.integers(0, 2),
    ),
    min_size=1, max_size=14,
)  # fmt: skip


def both(rows, oldest=False, **config):
    rows = [{"id": f"r{number}", **row} for number, row in enumerate(rows)]
    defaults = {
        "block_size": 4, "usable_blocks": 40, "max_num_seqs": 16, "max_num_batched_tokens": 64,
        "prefix_caching": True, "max_model_len": 8192, "long_prefill_token_threshold": 0, "chunked_prefill": True,
        "policy": "fcfs", "reserve_full_isl": True, "watermark": 0.0,
    }  # fmt: skip
    config = {**defaults, **config}
    config["num_blocks_including_null"] = config["usable_blocks"] + 1
    return [kind(config, rows, oldest=oldest) for kind in (SchedulerDriver, TokenDriver)]


def assert_equal(ours, plain, steps: int = 150) -> None:
    for step in range(steps):
        answer = ours.perform({"step": step})
        assert answer == plain.perform({"step": step}), f"step {step}"
        ours.check_integrity()
        state = answer[1]
        if not ours.coming and not state["running"] and not state["waiting"]:
            return


@settings(max_examples=150)
@given(
    rows=rows,
    oldest=st.booleans(),
    block_size=st.sampled_from([2, 4]),
    blocks=st.sampled_from([8, 12, 16, 40]),
    max_num_seqs=st.sampled_from([2, 4, 16]),
    budget=st.sampled_from([3, 5, 16, 64]),
    chunked=st.booleans(),
    caching=st.booleans(),
    threshold=st.sampled_from([0, 7]),
    longest=st.sampled_from([34, 8192]),
    policy=st.sampled_from(["fcfs", "priority"]),
    reserve=st.booleans(),
    watermark=st.sampled_from([0.0, 0.1, 0.2]),
)
def test_every_step_is_v1s(
    rows, oldest, block_size, blocks, max_num_seqs, budget, chunked, caching, threshold, longest, policy,
    reserve, watermark,
):  # fmt: skip
    assert_equal(
        *both(
            rows, oldest, block_size=block_size, usable_blocks=blocks, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget if chunked else 64, prefix_caching=caching, max_model_len=longest,
            long_prefill_token_threshold=threshold, chunked_prefill=chunked, policy=policy,
            reserve_full_isl=reserve, watermark=watermark,
        )
    )  # fmt: skip


@settings(max_examples=150)
@given(
    rows=rows,
    groups=st.lists(st.sampled_from(["full", 2, 3, 5, 8, 13]), min_size=1, max_size=4),
    oldest=st.booleans(),
    block_size=st.sampled_from([2, 4]),
    blocks=st.sampled_from([16, 24, 40, 100]),
    budget=st.sampled_from([3, 5, 16, 64]),
    caching=st.booleans(),
    reserve=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    watermark=st.sampled_from([0.0, 0.2]),
)
def test_every_step_is_v1s_over_several_groups(
    rows, groups, oldest, block_size, blocks, budget, caching, reserve, policy, watermark
):
    assert_equal(
        *both(
            rows, oldest, groups=groups, block_size=block_size, usable_blocks=blocks, prefix_caching=caching,
            max_num_batched_tokens=budget, reserve_full_isl=reserve, policy=policy, watermark=watermark,
        )
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_under_pressure_victims_find_their_blocks_again(policy):
    """Twelve requests that want thrice the memory: the comparison has victims, and hits after preemption."""
    asked = [
        {
            "prompt": [[1000 * number, 9]],
            "max_tokens": 12,
            "arrival_step": number // 2,
            "priority": -number % 5,
        }
        for number in range(12)
    ]
    ours, plain = both(asked, usable_blocks=24, block_size=2, policy=policy)
    resumed, found = 0, 0
    for step in range(200):
        answer = ours.perform({"step": step})
        assert answer == plain.perform({"step": step})
        out, state = answer
        resumed += len(out["resumed"])
        found += sum(out["cached_tokens_at_admission"].values())
        if not state["running"] and not state["waiting"]:
            break
    assert resumed > 3
    assert found > 20
    assert state["free_after"] == 24


def test_the_next_turn_finds_what_the_first_one_was_answered():
    """8 + 5 tokens, of which the last has no slot: three blocks, and a prompt that repeats all but that one."""
    rows = [
        {"prompt": [[0, 8]], "max_tokens": 5, "arrival_step": 0},
        {"prompt": [[0, 8], [100_000, 4], [7, 1]], "max_tokens": 1, "arrival_step": 9},
    ]
    ours, plain = both(rows)
    found = []
    for step in range(10):
        answer = ours.perform({"step": step})
        assert answer == plain.perform({"step": step})
        found.append(answer[0]["cached_tokens_at_admission"])
    assert (found[0], found[9]) == ({"r0": 0}, {"r1": 12})


def test_a_window_gives_back_before_anybody_gives_way():
    """A chunk is refused, and its request's own old blocks queue up before those of the victim, which is back later."""
    rows = [
        {"prompt": [[0, 26]], "max_tokens": 6, "arrival_step": 3},
        {"prompt": [[1000, 4]], "max_tokens": 13, "arrival_step": 2},
    ]
    ours, plain = both(
        rows, block_size=2, usable_blocks=11, max_num_batched_tokens=12, reserve_full_isl=False, groups=[8]
    )
    assert_equal(ours, plain)
