"""`kvsim hit-rate` as a user meets it."""

from __future__ import annotations

import json

from tests.experiments.conftest import Kvsim, Write

ROWS = [[1, 2, 3], [1, 2, 4], [5], [1, 2, 3]]


def test_a_table_by_capacity_and_order(kvsim: Kvsim, write: Write):
    lines = [
        {"timestamp": 0, "input_length": 512 * len(ids), "output_length": 9, "hash_ids": ids} for ids in ROWS
    ]
    write("trace.jsonl", "\n".join(map(json.dumps, lines)))
    answer = kvsim("hit-rate", "trace.jsonl", "--capacity", "3", "10", "--eviction", "lru", "belady")
    assert answer.code == 0
    assert answer.out.splitlines() == [
        "prefix hit rate by blocks of 512 tokens, 4 requests, infinite cache 0.5000",
        "eviction       3      10",
        "lru       0.4000  0.5000",
        "belady    0.4000  0.5000",
    ]


def test_mistakes(kvsim: Kvsim, write: Write):
    write("trace.csv", "arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,5\n")
    for arguments, told in (
        (
            ("--eviction", "lur"),
            "unknown eviction 'lur': expected one of lru, lfu, fifo, filo, mru, priority, belady",
        ),
        (("--format", "moncake"), "unknown trace format 'moncake'"),
        (("--format", "vidur"), "trace.csv: trace format vidur names no content, expected one with hash ids"),
    ):
        answer = kvsim("hit-rate", "trace.csv", *arguments)
        assert answer.code == 2
        assert answer.err.startswith(told)
