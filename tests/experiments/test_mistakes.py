"""What a user reads who writes something wrong: one line a mistake, all at once, exit code 2."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest

from experiments import hardware
from experiments.config import load
from experiments.experiment import Experiment
from experiments.mistakes import listed
from sim.allocators import allocator
from sim.allocators.capacity import STAYS_CACHED
from sim.schedulers import scheduler
from tests.experiments.conftest import SMALL, Kvsim, Write

CASES = {
    # what is written in place of what, and the whole line that answers it
    "unknown section": (
        ("kv_memory:", "kv_memroy:"),
        "x.yaml:4:1: kv_memroy: unknown key, expected one of SECTIONS, did you mean 'kv_memory'?",
    ),
    "unknown key of a policy": (
        ("block_size", "blocksize"),
        "x.yaml:9:26: allocator.blocksize: unknown key, expected one of kind, block_size, watermark, "
        "num_host_blocks, prefix_caching, did you mean 'block_size'?",
    ),
    "unknown key three levels down": (
        ("prompt: 100", "promt: 100, prompt: 100"),
        "x.yaml:8:26: workload.lengths.promt: unknown key, expected one of kind, prompt, output, max_prompt, "
        "max_output, did you mean 'prompt'?",
    ),
    "unknown kind": (
        ("{kind: paged, block_size: 16}", "{kind: pagd, block_size: 16}"),
        "x.yaml:9:19: allocator.kind: unknown kind, got 'pagd', expected one of ALLOCATORS, "
        "did you mean 'paged'?",
    ),
    "unknown kind by its name alone": (
        ("{kind: vllm_v0}", "vlm_v0"),
        "x.yaml:10:12: scheduler: unknown kind, got 'vlm_v0', expected one of SCHEDULERS, "
        "did you mean 'vllm_v0'?",
    ),
    "no kind": (
        ("{kind: paged, block_size: 16}", "{block_size: 16}"),
        "x.yaml:9:1: allocator.kind: missing, expected one of ALLOCATORS",
    ),
    "missing key": (
        ("num_requests: 60", ""),
        "x.yaml:5:1: workload.num_requests: missing, expected an integer >= 1",
    ),
    "number as text": (
        ("block_size: 16", "block_size: '16'"),
        "x.yaml:9:38: allocator.block_size: wrong type, got '16', expected an integer >= 1",
    ),
    "flag for a number": (
        ("rate: 4.0", "rate: true"),
        "x.yaml:7:35: workload.arrivals.rate: wrong type, got true, expected a number > 0",
    ),
    "fraction for an integer": (
        ("num_requests: 60", "num_requests: 60.5"),
        "x.yaml:6:17: workload.num_requests: wrong type, got 60.5, expected an integer >= 1",
    ),
    "out of bounds": (
        ("rate: 4.0", "rate: 0"),
        "x.yaml:7:35: workload.arrivals.rate: out of bounds, got 0, expected a number > 0",
    ),
    "infinity": (
        ("rate: 4.0", "rate: .inf"),
        "x.yaml:7:35: workload.arrivals.rate: out of bounds, got inf, expected a number > 0",
    ),
    "a list for a mapping": (
        ("{kind: paged, block_size: 16}", "[paged, 16]"),
        "x.yaml:9:12: allocator: wrong type, got a list of 2, expected one of ALLOCATORS",
    ),
    "not a size": (
        ("2 GiB", "2 Gigs"),
        "x.yaml:4:12: kv_memory: not understood, got '2 Gigs', expected a size such as 12 GiB or null",
    ),
    "unknown model": (
        ("opt-13b", "opt13"),
        "x.yaml:2:8: model: unknown kind, got 'opt13', expected one of MODELS, did you mean 'opt-13b'?",
    ),
    "not one of a few words": (
        ("{kind: paged, block_size: 16}", "{kind: contiguous, reserve: orakle}"),
        "x.yaml:9:40: allocator.reserve: not allowed, got 'orakle', expected one of max, pow2, oracle, "
        "did you mean 'oracle'?",
    ),
    "duplicate key": (
        ("device:", "model: opt-66b\ndevice:"),
        "x.yaml:3:1: model: duplicate key, it already stands in line 2",
    ),
    "syntax error": (
        ("allocator: {", "allocator: ["),
        "x.yaml:9:40: YAML syntax error, expected ',' or ']', but got '}' while parsing a flow sequence",
    ),
    "tab": (
        ("  num_requests", "\tnum_requests"),
        "x.yaml:6:1: YAML syntax error, found character '\\t' that cannot start any token "
        "while scanning for the next token",
    ),
    "not a name": (
        ("name: small", "name: ../small"),
        "x.yaml:1:7: name: not a name, got '../small', expected letters, digits, and . + - _ inside, "
        "as it names a folder",
    ),
    "a model that does not fit": (
        ("model: opt-13b\ndevice: a100-40gb\nkv_memory: 2 GiB", "model: opt-66b\ndevice: a100-40gb"),
        "x.yaml:2:8: model: opt-66b does not fit on 1 x a100-40gb-sxm, got 122.4 GiB of weights for "
        "36.0 GiB, 0.9 of 1 x 40.0 GiB, expected a larger device, or tensor_parallel of at least 4",
    ),
    "too little memory for a block": (
        ("2 GiB", "4 MiB"),
        "x.yaml:4:12: kv_memory: too little memory, got 4.0 MiB for KV, 5 slots of 819,200 bytes, "
        "expected room for a block of 16 slots",
    ),
    "nothing says how much memory": (
        ("model: opt-13b\ndevice: a100-40gb\nkv_memory: 2 GiB", "max_model_len: 512"),
        "x.yaml:1:1: num_blocks: missing, expected an integer >= 1, or a model whose KV size is known",
    ),
    "a trace that is not there": (
        ("num_requests: 60\n", "kind: trace\n  path: nowhere.csv\n"),
        "x.yaml:7:9: workload.path: no such file or folder, got 'nowhere.csv'",
    ),
    "a path where only a section may stand": (
        ("allocator:", "allocator.kind: paged\nallocator:"),
        "x.yaml:9:1: allocator.kind: unknown key, expected one of SECTIONS, did you mean 'allocator'?",
    ),
    "more KV memory than the weights leave": (
        ("2 GiB", "20 GiB"),
        "x.yaml:4:12: kv_memory: more than there is, got 20.0 GiB, expected at most 16.1 GiB, what the weights leave "
        "of 1 x a100-40gb-sxm",
    ),
    "devices that cannot share the heads": (
        ("kv_memory: 2 GiB", "kv_memory: 2 GiB\ntensor_parallel: 7"),
        "x.yaml:5:18: tensor_parallel: opt-13b has 40 heads, 40 of keys and values, got 7 devices, which cannot share "
        "them evenly, expected one of 1, 2, 4, 5, 8, 10, 20, 40",
    ),
    "no device of torch": (
        ("kv_memory: 2 GiB", "kv_memory: 2 GiB\nprobe: {device: foo}"),
        "x.yaml:5:17: probe.device: not a device: got 'foo', expected auto, cpu, or a GPU as cuda or cuda:1",
    ),
    "both n and beams": (
        ("  arrivals:", "  sampling: {n: 2, beam_width: 2}\n  arrivals:"),
        "x.yaml:7:13: workload.sampling: n and beam_width exclude each other: got 2 and 2, "
        "expected one to be 1",
    ),
    "fewer samples than are returned": (
        ("  arrivals:", "  sampling: {n: 4, best_of: 2}\n  arrivals:"),
        "x.yaml:7:13: workload.sampling: best_of: got 2, expected at least n, the 4 samples that are returned",
    ),
    "a session that is none": (
        ("  arrivals:", "  session: tre\n  arrivals:"),
        "x.yaml:7:12: workload.session: unknown kind, got 'tre', expected one of conversation, agent, tree, "
        "did you mean 'tree'?",
    ),
    "half a turn": (
        ("  arrivals:", "  session: {kind: conversation, turns: 0.5}\n  arrivals:"),
        "x.yaml:7:40: workload.session.turns: out of bounds, got 0.5, expected a number >= 1",
    ),
    "a trace with sessions": (
        ("num_requests: 60\n", "kind: trace\n  path: x.yaml\n  session: conversation\n"),
        "x.yaml:8:3: workload.session: unknown key, expected one of kind, path, format, time_scale, rate, start_s, "
        "window_s, num_requests, sampling, tenants, priorities",
    ),
}


def named(line: str) -> str:
    """The line with the names that are registered by now."""
    names = {
        "SECTIONS": list(inspect.signature(Experiment).parameters),
        "ALLOCATORS": allocator.kinds,
        "SCHEDULERS": scheduler.kinds,
        "MODELS": hardware.model.kinds,
        "FORKING": [kind for kind in allocator if allocator[kind].can_fork],
        "SWAPPING": [kind for kind in allocator if allocator[kind].can_swap],
        "FLYING": [kind for kind in allocator if allocator[kind].can_fly],
        "CACHED": [allocator["prefix"].reasons["can_swap"]],
        "STAYS": [STAYS_CACHED],
        "STOPPING": [kind for kind in allocator if allocator[kind].can_stop],
    }
    for word, known in names.items():
        line = line.replace(word, listed(known))
    return line


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_answered_in_one_line(case: str, write: Write, kvsim: Kvsim) -> None:
    (before, after), line = CASES[case]
    assert before in SMALL
    write("x.yaml", SMALL.replace(before, after))
    said = kvsim("check", "x.yaml")
    assert (said.code, said.out) == (2, "")
    assert named(line) in said.lines
    assert len(said.lines) == 1 or "trace" in case  # a trace has no arrivals and lengths either


def test_an_option_without_meaning_is_refused_if_written(write: Write, kvsim: Kvsim) -> None:
    refused = kvsim(
        "check", "small.yaml", "--set", "allocator=contiguous", "--set", "workload.sampling={n: 4}"
    )
    assert refused.lines == [
        named(
            "--set:2:23: workload.sampling.n: allocator contiguous cannot fork: a reservation is one sequence's "
            "alone, got 4, expected 1, or an allocator that shares slots (FORKING)"
        )
    ]
    refused = kvsim(
        "check", "small.yaml", "--set", "allocator=contiguous", "--set", "scheduler.preemption=swap"
    )
    assert refused.lines == [
        named(
            "--set:2:22: scheduler.preemption: has no meaning with allocator contiguous: "
            "nobody outgrows a reservation"
        )
    ]
    assert kvsim("check", "small.yaml", "--set", "allocator=contiguous").code == 0


SWAPS = {
    (
        "allocator=prefix",
        "scheduler.preemption=hybrid",
    ): "--set:2:22: scheduler.preemption: allocator prefix cannot "
    "swap: CACHED, got 'hybrid', expected recompute, or an allocator that swaps (SWAPPING)",
    (
        "allocator=prefix",
        "scheduler.preemption=partial",
    ): "--set:2:22: scheduler.preemption: allocator prefix cannot "
    "take a part of what a sequence holds: STAYS, got 'partial', expected recompute, "
    "or an allocator that does (STOPPING)",
    (
        "allocator=contiguous",
        "scheduler.preemption=partial",
    ): "--set:2:22: scheduler.preemption: has no meaning with "
    "allocator contiguous: nobody outgrows a reservation",
    ("allocator.num_host_blocks=0", "scheduler.preemption=hybrid"): "--set:1:27: allocator.num_host_blocks: "
    "preemption is set to hybrid: requests are swapped when memory runs out, which needs a host pool",
    (
        "allocator=prefix",
        "transfers.asynchronous=true",
    ): "--set:2:24: transfers.asynchronous: allocator prefix "
    "cannot swap beside the computation: CACHED, got true, expected false, or an allocator that does (FLYING)",
    ("allocator=radix", "transfers.quantization=int8"): "--set:2:24: transfers.quantization: allocator radix "
    "cannot swap at another precision: CACHED, got int8, expected null, or an allocator that does (FLYING)",
    (
        "allocator.prefix_caching=true",
        "scheduler.preemption=partial",
    ): "--set:2:22: scheduler.preemption: allocator paged cannot take a part of what a sequence holds with "
    "prefix_caching: STAYS, got 'partial', expected recompute, or an allocator that does (STOPPING)",
    (
        "allocator={kind: multi_size, prefix_caching: true}",
        "scheduler.preemption=swap",
    ): "--set:2:22: scheduler.preemption: allocator multi_size cannot swap with prefix_caching: CACHED, got 'swap', "
    "expected recompute, or an allocator that swaps (SWAPPING)",
    (
        "kv_cache_dtype=int8",
        "transfers.quantization=int4",
    ): "--set:2:24: transfers.quantization: swapped blocks have the precision of the cache (kv_cache_dtype: int8), "
    "and keep it",
    (
        "kv_cache_dtype=int8",
        "model={kind: opt-13b, kv_bytes_per_value: 1}",
    ): "--set:1:16: kv_cache_dtype: saves nothing, got int8, which takes 422,400 bytes a token with its scales, "
    "expected less than the 409,600 of opt-13b",
    (
        "kv_cache_dtype=fp8",
        "model=null",
        "num_blocks=9",
        "kv_memory=null",
        "max_model_len=99",
    ): "--set:1:16: kv_cache_dtype: a precision of nobody's K and V, got fp8, expected a model that has them",
    (
        "kv_cache_dtype=int8",
        "timing={kind: calibrated, profile: cpu-xeon}",
    ): "--set:1:16: kv_cache_dtype: profiles were not measured with quantised caches: take timing roofline",
    (
        "timing={kind: roofline, dequantize_ops: 1}",
    ): "--set:1:41: timing.dequantize_ops: has no meaning where the cache is not quantised (kv_cache_dtype)",
    (
        "allocator.num_host_blocks=0",
        "transfers.asynchronous=true",
    ): "--set:2:24: transfers.asynchronous: nothing can be swapped without a host pool (num_host_blocks: 0)",
    ("transfers.layer_wise=true",): "--set:1:22: transfers.layer_wise: has no meaning where swaps are not "
    "asynchronous",
    (
        "transfers.prefetch=false",
    ): "--set:1:20: transfers.prefetch: has no meaning where swaps are not asynchronous",
}


@pytest.mark.parametrize("settings", SWAPS)
def test_ways_to_recover_that_contradict_the_memory_are_refused(settings, write: Write, kvsim: Kvsim) -> None:
    written = [part for setting in settings for part in ("--set", setting)]
    refused = kvsim("check", "small.yaml", *written)
    assert (refused.code, refused.lines) == (2, [named(SWAPS[settings])])


MEANINGLESS = {
    ("scheduler={kind: sglang, policy: lpm}",): "scheduler.policy: lpm sorts by cached prefixes, and "
    "the allocator caches none",
    ("allocator={kind: prefix, prefix_caching: false}", "scheduler={kind: sglang, policy: dfs-weight}"):
    "scheduler.policy: dfs-weight sorts by cached prefixes, and the allocator caches none",
    ("scheduler={kind: sglang, seed: 3}",): "scheduler.seed: only the policy random draws",
    ("allocator=contiguous", "scheduler={kind: trtllm, capacity: max_utilization}"):
    "scheduler.capacity: has no meaning with allocator contiguous: nobody outgrows a reservation",
    ("scheduler={kind: trtllm, capacity: max_utilization, max_new_tokens: 9}",): "scheduler.max_new_tokens: "
    "max_utilization does not count on what is to come",
    ("scheduler={kind: lightllm, estimated_output: 9}",): "scheduler.estimated_output: nothing is "
    "estimated without a busy_share above 0",
    ("scheduler={kind: vllm_v1, chunked_prefill: false, reserve_full_prompt: false}",):
    "scheduler.reserve_full_prompt: without chunked prefill the first chunk is the whole prompt",
    ("scheduler.order={kind: sjf, seed: 3}",): "scheduler.order.seed: without noise nothing is drawn",
    ("scheduler.order={kind: edf, target_s: 3}",): "scheduler.order.target_s: with one target for all "
    "(per_prompt_token_ms: 0) the order is that of arrival",
    ("scheduler.order={kind: mlfq, levels: 1, quantum: 3}",): "scheduler.order.quantum: there is only "
    "one level",
    ("scheduler.order=vtc",): "scheduler.order: vtc shares between tenants, and all requests are of one: "
    "set workload.tenants",
    ("scheduler.order=priority",): "scheduler.order: all requests have the same priority: set workload.priorities",
    ("scheduler.victim=lowest_priority",): "scheduler.victim: all requests have the same priority: "
    "set workload.priorities",
    ("allocator={kind: radix, eviction: priority}",): "allocator.eviction: all requests have the same priority: "
    "set workload.priorities",
    ("scheduler.preemption=recompute", "transfers.copy_latency_us=9"): "transfers.copy_latency_us: "
    "has no meaning here: nothing is ever swapped",
    ("scheduler.preemption=partial", "allocator.num_host_blocks=9"): "allocator.num_host_blocks: "
    "has no meaning here: nothing is ever swapped",
    ("scheduler.max_num_seqs=4", "workload.sampling={n: 2, best_of: 6}"): "workload.sampling.best_of: "
    "requests of 6 branches never run where max_num_seqs is 4",
}  # fmt: skip


@pytest.mark.parametrize("settings", MEANINGLESS)
def test_what_changes_nothing_beside_the_rest_is_refused(settings, write: Write, kvsim: Kvsim) -> None:
    written = [part for setting in settings for part in ("--set", setting)]
    refused = kvsim("check", "small.yaml", *written)
    place = f"--set:{len(settings)}:"
    assert refused.code == 2
    assert [(line[: len(place)], line.split(": ", 1)[1]) for line in refused.lines] == [
        (place, MEANINGLESS[settings])
    ]


MEANINGFUL = [
    ("num_blocks=99",),  # which wins over what the file says of kv_memory
    ("probe={every: 5, samples: 9}",),
    ("probe.device=cuda:3",),
    ("allocator=radix", "scheduler={kind: sglang, policy: lpm}"),
    ("allocator.prefix_caching=true", "scheduler={kind: sglang, policy: dfs-weight}"),
    ("scheduler={kind: sglang, policy: random, seed: 3}",),
    ("scheduler={kind: trtllm, capacity: max_utilization}",),
    ("scheduler={kind: lightllm, busy_share: 0.5, estimated_output: 9}",),
    ("scheduler={kind: vllm_v1, reserve_full_prompt: false}",),
    ("scheduler.order={kind: sjf, noise: 0.5, seed: 3}",),
    ("scheduler.order=vtc", "workload.tenants=[1, 2]"),
    ("scheduler={kind: vllm_v0, order: priority, victim: lowest_priority}", "workload.priorities=[1, 2]"),
    ("scheduler.preemption=swap", "transfers.copy_latency_us=9", "allocator.num_host_blocks=9"),
    ("workload.sampling.n=2", "transfers.host_bandwidth_gb_per_s=9"),
    # What is the default may be written anywhere.
    ("scheduler={kind: sglang, policy: fcfs, seed: 0}",),
    ("allocator=contiguous", "scheduler={kind: trtllm, capacity: guaranteed_no_evict, victim: latest}"),
    ("scheduler={kind: lightllm, busy_share: 0, estimated_output: 1024}",),
    ("transfers={asynchronous: false, prefetch: true, layer_wise: false}",),
]  # fmt: skip


@pytest.mark.parametrize("settings", MEANINGFUL)
def test_what_means_something_and_what_is_the_default_is_not(settings, write: Write, kvsim: Kvsim) -> None:
    written = [part for setting in settings for part in ("--set", setting)]
    assert kvsim("check", "small.yaml", *written).lines == []


@pytest.mark.parametrize("kind", list(scheduler))
@pytest.mark.parametrize("owner", ["paged", "contiguous", "radix"])
def test_settings_with_all_defaults_written_out_mean_the_same(
    kind, owner, write: Write, kvsim: Kvsim
) -> None:
    """What a run stores as its configuration can be read again."""
    base = ["--set", f"scheduler={kind}", "--set", f"allocator={owner}"]
    (point,) = load(Path("small.yaml"), base[1::2]).points
    write("again.yaml", json.dumps(point.settings))
    assert kvsim("check", "again.yaml").lines == []
    (again,) = load(Path("again.yaml")).points
    assert again.settings == point.settings


def test_all_mistakes_are_told_at_once_in_order_of_place(write: Write, kvsim: Kvsim) -> None:
    write(
        "x.yaml",
        """\
