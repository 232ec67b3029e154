"""JSON traces: lengths, and the content of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import UserError
from workloads import Bailian, JsonLines, Mooncake, TraceFormat, TraceRows, trace_format
from workloads.traces import spread

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, end: str = "\n") -> Path:
        path = tmp_path / "trace.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_bytes("".join(line + end for line in lines).encode())
        return path

    return write


def read(kind: str | TraceFormat, path: Path) -> list[tuple[int, int, int, Any]]:
    """(ns, prompt, output, content) of every request."""
    reader = trace_format[kind]() if isinstance(kind, str) else kind
    return [
        row
        for rows in reader.read(path)
        for row in zip(
            rows.arrival_time.tolist(),
            rows.prompt_tokens.tolist(),
            rows.output_tokens.tolist(),
            rows.content or [None] * len(rows),
            strict=True,
        )
    ]


def complaint(kind: str | TraceFormat, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(kind, path)
    return str(caught.value).replace(f"{path.parent}/", "")


def mooncake(timestamp: float, tokens: int, output: int, *hashes: int) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": tokens, "output_length": output, "hash_ids": list(hashes)}


# One sample of each format


def test_mooncake(write: Write) -> None:
    path = write(mooncake(0, 1025, 5, 0, 1, 2), mooncake(3000, 512, 0, 7), mooncake(3000.5, 600, 9, 0, 1))
    assert read("mooncake", path) == [
        (0, 1025, 5, (0, 1, 2)),
        (3_000_000_000, 512, 1, (7,)),
        (3_000_500_000, 600, 9, (0, 1)),
    ]
    assert Mooncake().content_grain == 512


def test_mooncake_with_the_blocks_of_another_tool(write: Write) -> None:
    path = write(mooncake(12.5, 33, 2, 1, 2, 3))
    assert read(Mooncake(block_size=16), path) == [(12_500_000, 33, 2, (1, 2, 3))]
    assert complaint("mooncake", path) == (
        "trace.jsonl:1: hash_ids: got 3 ids, expected 1: one for each 512 (block_size) of 33 tokens"
    )


def test_bailian(write: Write) -> None:
    row = {
        "chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 40, "output_length": 12,
        "type": "text", "turn": 1, "hash_ids": [1089, 1090, 6326],
    }  # fmt: skip
    path = write(row, {**row, "timestamp": 62, "hash_ids": [1089, 1090]})
    assert read("bailian", path) == [
        (61_114_000_000, 40, 12, (1089, 1090, 6326)),
        (62_000_000_000, 40, 12, (1089, 1090)),  # the partial block may go without an id
    ]
    assert read("qwen", path) == read("bailian", path)
    assert Bailian().content_grain == 16


def test_plain_json_lines_with_the_names_in_use(write: Write) -> None:
    path = write({"input_toks": 20, "output_toks": 3, "arrival_time_ns": 46_926_808, "input_tok_ids": [5, 6]})
    assert read("llmservingsim", path) == [(46_926_808, 20, 3, None)]
    path = write({"input_length": 20, "output_length": 3, "arrived_at": 0.5, "hash_ids": [4, 9]})
    assert read(JsonLines(), path) == [(500_000_000, 20, 3, (4, 9))]


def test_mooncake_arrivals_can_be_spread_over_their_tick(write: Write) -> None:
    path = write(*(mooncake(stamp, 1, 1, number) for number, stamp in enumerate((0, 0, 0, 3000, 9000, 9000))))
    rows = read(Mooncake(spread_ms=3000), path)
    assert [time / 1e9 for time, *_ in rows] == [0.0, 1.0, 2.0, 3.0, 9.0, 10.5]
    assert [content for *_, content in rows] == [(0,), (1,), (2,), (3,), (4,), (5,)]


# What is wrong, and where


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'a': 1}", ":2: not JSON: Expecting property name enclosed in double quotes: got \"{'a': 1}\""),
        ('{"timestamp": 1,', ":17: not JSON: Expecting property name enclosed in double quotes: got '{"),
        ("[1, 2]", ": got '[1, 2]', expected a JSON object"),
        ("7", ": got '7', expected a JSON object"),
        ({"timestamp": 9}, ": no member 'input_length': got timestamp"),
        (
            {"timestamp": 9, "input_len": 5, "output_length": 1},
            ": no member 'input_length': got timestamp, input_len, output_length; "
            "did you mean 'input_length' instead of 'input_len'?",
        ),
        ({}, ": no member 'timestamp': got an empty object"),
        (mooncake(-1, 5, 5, 1), ": timestamp: got -1, expected a time in milliseconds from 0 to 4.61e+12"),
        (
            mooncake(True, 5, 5, 1),
            ": timestamp: got true, expected a time in milliseconds from 0 to 4.61e+12",
        ),
        (
            {**mooncake(9, 5, 5, 1), "input_length": "5"},
            ': input_length: got "5", expected a whole number of tokens from 0 to 2147483647',
        ),
        (
            {**mooncake(9, 5, 5, 1), "output_length": None},
            ": output_length: got null, expected a whole number of tokens from 0 to 2147483647",
        ),
        (mooncake(9, 10**400, 5), ": input_length: got 1"),
        (mooncake(9, 0, 5), ": got a prompt of 0 tokens, expected at least 1"),
        (mooncake(1, 5, 5, 1), ": not in order: got an arrival 0.001 s before that of the row above"),
        ({**mooncake(9, 5, 5), "hash_ids": 3}, ": hash_ids: got 3, expected a list of whole numbers"),
        ({**mooncake(9, 5, 5), "hash_ids": ["a"]}, ": hash_ids: got ['a'], expected a list of whole numbers"),
        (
            mooncake(9, 600, 5, 1, 2, 3),
            ": hash_ids: got 3 ids, expected 2: one for each 512 (block_size) of 600 tokens",
        ),
        (
            mooncake(9, 1200, 5, 1),
            ": hash_ids: got 1 ids, expected 3: one for each 512 (block_size) of 1200 tokens",
        ),
    ],
)
def test_a_bad_row_is_told_with_its_line(write: Write, row: Any, message: str) -> None:
    path = write(mooncake(0, 5, 5, 1), "", mooncake(2, 5, 5, 1), row, mooncake(99, 5, 5, 1))
    assert complaint("mooncake", path).startswith(f"trace.jsonl:4{message}")


def test_objects_split_over_lines_are_not_taken_for_one(write: Write) -> None:
    path = write(
        '{"timestamp": 1, "input_length": 5', '"output_length": 1, "hash_ids": [1]}', mooncake(2, 5, 5, 1)
    )
    assert complaint("mooncake", path).startswith("trace.jsonl:1:35: not JSON: ")
    path = write(json.dumps(mooncake(1, 5, 5, 1)) + "," + json.dumps(mooncake(1, 5, 5, 1)))
    assert complaint("mooncake", path).startswith("trace.jsonl:1:")


def test_the_first_object_has_to_have_the_members(write: Write) -> None:
    assert complaint("mooncake", write({"timestamp": 1, "inputlength": 5})).startswith(
        "trace.jsonl:1: no column for output tokens: got timestamp, inputlength; expected output_length"
    )
    assert complaint("mooncake", write({})) == (
        "trace.jsonl:1: no column for the arrival time: got none; expected timestamp"
    )
    missing = {"timestamp": 1, "input_length": 5, "output_length": 5}
    assert complaint("mooncake", write(missing)) == (
        "trace.jsonl:1: no member 'hash_ids': got timestamp, input_length, output_length"
    )


def test_empty_files(write: Write) -> None:
    for lines in ((), ("", " ")):
        assert complaint("bailian", write(*lines)) == (
            "trace.jsonl:1: the file is empty, expected a JSON object on every line"
        )


def test_line_ends_and_marks_do_not_matter(write: Write) -> None:
    rows = [mooncake(0, 5, 5, 1), mooncake(2, 5, 5, 1)]
    path = write(*rows)
    plain = read("mooncake", path)
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode())
    assert read("mooncake", path) == plain


def test_a_deeply_nested_line_is_refused(write: Write) -> None:
    assert complaint("mooncake", write("[" * 200_000)).startswith("trace.jsonl:1: not JSON: ")


# Spreading


def rows_at(times: list[int]) -> TraceRows:
    count = np.arange(1, len(times) + 1)
    return TraceRows(np.array(times, dtype=np.int64), count, count, [(number,) for number in count.tolist()])


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=60).map(sorted),
    st.integers(1, 10),
    st.lists(st.integers(0, 60), max_size=5).map(sorted),
)
@settings(deadline=None)
def test_spread_rows_stay_in_order_and_in_their_tick(ticks: list[int], width: int, cuts: list[int]) -> None:
    quantum = width * 1000
    whole = rows_at([tick * 1000 for tick in ticks])
    edges = [0, *(cut for cut in cuts if cut < len(whole)), len(whole)]
    parts = [whole.part(start, stop) for start, stop in pairwise(edges) if start < stop]
    out = list(spread(parts, quantum))
    times = np.concatenate([rows.arrival_time for rows in out])
    assert [ids for rows in out for ids in rows.content or []] == whole.content
    assert (np.diff(times) >= 0).all()
    for tick in set(ticks):
        mine = times[np.array(ticks) == tick]
        later = [other for other in ticks if other > tick]
        end = min(tick * 1000 + quantum, later[0] * 1000) if later else tick * 1000 + quantum
        assert mine[0] == tick * 1000
        assert mine[-1] < end
        assert np.ptp(np.diff(mine, append=end)) <= 1  # even, to the ns


def test_nothing_moves_without_a_quantum() -> None:
    rows = rows_at([0, 0, 5])
    assert list(spread([rows], 0)) == [rows]
