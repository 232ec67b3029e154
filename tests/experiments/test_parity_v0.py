"""What only recordings of vLLM V0 have: samples that end apart, beams that turn over, an engine that dies."""

from __future__ import annotations

import json

import pytest

from experiments.parity import Difference, replay
from experiments.parity_v0 import SchedulerDriver


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
        driver.memory.check_integrity()
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
