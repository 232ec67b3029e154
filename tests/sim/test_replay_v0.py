"""Replays of what vLLM V0 answered: our own recordings in `fixtures`, and all shared ones where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.sim.replay_v0 import Difference, SchedulerDriver, canonical, replay

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = sorted(path.name for path in FIXTURES.glob("v0_*.jsonl"))
NOT_BUILT = {"v0_sched_chunked_prefill.jsonl": "chunked prefill is not built"}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_case(name):
    assert replay(FIXTURES / name) > 0


def test_all_shared_recordings(shared):
    folder = shared / "parity" / "vllm_v0"
    if not folder.is_dir():
        pytest.skip(f"no recorded cases at {folder}")
    wrong = []
    for path in sorted(folder.glob("v0_*.jsonl")):
        if path.name in NOT_BUILT or "cached" in path.name:  # prefix caching of V0 is another allocator
            continue
        try:
            replay(path)
        except Difference as difference:
            wrong.append(str(difference))
    assert not wrong


def test_a_difference_names_file_line_and_field(tmp_path):
    text = (FIXTURES / "v0_exhaustion.jsonl").read_text(encoding="utf-8")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(text.replace('"free_gpu":3,', '"free_gpu":2,', 1), encoding="utf-8")
    with pytest.raises(Difference, match=r"changed\.jsonl:16: state\.free_gpu .* recorded 2, got 3"):
        replay(changed)


def test_tables_are_compared_by_their_sharing():
    assert canonical({"10": [7, 3], "2": [9, 7]}) == {"2": [0, 1], "10": [1, 2]}


# What only recorded files have: samples that end apart, beams that turn over


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
    lines = [{"config": config, "requests": requests}]
    for step in range(6):
        out, state = ours.perform({"step": step})
        if ours.gave_up:
            out = {"engine_error": "no room on the host"}
        lines.append({"op": {"step": step}, "out": out, "state": state})
        if ours.gave_up:
            break
    recorded = tmp_path / "dies.jsonl"
    recorded.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert replay(recorded) == len(lines) - 1 == 3
    lines[2]["out"] = {"engine_error": "too early"}
    recorded.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(Difference, match=r"dies\.jsonl:3: recorded an engine error, ours goes on"):
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