sead: 1
seed: -1
model: opt-66b
device: a100-40gb
workload:
  num_requests: many
  num_requests: 3
  arrivals: {kind: poison, rate: 1}
  lengths: {kind: fixed, prompt: 1, output: 1}
allocator: {kind: paged, block_size: 0}
scheduler: {kind: vllm_v0, max_num_seqs: 0.5}
sweep:
  zip:
    timing: [{kind: fixed, decode_ms: -1}, {kind: fixde}]
    seed: [1, 2, 3]
  workload.arrivals.rtae: [1, 2]
  replications: [1]
plugins: [absent.py]
""",
    )
    said = kvsim("check", "x.yaml", "--set", "record.all=true", "--set", "nothing")
    places = [line.split(": ")[0] + " " + line.split(": ")[1].split(",")[0] for line in said.lines]
    assert said.code == 2
    assert places == [
        "--set:1:1 record.all",
        "--set:2:1 not a setting",
        "x.yaml:1:1 sead",
        "x.yaml:6:17 workload.num_requests",
        "x.yaml:7:3 workload.num_requests",
        "x.yaml:10:38 allocator.block_size",
        "x.yaml:11:42 scheduler.max_num_seqs",
        "x.yaml:13:3 sweep.zip",
        "x.yaml:14:39 timing.decode_ms",
        "x.yaml:17:3 sweep.replications",
        "x.yaml:18:11 plugins.0",
    ]


def test_a_misfit_is_told_beside_other_mistakes(write: Write, kvsim: Kvsim) -> None:
    said = kvsim("check", "small.yaml", "--set", "kv_memory=1 MiB", "--set", "allocator.watermark=2")
    assert [line.split(",")[0] for line in said.lines] == [
        "--set:1:11: kv_memory: too little memory",
        "--set:2:21: allocator.watermark: out of bounds",
    ]


def test_a_file_that_is_no_experiment(write: Write, kvsim: Kvsim) -> None:
    assert kvsim("check", "smal.yaml").lines == [
        "smal.yaml: cannot be read: no such file or directory, did you mean 'small.yaml'?"
    ]
    assert kvsim("run", ".").lines == [".: cannot be read: is a directory"]
    write("empty.yaml", "")
    assert kvsim("check", "empty.yaml").lines == ["empty.yaml:1:1: wrong type, got null, expected a mapping"]
    Path("binary.yaml").write_bytes(b"\x93NUMPY")
    assert kvsim("check", "binary.yaml").lines == ["binary.yaml: not a text file, byte 0 is not UTF-8"]
    write("loop.yaml", "model: &m {custom: *m}\n")
    assert "loop.yaml:1:12: model.custom: an alias that contains itself" in kvsim("check", "loop.yaml").lines


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(write: Write, kvsim: Kvsim) -> None:
    write("trace.csv", "").chmod(0)
    said = kvsim("check", "small.yaml", "--set", "workload={kind: trace, path: trace.csv}")
    assert said.lines == ["--set:1:30: workload.path: cannot be read: permission denied, got 'trace.csv'"]


def test_a_malformed_trace_is_told_by_its_own_line(write: Write, kvsim: Kvsim) -> None:
    rows = "".join(f"{second},10,5\n" for second in range(3))
    write("trace.csv", f"arrival_time_s,prompt_tokens,output_tokens\n{rows}3,ten,5\n")
    said = kvsim("run", "small.yaml", "--no-plots", "--set", "workload={kind: trace, path: trace.csv}")
    assert said.code == 2
    assert len(said.lines) == 1
    assert "trace.csv:5: " in said.err
    assert not list(Path("results/small").glob("*"))


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_written(out: str, write: Write, kvsim: Kvsim) -> None:
    write("file", "a file")
    said = kvsim("run", "small.yaml", "--no-plots", "--out", out)
    assert said.code == 2
    assert said.lines == [
        f"{out}/small: cannot be written: not a directory, expected a folder for results (set --out)"
    ]


def test_a_tables_folder_without_tables(write: Write, kvsim: Kvsim) -> None:
    Path("tables").mkdir()
    said = kvsim("check", "small.yaml", "--set", "timing={kind: table, tables: tables}")
    assert said.code == 2
    assert said.err.startswith("--set:1:8: timing: ")
    assert "linear_ops.csv" in said.err


def test_a_check_reads_traces_to_their_last_row(write: Write, kvsim: Kvsim) -> None:
    rows = [{"timestamp": n, "input_length": 8, "output_length": 4, "hash_ids": [n]} for n in range(70_000)]
    rows[-1]["output_length"] = -4
    file = write("rows.jsonl", "\n".join(map(json.dumps, rows)))
    workload = "workload: {kind: trace, path: rows.jsonl, format: mooncake}\n"
    text = SMALL[: SMALL.index("workload:")] + workload + SMALL[SMALL.index("allocator:") :]
    said = kvsim("check", write("x.yaml", text))
    assert said.code == 2
    assert f"{file.resolve()}:70000: output_length" in said.err
    write("rows.jsonl", "\n".join(map(json.dumps, rows[:-1])))
    assert kvsim("check", "x.yaml").out == "x.yaml: ok, 1 run, 69,999 requests of traces read\n"


def test_what_is_wrong_at_some_points_only_names_them(write: Write, kvsim: Kvsim) -> None:
    sweep = "sweep: {scheduler.preemption: [swap, recompute], seed: [1, 2]}\n"
    write("x.yaml", SMALL + "transfers: {copy_latency_us: 9}\n" + sweep)
    assert kvsim("check", "x.yaml").lines == [
        "x.yaml:12:30: transfers.copy_latency_us: has no meaning here: nothing is ever swapped "
        "(at scheduler.preemption=recompute)"
    ]
    write("x.yaml", SMALL + "sweep: {scheduler.max_num_seqs: [4, 0], seed: [1, 2]}\n")
    (line,) = kvsim("check", "x.yaml").lines
    assert line.endswith("scheduler.max_num_seqs: out of bounds, got 0, expected an integer >= 1")


def test_the_nearest_file_is_suggested(write: Write, kvsim: Kvsim) -> None:
    write("there/requests.csv", "")
    workload = "workload: {kind: trace, path: request.csv}\n"
    text = SMALL[: SMALL.index("workload:")] + workload + SMALL[SMALL.index("allocator:") :]
    (line,) = kvsim("check", write("there/x.yaml", text)).lines
    assert line.endswith("no such file or folder, got 'request.csv', did you mean 'there/requests.csv'?")
