"""Recorded engine cases: copies of a few in `recordings`, and all shared ones where they are."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.parity.replay import Difference, replay
from experiments.parity.rows import canonical
from sim.errors import IntegrityError, UserError
from tests.experiments.conftest import Kvsim
from tests.experiments.keys import block_keys

RECORDINGS = Path(__file__).parent / "recordings"


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_recorded_case(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert replay(path) == len(lines) - 1


def test_all_shared_recordings(shared):
    wrong = []
    files = [path for folder in ("vllm_v0", "vllm_v1", "nano_vllm", "radix") for path in
             sorted((shared / "parity" / folder).glob("*.jsonl"))]  # fmt: skip
    for path in files:
        try:
            assert replay(path)
        except Difference as difference:
            wrong.append(str(difference))
    assert not wrong


@pytest.fixture
def recording(tmp_path):
    """A copy of a short recording, to be spoiled: a function from what is replaced by what."""
    text = (RECORDINGS / "v1_head_no_caching.jsonl").read_text(encoding="utf-8")

    def spoiled(old: str = "", new: str = "", *, upto: int | None = None) -> Path:
        path = tmp_path / "spoiled.jsonl"
        assert old in text
        path.write_text(text.replace(old, new, 1)[:upto], encoding="utf-8")
        return path

    return spoiled


def test_a_line_for_each_file(kvsim: Kvsim, recording):
    good = RECORDINGS / "nano_directed.jsonl"
    answer = kvsim("parity", str(good))
    assert answer.code == 0
    assert answer.out == f"{good}: ok, 26 operations\n"
    spoiled = recording('"free":8,', '"free":7,')
    answer = kvsim("parity", str(spoiled), str(good))
    assert answer.code == 1
    first, second = answer.out.splitlines()
    assert first.startswith(f'{spoiled}:2: state.free: expected 7, got 8, after {{"op": "admit"')
    assert second == f"{good}: ok, 26 operations"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (("", "", 1500), r":7: truncated: got no JSON \([^:]* at column \d+\), expected an object"),
        (("", "", 0), r":1: got an empty file, expected the header of a recording"),
        (("main 2026-08-17", "0.11.0"), r":1: got a recording of vllm-V1 '0.11.0', expected version main 2026-08-17"),
        (("vllm-V1 KV", "tgi KV"), r":1: got a recording of 'tgi KVCacheManager', expected one of vllm-V0, vllm-V1"),
        (('"kind":"header"', '"kind":"foot"'), r':1: got no header, expected an object with "kind": "header"'),
        (('"block_size":4,', ""), r":1: config: lacks block_size, expected a whole number"),
        (('"i":3', '"i":4'), r":5: got operation 4, expected 3"),
        (('"op":{"op":"admit"', '"op":{"op":"bid"'), r":2: got the operation .*bid.*, which is not of this format"),
        (('"out":{"ok":true', '"aut":{"ok":true'), r":2: got None as out, expected an object"),
        (('{"i":1', '[{"i":1'), r":3: got no JSON"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value[1:24],
)  # fmt: skip
def test_a_file_that_is_none(spoil, line, kvsim: Kvsim, recording):
    old, new, *upto = spoil
    path = recording(old, new, upto=upto[0] if upto else None)
    answer = kvsim("parity", str(path))
    assert answer.code == 2
    assert answer.out == ""
    assert re.search(f"^{re.escape(str(path))}{line}", answer.err)


def test_files_that_are_wrong_do_not_hide_the_others(kvsim: Kvsim, tmp_path):
    good = RECORDINGS / "nano_directed.jsonl"
    answer = kvsim("parity", str(tmp_path / "none.jsonl"), str(good))
    assert answer.code == 2
    assert answer.out == f"{good}: ok, 26 operations\n"
    assert answer.err == f"{tmp_path / 'none.jsonl'}: cannot be read: No such file or directory\n"


def test_a_scheduler_file_that_ends_early(tmp_path):
    lines = (RECORDINGS / "v0_sched_prefill_priority.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(lines[:-2]), encoding="utf-8")
    with pytest.raises(Exception, match=r"short\.jsonl:9: truncated: got 8 operations, expected the 10"):
        replay(path)


def test_tables_are_compared_by_their_sharing():
    assert canonical({"10": [7, 3], "2": [9, 7]}) == {"2": [0, 1], "10": [1, 2]}


def test_keys_are_chained():
    one, two = block_keys([1, 2, 3, 4, 5], 2), block_keys([0, 2, 3, 4], 2)
    assert len(one) == len(two) == 2
    assert one[1] != two[1]
    assert block_keys([1, 2, 3, 4, 5, 6], 2, one)[:2] == one


# Whatever the requests, all come to their end and nothing is left

prompt_runs = st.lists(st.tuples(st.sampled_from([0, 100, 200]), st.integers(1, 9)), min_size=1, max_size=3)
token_rows = st.lists(
    st.builds(
        lambda prompt, outputs, step, priority: {
            "prompt": prompt, "max_tokens": outputs, "arrival_step": step, "priority": priority
        },
        prompt_runs, st.integers(1, 12), st.integers(0, 5), st.integers(0, 2),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


def to_the_end(driver, rows, blocks: int, steps: int = 600) -> None:
    over: list[str] = []
    for step in range(steps):
        out, state = driver.perform({"step": step})
        driver.check_integrity()
        if driver.gave_up:
            return
        over += out["finished"]
        if len(over) == len(rows):
            break
    assert sorted(over) == sorted(row["id"] for row in rows)
    assert state["free_after"] == blocks


@given(
    rows=token_rows,
    blocks=st.sampled_from([12, 16, 40]),
    budget=st.sampled_from([5, 16, 64]),
    chunked=st.booleans(),
    threshold=st.sampled_from([0, 7]),
    policy=st.sampled_from(["fcfs", "priority"]),
    reserve=st.booleans(),
    oldest=st.booleans(),
    caching=st.booleans(),
)
def test_v1_comes_to_an_end(rows, blocks, budget, chunked, threshold, policy, reserve, oldest, caching):
    from experiments.parity.v1 import SchedulerDriver

    rows = [{"id": f"r{number}", **row} for number, row in enumerate(rows)]
    config = {
        "block_size": 4, "num_blocks_including_null": blocks + 1, "usable_blocks": blocks, "max_num_seqs": 4,
        "max_num_batched_tokens": budget if chunked else 64, "prefix_caching": caching, "max_model_len": 8192,
        "long_prefill_token_threshold": threshold, "chunked_prefill": chunked, "policy": policy,
        "reserve_full_isl": reserve, "watermark": 0.0,
    }  # fmt: skip
    to_the_end(SchedulerDriver(config, rows, oldest=oldest), rows, blocks)


@given(rows=token_rows, blocks=st.sampled_from([12, 16, 40]), budget=st.sampled_from([5, 16, 64]))
def test_nano_comes_to_an_end(rows, blocks, budget):
    from experiments.parity.nano import SchedulerDriver

    rows = [{"id": f"r{number}", **row} for number, row in enumerate(rows)]
    config = {"block_size": 4, "num_blocks": blocks, "max_num_seqs": 4, "max_num_batched_tokens": budget}
    to_the_end(SchedulerDriver(config, rows), rows, blocks)


def test_our_own_faults_are_differences(recording, monkeypatch):
    from experiments.parity.v1 import ManagerDriver

    def broken(self) -> None:
        raise IntegrityError("free(3) != 4")

    monkeypatch.setattr(ManagerDriver, "check_integrity", broken)
    with pytest.raises(Difference, match=r"spoiled\.jsonl:2: our books: free\(3\) != 4, after"):
        replay(recording())
    monkeypatch.setattr(ManagerDriver, "free", lambda self, r: [][0])
    monkeypatch.setattr(ManagerDriver, "check_integrity", lambda self: None)
    with pytest.raises(Difference, match=r"spoiled\.jsonl:\d+: ours raises IndexError"):
        replay(recording())


# nano-vllm's scheduler, of which there is no recording here


def nano(requests: list[dict], **config) -> list[tuple]:
    from experiments.parity.nano import SchedulerDriver

    config = {"block_size": 4, "num_blocks": 10, "max_num_seqs": 4, "max_num_batched_tokens": 16, **config}
    rows = [{"id": f"r{number}", "arrival_step": 0, **row} for number, row in enumerate(requests)]
    driver = SchedulerDriver(config, rows)
    seen = []
    for step in range(20):
        out, state = driver.perform({"step": step})
        driver.check_integrity()
        seen.append(
            (out["prefill"], out["scheduled"], out["preempted"], out["finished"], state["free_after"])
        )
        if not state["running"] and not state["waiting"]:
            break
    return seen


def test_only_the_first_prompt_of_a_step_is_cut():
    seen = nano([{"prompt": [[0, 20]], "max_tokens": 2}, {"prompt": [[50, 3]], "max_tokens": 1},
                 {"prompt": [[100, 12]], "max_tokens": 1}])  # fmt: skip
    assert seen == [
        (True, [["r0", 16, 0]], [], [], 5),
        (True, [["r0", 4, 16], ["r1", 3, 0]], [], ["r1"], 5),  # r2's 12 do not fit into the other 9
        (True, [["r2", 12, 0]], [], ["r2"], 5),
        (False, [["r0", 1, 20]], [], ["r0"], 10),
        (False, [], [], [], 10),
    ]


def test_the_last_running_gives_way_and_finds_its_own_blocks_again():
    seen = nano([{"prompt": [[0, 8]], "max_tokens": 5}, {"prompt": [[50, 8]], "max_tokens": 3}], num_blocks=5)
    assert seen == [
        (True, [["r0", 8, 0], ["r1", 8, 0]], [], [], 1),
        (False, [["r0", 1, 8]], ["r1"], [], 2),
        (False, [["r0", 1, 9]], [], [], 2),  # r1 needs 3 blocks: 2 that it finds again, and a new one
        (False, [["r0", 1, 10]], [], [], 2),
        (False, [["r0", 1, 11]], [], ["r0"], 5),
        (True, [["r1", 1, 8]], [], [], 2),
        (False, [["r1", 1, 9]], [], ["r1"], 5),
        (False, [], [], [], 5),
    ]


def test_where_nothing_can_be_scheduled_nano_dies():
    from experiments.parity.nano import SchedulerDriver

    config = {"block_size": 4, "num_blocks": 2, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    driver = SchedulerDriver(config, [{"id": "r0", "arrival_step": 0, "prompt": [[0, 8]], "max_tokens": 4}])
    assert driver.perform({"step": 0})[0]["scheduled"] == [["r0", 8, 0]]
    assert not driver.gave_up
    assert driver.perform({"step": 1})[0]["preempted"] == ["r0"]
    assert driver.gave_up


def test_the_recordings_are_small():
    assert sum(path.stat().st_size for path in RECORDINGS.iterdir()) < 120_000
    assert all(json.loads(path.open(encoding="utf-8").readline()) for path in RECORDINGS.iterdir())


def spoil(tmp_path, name: str, line: int, change) -> Path:
    """A copy of a recording in which one line (from 1) is changed: its object is given to `change`."""
    lines = (RECORDINGS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[line - 1])
    change(row)
    lines[line - 1] = json.dumps(row)
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


BLOCKS = "a whole number from 1 to 1,000,000"
NONSENSE = [
    ("v1_head_no_caching", {"block_size": 0}, f"config.block_size: got 0, expected {BLOCKS}"),
    ("v1_head_no_caching", {"block_size": True}, f"config.block_size: got True, expected {BLOCKS}"),
    ("v1_head_no_caching", {"block_size": 4.0}, f"config.block_size: got 4.0, expected {BLOCKS}"),
    ("v1_head_no_caching", {"usable_blocks": 10**12}, f"config.usable_blocks: got {10**12}, expected {BLOCKS}"),
    ("v1_head_no_caching", {"usable_blocks": 5}, "config.usable_blocks: got 5, expected all of 12 but the null"),
    ("v1_head_no_caching", {"prefix_caching": "yes"}, "config.prefix_caching: got 'yes', expected true or false"),
    ("v1_head_no_caching", {"groups": []}, "config.groups: got [], expected a list with full, null or a window"),
    ("v1_head_no_caching", {"groups": [0]}, "config.groups: got [0], expected a list with full, null or a window"),
    ("v1_head_no_caching", {"watermark_blocks": -1}, "config.watermark_blocks: got -1, expected a whole number"),
    ("nano_directed", {"num_blocks": -1}, f"config.num_blocks: got -1, expected {BLOCKS}"),
    ("minisgl_directed_ps1", {"page_size": None}, f"config.page_size: got None, expected {BLOCKS}"),
    ("v1_head_sched_preempt_lifo", {"max_num_seqs": None}, f"config.max_num_seqs: got None, expected {BLOCKS}"),
    ("v1_head_sched_preempt_lifo", {"policy": "foo"}, "config.policy: got 'foo', expected fcfs or priority"),
    ("v1_head_sched_preempt_lifo", {"max_model_len": 12}, "request r0: 12 prompt tokens leave nothing of max_mod"),
    ("v0_exhaustion", {"watermark_blocks": 8}, "config.watermark_blocks: 8 leave nothing of 8 blocks"),
    ("v0_exhaustion", {"watermark": 0.5}, "config.watermark_blocks: got 0, and 0.5 of 8 blocks are 4"),
    ("v0_sched_prefill_priority", {"prompt_limit": 63}, "config.prompt_limit: got 63, expected 64"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "said"), NONSENSE)
def test_a_header_that_makes_no_sense_is_the_files_fault(name, config, said, kvsim: Kvsim, tmp_path):
    path = spoil(tmp_path, name, 1, lambda header: header["config"].update(config))
    answer = kvsim("parity", str(path))
    assert answer.code == 2
    assert f"{path}:1: {said}" in answer.err


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("v1_head_sched_preempt_lifo", {"requests": None}, "requests: got None, expected a list"),
        ("v1_head_sched_preempt_lifo", {"requests": [3]}, "requests[0]: got 3, expected an object"),
        ("v1_head_sched_preempt_lifo", {"requests": [{"id": "a"}]}, "requests[0]: lacks arrival_step"),
        ("v0_sched_prefill_priority", {"requests": [{"id": "a", "arrival_step": 0, "prompt_len": 3, "n": 2,
                                                     "out_lens": [1]}]}, "request a: got 1 out_lens, expected one"),
        ("v1_head_sched_preempt_lifo", {"requests": [{"id": "a", "arrival_step": 0, "prompt": [[0, 10**9]],
                                                      "max_tokens": 1}]}, "requests[0].prompt: got [[0, 1000000000]]"),
        ("v1_head_sched_preempt_lifo", {"requests": 2 * [{"id": "a", "arrival_step": 0, "prompt": [[0, 1]],
                                                          "max_tokens": 1}]}, "requests[1].id: got 'a' a second time"),
        ("minisgl_directed_ps1", {"requests": []}, "got requests, expected a recording of mini-sglang's manager"),
        ("minisgl_directed_ps1", {"peer": None}, "got a recording of 'None', expected one of vllm-V0"),
        ("minisgl_directed_ps1", {"config": []}, "got no header, expected an object with"),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense(name, change, said, kvsim: Kvsim, tmp_path):
    path = spoil(tmp_path, name, 1, lambda header: header.update(change))
    answer = kvsim("parity", str(path))
    assert answer.code == 2
    assert f"{path}:1: {said}" in answer.err


@pytest.mark.parametrize(
    ("name", "op", "said"),
    [
        ("nano_directed", {"op": "state"}, "got the operation 'state', which is not of this format; expected one of"),
        ("nano_directed", {"op": "admit", "r": "x"}, "op: lacks tokens, expected a list of tokens"),
        ("nano_directed", {"op": "admit", "r": "x", "tokens": []}, "op.tokens: got [], expected a list of tokens"),
        ("nano_directed", {"op": "admit", "r": "x", "tokens": [2**64]}, "op.tokens: got [18446744073709551616]"),
        ("nano_directed", {"op": "free", "r": "x"}, "op: x is not there, after"),
        ("nano_directed", {"op": "free", "r": "a", "x": 1}, "op.x: free has no such field; expected op, r"),
        ("v1_head_no_caching", {"op": "admit", "r": "x", "tokens": [1], "chunk": 0}, "op.chunk: got 0, expected"),
        ("v0_exhaustion", {"op": "finish", "g": "z", "s": 0}, "op: group z is not there"),
        ("v0_exhaustion", {"op": "append", "g": "a", "tokens": {"7": 1}}, "op: got tokens for 7, and group a has"),
        ("v0_sched_prefill_priority", {"step": "two"}, "op.step: got 'two', expected a whole number"),
    ],
)  # fmt: skip
def test_an_operation_that_nobody_asked_for(name, op, said, kvsim: Kvsim, tmp_path):
    path = spoil(tmp_path, name, 3, lambda row: row.update(op=op))
    answer = kvsim("parity", str(path))
    assert answer.code == 2
    assert f"{path}:3: {said}" in answer.err


def test_who_is_there_already_is_not_admitted_again(kvsim: Kvsim, tmp_path):
    lines = (RECORDINGS / "nano_directed.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join([*lines[:2], lines[1].replace('"i":0', '"i":1')]), encoding="utf-8")
    answer = kvsim("parity", str(path))
    assert answer.code == 2
    assert f"{path}:3: op: a is there already" in answer.err


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "\x00", "null", "[]", '{"kind": "header"', "\ufeff{}", "\n\n"]
)
def test_what_is_no_recording_at_all(text, kvsim: Kvsim, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(text, encoding="utf-8")
    answer = kvsim("parity", str(path))
    assert answer.code == 2
    assert answer.err.startswith(f"{path}:1: ")


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDINGS.glob("*.jsonl")))
def test_wherever_a_recording_is_cut_there_is_an_answer(name, tmp_path):
    """In the middle of a line it is truncated; between lines of a manager nobody can tell."""
    whole = (RECORDINGS / f"{name}.jsonl").read_bytes()
    path = tmp_path / "cut.jsonl"
    for at in range(1, 30):
        path.write_bytes(whole[: len(whole) * at // 30])
        said = f"{path}: truncated"
        try:
            replay(path)
        except UserError as error:
            said = str(error)
        assert re.match(re.escape(str(path)) + r"(:\d+)?: truncated", said)


def nodes(value, where=()):
    """Every place inside a JSON value, with the keys that lead there."""
    yield where
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from nodes(each, (*where, key))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(path.stem for path in RECORDINGS.glob("*.jsonl"))),
    random=st.randoms(use_true_random=False),
    value=st.sampled_from([None, 0, -1, 1, 7, 2.5, True, "x", "", [], {}, [[]], {"a": 1}, 10**30]),
    drop=st.booleans(),
)
def test_whatever_stands_somewhere_else_there_is_an_answer(name, random, value, drop, tmp_path):
    """One value of a header or of an operation is another one, or is missing."""
    rows = [json.loads(line) for line in (RECORDINGS / f"{name}.jsonl").open(encoding="utf-8")]
    line = random.choice([0, random.randrange(len(rows))])
    where = random.choice([each for each in nodes(rows[line]) if each])
    *path, last = where
    inside = rows[line]
    for key in path:
        inside = inside[key]
    if drop:
        del inside[last]
    else:
        inside[last] = value
    odd = tmp_path / "odd.jsonl"
    odd.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with contextlib.suppress(UserError, Difference):
        replay(odd)


def test_a_header_alone_is_a_truncated_recording(kvsim: Kvsim, tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text((RECORDINGS / "v1_head_sched_preempt_lifo.jsonl").read_text().splitlines()[0])
    answer = kvsim("parity", str(path))
    assert answer.code == 2
    assert "cut.jsonl:1: truncated: got a header alone" in answer.err
