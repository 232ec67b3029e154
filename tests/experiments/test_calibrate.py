"""`kvsim calibrate` and the profiles that it writes: measured, read again, used by a run, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attention.calibration import calibrate as calibration
from attention.calibration import measuring
from attention.calibration.grid import GRIDS
from experiments import build, profiles
from experiments.bench.attention import bench_attention
from experiments.calibrate import run_calibrate, written
from experiments.config import load
from experiments.mistakes import Mistakes
from experiments.sweep import run_sweep
from sim.errors import UserError
from sim.timing.profile import Profile
from tests.experiments.conftest import SMALL, Write

TINY = replace(
    GRIDS["cpu", True], heads=((4, 2, 8),), batches=(1, 3), contexts=(8, 24), block_sizes=(4, 16), prompts=(1, 2),
    prompt_tokens=(4, 8), prompt_contexts=(0, 16), hidden_sizes=(16, 32), tokens=(1, 4, 16), between=(8,),
    moved_blocks=(1, 4), moved_block_sizes=(4,), moved_layers=(1, 2), max_kv_bytes=1 << 20, passes=1,
)  # fmt: skip
SHIPPED = "cpu-xeon"


def timed(write: Write, timing: str) -> Path:
    """A small experiment with this timing."""
    return write("x.yaml", SMALL.replace("{kind: fixed, prefill_ms: 20, decode_ms: 10}", timing))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of a second."""
    monkeypatch.setattr(measuring, "bandwidths", lambda device: (2e10, 1e10))
    monkeypatch.setattr(measuring, "CPU_CACHE_BYTES", 1 << 18)
    monkeypatch.setitem(calibration.GRIDS, ("cpu", True), TINY)


def test_a_calibration_is_read_again_and_used_by_a_run(quick: None, write: Write, capsys) -> None:
    assert run_calibrate("cpu", Path("mine.yaml"), True) == 0
    told = capsys.readouterr().out
    assert "held back" in told
    assert "profile: mine.yaml" in told
    profile = build.read_profile(Path("mine.yaml"), Profile)
    assert profile.kind == "cpu"
    assert f"dense     base_us {profile.dense.base_us:g}" in told or profile.dense.base_us == 0
    config = timed(write, "{kind: calibrated, profile: mine.yaml, step_overhead_ms: 1}")
    config.write_text(config.read_text() + "transfers: {profile: mine.yaml}\n")
    outcome = run_sweep(load(config, probe=False), Path("results"), processes=1)
    assert not outcome.failures
    assert outcome.rows[0]["requests_finished"] == 60


