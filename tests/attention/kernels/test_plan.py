"""Plans and the table of configurations: chosen on the host, without Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.calibration import tuning
from attention.kernels import plan
from attention.kernels.configurations import SHIPPED, Configuration, configuration, key_of, read
from attention.kernels.launch import refusal

ROOT = Path(__file__).parents[3]
KINDS = ["decode", "prefill"]


@given(
    kind=st.sampled_from(KINDS),
    head_dim=st.integers(2, 32).map(lambda eighths: 8 * eighths),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    group=st.integers(1, 200),
    block_size=st.integers(1, 256),
)
def test_every_shape_has_a_plan(kind, head_dim, dtype, group, block_size):
    chosen = configuration(key_of(kind, head_dim, dtype, group, block_size))
    for value in (chosen, plan.UNALIGNED[kind]):
        sizes = plan.constants(kind, value, head_dim=head_dim, group=group, block_size=block_size)
        assert sizes["DIMS"] >= max(16, head_dim)
        assert 1 <= sizes["HEADS"] <= min(group, sizes["ROWS"])
        assert sizes["ROWS"] & (sizes["ROWS"] - 1) == 0
        assert sizes["ROWS"] >= max(16, sizes["HEADS"] * sizes.get("QUERIES", 1))
        assert sizes.get("QUERIES", 1) >= 1


def test_the_entry_that_gives_most_holds(tmp_path, monkeypatch):
    measured = asdict(key_of("decode", 128, "float16", 4, 16)) | asdict(Configuration(32, 64, 8, 5, 6))
    table = tuning.merged(json.loads(SHIPPED.read_text(encoding="utf-8")), [measured | {"microseconds": 3.5}])
    path = tmp_path / "table.json"
    path.write_text(tuning.written(table), encoding="utf-8")
    monkeypatch.setattr("attention.kernels.configurations.shipped", lambda: read(path))
    assert configuration(key_of("decode", 100, "float16", 3, 31)) == Configuration(32, 64, 8, 5, 6)
    assert configuration(key_of("decode", 128, "bfloat16", 4, 16)).tile == 64
    assert configuration(key_of("decode", 128, "float16", 4, 15)).tile == 64
    again = tuning.merged(table, [measured | {"tile": 64}])
    assert len(again["configurations"]) == len(table["configurations"])


def test_a_kind_that_nobody_knows_is_named():
    with pytest.raises(LookupError, match="got no entry for Key"):
        configuration(key_of("training", 128, "float16", 4, 16))


@given(num_programs=st.integers(1, 5000), longest=st.integers(0, 200_000), programs_per_sm=st.integers(1, 6))
def test_splits_are_no_more_than_there_are_tiles(num_programs, longest, programs_per_sm):
    splits = plan.num_splits(num_programs, longest, 132, programs_per_sm)
    assert 1 <= splits <= min(plan.MOST_SPLITS, max(1, 2 * longest / plan.SPLIT_TILE))


def test_splits_of_well_known_batches_on_an_h100():
    def splits(batch: int, context: int) -> int:
        return plan.num_splits(8 * batch, context, 132, 3)  # 8 KV heads

    assert splits(1, 32768) * 8 >= 0.9 * 132 * 3  # one long sequence fills the device
    assert splits(1, 40) == 1
    assert splits(1, 1024) > 4  # a short one is split too, so that nobody waits for a long share
    assert splits(64, 4096) == 1
    assert splits(256, 1024) == 1
    assert splits(52, 4096) > 1  # 3.15 programs a multiprocessor: most would idle while a few do a fourth
    assert splits(1, 5000) == splits(1, 8000)  # rarely another grid


def test_strides_are_counted_in_16_bytes_where_they_allow_it():
    assert plan.step_of([1024, 128], 2) == 8
    assert plan.step_of([1024, 72], 2) == 8
    assert plan.step_of([1024, 129], 2) == 1
    assert plan.step_of([1024, 132], 4) == 4


def test_smaller_gpus_get_fewer_stages():
    asked = Configuration(64, 64, 4, 5)
    sizes = {"head_dim": 128, "item_size": 2}
    assert plan.fitted(asked, **sizes, shared_memory=232448) == asked
    assert plan.fitted(asked, **sizes, shared_memory=101376).num_stages == 3
    assert plan.fitted(asked, **sizes, shared_memory=1).num_stages == 1


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_tries_what_is_shipped_first_and_takes_the_fastest(kind):
    key = key_of(kind, 128, "bfloat16", 4, 16)
    tried = list(tuning.candidates(kind, 128, 2))
    assert len(tried) > 5
    wanted = tried[3]

    def measure(candidate: Configuration) -> float:
        same = (candidate.tile, candidate.num_warps, candidate.num_stages, candidate.rows)
        other = (wanted.tile, wanted.num_warps, wanted.num_stages, wanted.rows)
        return 1.0 + (same != other) + 0.1 * (candidate.programs_per_sm != 2)

    fastest, took, before = tuning.best(key, tried, measure)
    assert (fastest.tile, fastest.num_warps, fastest.num_stages) == (
        wanted.tile,
        wanted.num_warps,
        wanted.num_stages,
    )
    assert took <= before
    if kind == "decode":
        assert fastest.programs_per_sm == 2


def test_tuning_says_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.main(["--out", str(tmp_path / "table.json")]) == 2
    assert capsys.readouterr().err.startswith("tuning: ")
    assert not (tmp_path / "table.json").exists()


def test_tuning_writes_a_table_that_is_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    for name, fake in {
        "refusal": lambda *_: None,
        "bandwidths": lambda _: (2e12, 3e12),
        "ProcessPoolExecutor": FakePool,
        "Bench": lambda *_: None,
        "timer": lambda *_: lambda candidate: 1e-4 * candidate.tile / candidate.num_stages,
    }.items():
        monkeypatch.setattr(tuning, name, fake)
    out = tmp_path / "table.json"
    assert tuning.main(["--out", str(out), "--groups", "4", "--block-sizes", "16"]) == 0
    entries = [entry for entry in read(out) if "group" in entry.given]
    assert [(entry.given["kind"], entry.configuration.tile) for entry in entries] == [
        ("decode", 32),
        ("prefill", 32),
    ]
    assert len(read(out)) == len(read(SHIPPED)) + 2
    assert "reads 3.00 TB/s" in capsys.readouterr().out


class FakePool:
    """Compiles nothing."""

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, *_: object) -> list[None]:
        return []


@pytest.mark.parametrize(
    ("head_dim", "dtype", "words"),
    [
        (12, torch.float16, "from 16 to 256 in steps of 8, got 12"),
        (264, torch.float16, "from 16 to 256 in steps of 8, got 264"),
        (50, torch.float32, "got 50"),
        (64, torch.float64, "got torch.float64"),
    ],
)
def test_what_is_not_supported_is_said(head_dim, dtype, words):
    assert words in str(refusal(head_dim, dtype, torch.device("cpu")))


def test_nothing_of_triton_is_imported_with_the_functional_layer():
    command = (
        "import sys, torch, attention, attention.functional as f, attention.kernels.launch, attention.kernels.moving\n"
        "f.paged_attention(torch.randn(1, 2, 16), *torch.randn(2, 3, 4, 1, 16), torch.tensor([[1]]),"
        " torch.tensor([3]))\n"
        "raise SystemExit('triton' in sys.modules and 'triton was imported')"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
