"""`--set`: values put over an experiment, at every point of a sweep."""

from __future__ import annotations

from typing import Any

from experiments.config import Plan, load
from tests.experiments.conftest import SMALL, Kvsim, Write


def settings(write: Write, *sets: str) -> dict[str, Any]:
    (point,) = load(write("x.yaml", SMALL), sets).points
    return point.settings


def test_every_default_is_filled_in(write: Write) -> None:
    resolved = settings(write)
    assert resolved["allocator"] == {
        "kind": "paged", "block_size": 16, "watermark": 0.01, "num_host_blocks": None, "prefix_caching": False
    }  # fmt: skip
    assert resolved["workload"]["kind"] == "synthetic"
    assert resolved["workload"]["sampling"]["n"] == 1
    assert resolved["kv_memory"] == 2 * 2**30
    assert resolved["model"]["num_layers"] == 40
    assert resolved["record"] == {"requests": True, "steps": True, "memory": True}


def test_a_leaf_a_subtree_and_a_kind(write: Write) -> None:
    resolved = settings(
        write, "workload.arrivals.rate=1e1", "scheduler={kind: orca, max_num_seqs: 7}", "allocator=contiguous"
    )
    assert resolved["workload"]["arrivals"] == {"kind": "poisson", "rate": 10.0}
    assert resolved["scheduler"]["kind"] == "orca"
    assert resolved["scheduler"]["max_num_seqs"] == 7
    assert resolved["allocator"] == {"kind": "contiguous", "reserve": "max", "placement": "buddy"}


def test_a_field_of_a_policy_that_was_named_by_its_kind(write: Write) -> None:
    resolved = settings(write, "allocator=paged", "allocator.block_size=8", "model.max_model_len=1024")
    assert resolved["allocator"]["block_size"] == 8
    assert resolved["model"]["kind"] == "opt-13b"
    assert resolved["model"]["max_model_len"] == 1024


def test_an_alias_means_what_it_stands_for(write: Write) -> None:
    assert settings(write, "model=deepseek-v2-lite") == settings(write, "model=deepseek-v2-lite-mla")


def test_yaml_values_of_every_sort(write: Write) -> None:
    resolved = settings(write, "num_blocks=null", "probe={every: 500}", "record.steps=false", "seed=0x10")
    assert resolved["num_blocks"] is None
    assert resolved["probe"]["every"] == 500
    assert resolved["record"]["steps"] is False
    assert resolved["seed"] == 16


def swept(write: Write, *sets: str) -> Plan:
    text = SMALL + "sweep:\n  workload.arrivals.rate: [1, 2]\n  allocator: [contiguous, {kind: paged}]\n"
    return load(write("x.yaml", text), sets)


def test_what_is_set_holds_at_every_point(write: Write) -> None:
    plan = swept(write, "workload.arrivals.rate=9")
    assert plan.swept == ["allocator"]
    assert [point.settings["workload"]["arrivals"]["rate"] for point in plan.points] == [9, 9]


def test_an_axis_is_set_or_taken_away(write: Write) -> None:
    assert len(swept(write, "sweep.workload.arrivals.rate=[1, 2, 3]").points) == 6
    assert len(swept(write, "sweep.workload.arrivals.rate=null").points) == 2
    assert len(swept(write, "sweep.seed=[1, 2]").points) == 8
    assert len(swept(write, "sweep=null").points) == 1


def test_a_path_that_is_not_there(write: Write, kvsim: Kvsim) -> None:
    said = kvsim("check", "small.yaml", "--set", "workload.arrival.rate=1", "--set", "seed=[1", "--set", "=3")
    assert said.code == 2
    assert said.lines == [
        "--set:1:1: workload.arrival: unknown key, expected one of kind, num_requests, arrivals, lengths, "
        "system_prompts, few_shot, session, sampling, tenants, priorities, did you mean 'arrivals'?",
        "--set:2:8: YAML syntax error, expected ',' or ']', but got '<stream end>' "
        "while parsing a flow sequence",
        "--set:3:1: not a setting, got '=3', expected path=value as in a.b=3",
    ]


def test_a_relative_path_starts_at_the_file_that_names_it(write: Write) -> None:
    trace = "arrival_time_s,prompt_tokens,output_tokens\n0,5,5\n"
    write("there/trace.csv", trace)
    write("trace.csv", trace)
    write("there/x.yaml", SMALL.replace("num_requests: 60\n", "kind: trace\n  path: trace.csv\n").replace(
        "  arrivals: {kind: poisson, rate: 4.0}\n  lengths: {kind: fixed, prompt: 100, output: 20}\n", ""
    ))  # fmt: skip
    from pathlib import Path

    (point,) = load(Path("there/x.yaml")).points
    assert point.settings["workload"]["path"] == str(Path("there/trace.csv").resolve())
    (point,) = load(Path("there/x.yaml"), ["workload.path=trace.csv"]).points
    assert point.settings["workload"]["path"] == str(Path("trace.csv").resolve())