def test_nothing_is_left_where_a_calibration_fails(quick: None, write: Write, monkeypatch) -> None:
    write("mine.yaml", "old")
    monkeypatch.setattr(calibration, "calibrate", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_calibrate("cpu", Path("mine.yaml"), True)
    assert Path("mine.yaml").read_text() == "old"
    assert [path.name for path in Path().iterdir() if "unfinished" in path.name] == []


@pytest.mark.parametrize(
    ("device", "out", "complaint"),
    [
        ("cuda:99", "mine.yaml", "device: got 'cuda:99', expected auto, cpu, or a GPU"),
        ("cpu", "nowhere/mine.yaml", "--out: nowhere/mine.yaml cannot be written: no such file or directory"),
        ("cpu", ".", "--out: got ., a folder, expected a file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    write: Write, monkeypatch, device, out, complaint
):
    monkeypatch.setattr(calibration, "calibrate", lambda *given: pytest.fail("it measures"))
    with pytest.raises(UserError, match=complaint):
        run_calibrate(device, Path(out), True)


# Profiles


def mistakes(write: Write, timing: str) -> list[str]:
    with pytest.raises(Mistakes) as caught:
        load(timed(write, timing))
    return str(caught.value).splitlines()


def test_the_shipped_profile_is_found_by_name_and_well_fitted(write: Write) -> None:
    config = timed(write, f"{{kind: calibrated, profile: {SHIPPED}}}")
    (point,) = load(config).points
    assert Path(point.settings["timing"]["profile"]) == profiles.shipped("profiles")[SHIPPED]
    assert ("timing", "profile") in point.files  # the run's identity counts what is in it
    profile = build.read_profile(profiles.shipped("profiles")[SHIPPED], Profile)
    for term in ("decode", "prefill", "dense", "copy", "swap_out", "swap_in"):
        assert (profile.fit or {})[term]["held_back"]["median_error"] < 0.25, term


def test_an_unknown_name_is_told_the_nearest(write: Write) -> None:
    (line,) = mistakes(write, "{kind: calibrated, profile: cpu-xenon}")
    assert "timing.profile: no such file or folder, got 'cpu-xenon', expected a path, or one of" in line
    assert f"did you mean '{SHIPPED}'?" in line


BROKEN = {
    "decode: {base_us: -1}": "decode.base_us: out of bounds, got -1, expected a number >= 0",
    "decode: {base_ms: 1}": "decode.base_ms: unknown key, expected one of base_us, us_per_sequence",
    "decode: [1]": "decode: wrong type, got a list of 1, expected a mapping of base_us",
    "dense: {ms_per_billion_weights: {1: fast}}": "dense.ms_per_billion_weights.1: wrong type, got 'fast'",
    "dense: {ms_per_billion_weights: {1: 2.0, 4: 1.0}}": "got 1 for 4 tokens, expected at least 2 as for 1 tokens",
    "kind: tpu": "kind: not allowed, got 'tpu', expected one of cpu, cuda",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_malformed_profile_is_told_file_line_and_field(write: Write, line: str) -> None:
    kept = [
        "device: d", "kind: cpu", "date: today", "dtype: float32", "copy_gb_per_s: 1", "read_gb_per_s: 1",
        "decode: {}", "prefill: {}", "dense: {ms_per_billion_weights: {1: 1}}", "copy: {}", "swap_out: {}",
        "swap_in: {}",
    ]  # fmt: skip
    key = line.split(":")[0]
    number = next(index for index, given in enumerate(kept) if given.startswith(f"{key}:"))
    kept[number] = line
    write("mine.yaml", "\n".join(kept))
    (told,) = mistakes(write, "{kind: calibrated, profile: mine.yaml}")
    assert f"mine.yaml:{number + 1}:" in told
    assert BROKEN[line] in told


def test_a_profile_that_lacks_a_term_or_is_no_yaml(write: Write) -> None:
    write("mine.yaml", "device: d\nkind: cpu\n")
    told = mistakes(write, "{kind: calibrated, profile: mine.yaml}")
    assert any("mine.yaml:1:1: decode: missing" in line for line in told)
    write("mine.yaml", "device: [")
    assert "YAML syntax error" in mistakes(write, "{kind: calibrated, profile: mine.yaml}")[0]


def test_the_block_size_is_the_allocator_s(write: Write) -> None:
    from experiments.build import make_hardware, make_timing
    from experiments.experiment import Experiment

    config = timed(write, f"{{kind: calibrated, profile: {SHIPPED}}}")
    took = []
    for sets in (["allocator.block_size=1"], ["allocator.block_size=64"], ["timing.block_size=1"]):
        (point,) = load(config, sets).points
        experiment = Experiment(**point.settings)
        took.append(make_timing(experiment, *make_hardware(experiment)).decode_seconds(10, 10_000))
    assert took[0] > took[1]
    assert took[2] == took[0]


def test_a_profile_is_readable_yaml() -> None:
    terms = {"decode": {"base_us": 1.5}, "dense": {"curve": {"1": 2.0}}, "heads": ["a, b"]}
    text = written({"device": "d", "dtype": "float32", **terms})
    assert text.splitlines() == [
        "# Timing profile of d, float32, made by kvsim calibrate.",
        "device: d", "dtype: float32", "decode: {base_us: 1.5}", "dense:", "  curve: {1: 2.0}", "heads:", "- a, b",
    ]  # fmt: skip


# The benchmark


def test_the_benchmark_has_a_row_for_every_case(monkeypatch, tmp_path: Path) -> None:
    from attention.calibration import benchmark, overlap
    from attention.calibration.trials import Heads

    small = [benchmark.Case(Heads(4, 2, 16), 2, 32, block_size) for block_size in (4, 16)]
    monkeypatch.setattr(measuring, "CPU_CACHE_BYTES", 1 << 18)
    monkeypatch.setattr(benchmark, "bandwidths", lambda device: (2e10, 1e10))
    monkeypatch.setattr(benchmark, "GQA", Heads(4, 2, 16))
    monkeypatch.setattr(benchmark, "decode_cases", lambda kind: small)
    monkeypatch.setattr(benchmark, "flex_cases", lambda kind: [])
    prompts = [replace(small[0], query_len=query_len) for query_len in (8, 32)]
    monkeypatch.setattr(benchmark, "prefill_cases", lambda kind: prompts)
    monkeypatch.setattr(benchmark, "find_device", lambda name: measuring.find_device("cpu"))
    monkeypatch.setattr(benchmark, "POOL_BYTES", {"cpu": 16 << 20})
    tiny = overlap.Load(overlap.TransformerConfig(), 2, 1, 20)
    monkeypatch.setattr(overlap, "load_of", lambda device: tiny)
    lines = bench_attention(tmp_path).splitlines()
    assert "goal >= 0.40" in lines[0]
    assert sum(line.startswith("4/2x16") for line in lines) == 4
    header = next(line for line in lines if "of copy" in line)
    assert all(name in header for name in ("reference", "torch", "SDPA", "GB/s", "/ SDPA"))
    assert any("to overlap them needs a GPU" in line for line in lines)
    for way in (
        "swap-in, then a step of all",
        "layer by layer, step of all",
        "prefetch, step of those that stay",
    ):
        assert any(line.startswith(way) for line in lines)
    for name in ("triton", "varlen_attn", "FlashInfer"):
        assert any(line.startswith(f"{name} takes no part: ") for line in lines)
