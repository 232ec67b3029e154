"""What only recordings of vLLM V0 have: samples that end apart, beams that turn over, an engine that dies."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.parity.replay import Difference, replay
from experiments.parity.v0 import SchedulerDriver
from experiments.parity.v0_manager import CachedManagerDriver
from tests.experiments.chunked_v0 import ChunkedDriver


def driver(requests, **config) -> SchedulerDriver:
    defaults = {
        "block_size": 4, "num_gpu_blocks": 40, "num_cpu_blocks": 40, "watermark_blocks": 0, "prompt_limit": 64,
        "max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 64, "chunked_prefill": False,
    }  # fmt: skip
    rows = [{"id": f"r{number}", "arrival_step": 0, **row} for number, row in enumerate(requests)]
    return SchedulerDriver({**defaults, **config}, rows)


def run(driver: SchedulerDriver, steps: int) -> list[tuple]:
    seen = []
    for step in range(steps):
        out, state = driver.perform({"step": step})
        driver.check_integrity()
        seen.append((out["scheduled"], out["cow"], state["blocks"], out["finished"]))
    return seen


def test_where_v0_dies_ours_gives_the_group_up(tmp_path):
    """Two pairs in 8 blocks without a host pool: the second has nowhere to go."""
    config = {
        "block_size": 4, "num_gpu_blocks": 8, "num_cpu_blocks": 0, "watermark_blocks": 0, "prompt_limit": 64,
        "max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 64, "chunked_prefill": False,
    }  # fmt: skip
    requests = [
        {"id": f"r{number}", "arrival_step": 0, "prompt_len": 8, "out_lens": [9, 9], "n": 2}
        for number in range(2)
    ]
    ours = SchedulerDriver(config, requests)
    header = {"kind": "header", "peer": "vllm-V0", "version": "0.4.2", "config": config, "requests": requests}
    lines = [header]
    for step in range(6):
        out, state = ours.perform({"step": step})
        if ours.gave_up:
            out = {"engine_error": "no room on the host"}
        lines.append({"i": step, "op": {"step": step}, "out": out, "state": state})
        if ours.gave_up:
            break
    recorded = tmp_path / "dies.jsonl"
    recorded.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert replay(recorded) == len(lines) - 1 == 3
    lines[2]["out"] = {"engine_error": "too early"}
    recorded.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(
        Difference, match=r"dies\.jsonl:3: out.engine_error: expected an engine error, got none"
    ):
        replay(recorded)


def test_samples_that_are_done_count_no_longer():
    """max_num_seqs 4: three samples let no pair in, two do."""
    rows = {"prompt_len": 4, "out_lens": [2, 6, 6], "n": 3}, {"prompt_len": 4, "out_lens": [3, 3], "n": 2}
    seen = run(driver(rows, max_num_seqs=4), 8)
    assert [scheduled for scheduled, *_ in seen] == [
        [["r0", 4, 1]],
        [["r0", 1, 3]],  # the first sample is done
        [["r1", 4, 1]],
        [["r0", 1, 2], ["r1", 1, 2]],
        [["r0", 1, 2], ["r1", 1, 2]],
        [["r0", 1, 2]],
        [["r0", 1, 2]],
        [],
    ]
    assert [finished for *_, finished in seen] == [[], [], [], [], ["r1"], [], ["r0"], []]


def test_beams_that_turn_over():
    rows = [{"prompt_len": 5, "out_lens": [6, 6], "n": 2, "beam": True}]
    seen = run(driver(rows), 6)
    assert [(copies, blocks["r0"]) for _, copies, blocks, _ in seen] == [
        (0, [2]),
        (1, [2, 2]),  # 6 tokens each
        (0, [2, 2]),  # 7, and 3 generated: the first is forked, the last dies
        (1, [2, 2]),  # 8, one copies
        (0, [3, 3]),
        (0, [3, 3]),
    ]
    assert seen[-1][3] == ["r0"]


# V0's chunked mode


def chunked(requests, kind=SchedulerDriver, **config):
    defaults = {
        "block_size": 4, "num_gpu_blocks": 40, "num_cpu_blocks": 40, "watermark_blocks": 0, "prompt_limit": 64,
        "max_num_batched_tokens": 16, "max_num_seqs": 8, "max_model_len": 64, "chunked_prefill": True,
    }  # fmt: skip
    rows = [{"id": f"r{number}", "arrival_step": 0, **row} for number, row in enumerate(requests)]
    return kind({**defaults, **config}, rows)


def test_decodes_and_pieces_of_prompts_from_the_tests_of_vllm():
    """Budget 64, prompts of 60: 60 + 4, then 56 and a token, then with a third prompt 64 again."""
    rows = [{"prompt_len": 60, "out_lens": [9], "arrival_step": step} for step in (0, 0, 2)]
    driver = chunked(rows, num_gpu_blocks=400, max_num_batched_tokens=64)
    seen = [driver.perform({"step": step})[0] for step in range(3)]
    assert [out["scheduled"] for out in seen] == [
        [["r0", 60, 1], ["r1", 4, 1]],
        [["r1", 56, 1], ["r0", 1, 1]],
        [["r2", 60, 1], ["r0", 1, 1], ["r1", 1, 1]],
    ]
    assert [out["batched_tokens"] for out in seen] == [64, 57, 62]


group_rows = st.builds(
    lambda prompt, outs, step, beam: {
        "prompt_len": prompt, "arrival_step": step, "n": len(outs), "beam": beam and len(outs) > 1,
        "out_lens": outs,
    },
    st.integers(1, 30), st.lists(st.integers(2, 12), min_size=1, max_size=3), st.integers(0, 6), st.booleans(),
)  # fmt: skip


@pytest.mark.parametrize("mode", [driver, chunked])
@settings(max_examples=100)
@given(rows=st.lists(group_rows, min_size=1, max_size=8), blocks=st.sampled_from([14, 20, 40]))
def test_every_group_comes_to_its_end(mode, rows, blocks):
    engine = mode(rows, num_gpu_blocks=blocks)
    over: list[str] = []
    for step in range(400):
        out, state = engine.perform({"step": step})
        engine.check_integrity()
        if engine.gave_up:
            return
        over += out["finished"] + out["ignored"]
        if len(over) == len(rows):
            break
        assert all(tokens > 0 for _, tokens, _ in out["scheduled"])
    assert sorted(over) == sorted(f"r{number}" for number in range(len(rows)))
    assert state["free_gpu_after"] == blocks


@settings(max_examples=300)
@given(
    rows=st.lists(group_rows, min_size=1, max_size=8),
    blocks=st.sampled_from([14, 20, 40]),
    budget=st.sampled_from([8, 16, 40]),
    max_num_seqs=st.sampled_from([3, 8]),
)
def test_the_scheduler_in_chunks_against_one_that_looks_at_everybody(rows, blocks, budget, max_num_seqs):
    config = {"num_gpu_blocks": blocks, "max_num_batched_tokens": budget, "max_num_seqs": max_num_seqs}
    ours, oracle = (chunked(rows, kind, **config) for kind in (SchedulerDriver, ChunkedDriver))
    for step in range(200):
        (out, state), expected = ours.perform({"step": step}), oracle.perform({"step": step})
        if oracle.gave_up:
            assert ours.gave_up
            return
        assert (out, state) == expected
        ours.check_integrity()
        if not state["running"] and not state["waiting"] and not state["swapped"]:
            return


# V0's prefix caching


class Cached:
    """Operations in short form on a manager with prefix caching."""

    def __init__(self, blocks: int = 8, host: int = 0) -> None:
        config = {"block_size": 4, "watermark_blocks": 0, "num_gpu_blocks": blocks, "num_cpu_blocks": host}
        self.driver = CachedManagerDriver(config)

    def __call__(self, op: str, **arguments):
        out, self.state = self.driver.perform({"op": op, **arguments})
        self.driver.check_integrity()
        return out


def test_a_prompt_finds_all_its_blocks_and_skips_those_that_are_computed():
    do = Cached()
    tokens = list(range(10))
    assert do("alloc", g="a", s=0, tokens=tokens) == {
        "status": "OK",
        "reused_blocks": 0,
        "computed_blocks": 0,
    }
    out = do("alloc", g="b", s=1, tokens=tokens)
    assert out == {"status": "OK", "reused_blocks": 3, "computed_blocks": 1}, (
        "one full block less is computed"
    )
    assert do.state["tables"] == {"0": [0, 1, 2], "1": [0, 1, 2]}
    assert do("append", g="b", tokens={"1": 7}) == {"ok": True, "cow": 1, "cow_seqs": [1]}, (
        "the tail is shared"
    )
    assert do("append", g="a", tokens={"0": 7}) == {"ok": True, "cow": 0, "cow_seqs": []}
    assert do("append", g="a", tokens={"0": 8})["cow"] == 0
    assert do.state["ref_hist"] == {"1": 2, "2": 2}
    do("append", g="b", tokens={"1": 8})
    assert do.state["tables"] == {"0": [0, 1, 2], "1": [0, 1, 2]}, "full and equal: held once again"
    assert (do.state["free_gpu"], do.state["used_gpu"]) == (5, 3)


def test_the_oldest_goes_first_and_of_equals_the_deepest():
    do = Cached(blocks=6)
    do("alloc", g="a", s=0, tokens=list(range(12)))
    do("finish", g="a", s=0)
    do("alloc", g="b", s=1, tokens=list(range(50, 58)))
    do("finish", g="b", s=1)
    assert do.state["free_gpu"] == 6
    do("alloc", g="c", s=2, tokens=list(range(90, 98)))  # a new block, and the deepest of a
    do("finish", g="c", s=2)
    assert do("alloc", g="d", s=3, tokens=list(range(12)))["reused_blocks"] == 2


def test_blocks_that_move_keep_what_they_are_known_by():
    do = Cached(blocks=8, host=8)
    tokens = list(range(9))
    do("alloc", g="a", s=0, tokens=tokens)
    do("fork", g="a", parent=0, child=1)
    assert do("swap_out", g="a") == {"ok": True, "blocks": 3}
    assert do.state["cpu_tables"] == {"0": [0, 1, 2], "1": [0, 1, 2]}
    assert do("alloc", g="b", s=2, tokens=tokens)["reused_blocks"] == 3
    assert do("swap_in", g="a") == {"status": "OK", "blocks": 3}
    assert do.state["tables"] == {"0": [0, 1, 2], "1": [0, 1, 2], "2": [0, 1, 2]}
    assert do.state["ref_hist"] == {"3": 3}
