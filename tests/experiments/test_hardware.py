"""Models, devices and the KV slots that they leave: the published figures come out of the shipped tables."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import hardware
from experiments.build import make_hardware
from experiments.capacity import make_capacity
from experiments.config import load
from experiments.experiment import Experiment
from experiments.mistakes import Mistakes
from sim.allocators import Capacity
from tests.experiments.conftest import SMALL, Write

OPT_13B = {"token_bytes": 10_240, "num_layers": 40}
"""K of a token in one layer: 5120 values in two bytes each."""


def capacity(write: Write, *sets: str) -> Capacity:
    (point,) = load(write("x.yaml", SMALL), sets).points
    experiment = Experiment(**point.settings)
    return make_capacity(experiment, *make_hardware(experiment))


def test_opt_13b_has_15728_slots_in_12_gib(write: Write) -> None:
    """PagedAttention, table 1: 15.7K slots in 12 GB."""
    assert capacity(write, "kv_memory=12 GiB") == Capacity(15_728, 2048, **OPT_13B)


def test_the_rest_of_the_device_is_about_the_paper_s_12_gb(write: Write) -> None:
    left = capacity(write, "kv_memory=null").num_slots * 819_200
    assert left == pytest.approx(12 * 2**30, rel=0.02)


def test_blocks_win_over_memory(write: Write) -> None:
    assert capacity(write, "num_blocks=100") == Capacity(1600, 2048, 100, **OPT_13B)
    assert capacity(write, "num_blocks=100", "allocator.block_size=32") == Capacity(
        3200, 2048, 100, **OPT_13B
    )
    assert capacity(write, "num_blocks=100", "allocator=contiguous") == Capacity(1600, 2048, 100, **OPT_13B)


def test_several_devices_share_what_a_token_takes(write: Write) -> None:
    shared = capacity(write, "num_blocks=100", "device=a100-40gb", "tensor_parallel=4")
    assert (shared.token_bytes, shared.num_layers) == (2_560, 40)


def test_several_devices_share_the_weights(write: Write) -> None:
    """PagedAttention, table 1: OPT-66B on four A100-40GB leaves 21 GB, 9.7K slots."""
    slots = capacity(write, "model=opt-66b", "kv_memory=null", "tensor_parallel=4").num_slots
    assert slots == pytest.approx(9_700, rel=0.06)


def test_a_shape_inline_and_a_shipped_one_with_a_change(write: Write) -> None:
    inline = "{num_layers: 2, hidden_size: 64, num_heads: 4, num_params: 1e6, max_model_len: 512}"
    assert capacity(write, f"model={inline}", "kv_memory=1 MiB") == Capacity(
        2**20 // (2 * 2 * 64 * 2), 512, token_bytes=128, num_layers=2
    )
    assert capacity(write, "model.kv_bytes_per_value=1", "kv_memory=12 GiB").num_slots == 31_457


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("opt-13b", 819_200), ("opt-66b", 2_359_296), ("opt-175b", 4_718_592), ("llama-3-8b", 131_072),
        ("llama-2-70b", 327_680), ("falcon-180b", 163_840), ("deepseek-v3-mla", 70_272),
        ("deepseek-v2-lite-mla", 31_104), ("deepseek-v2-lite-mha", 276_480),
    ],
)  # fmt: skip
def test_kv_bytes_of_a_token(name: str, kv_bytes: int) -> None:
    assert hardware.model[name]().kv_bytes_per_token == kv_bytes


def test_more_devices_than_heads_keep_copies(write: Write) -> None:
    """vLLM's `get_num_kv_heads`: at least one head a device; MLA's latent values are whole on each."""

    def slots(model: str, devices: int) -> int:
        return capacity(write, f"model={model}", f"tensor_parallel={devices}", "kv_memory=8 GiB").num_slots

    assert slots("llama-3-8b", 8) == slots("llama-3-8b", 1) == 2 * slots("llama-3-8b", 16)
    assert slots("deepseek-v2-lite-mla", 1) // 8 == slots("deepseek-v2-lite-mla", 8)


def test_llama_3_1_is_as_llama_3_with_a_longer_context() -> None:
    for size in ("8b", "70b"):
        older, newer = hardware.model[f"llama-3-{size}"](), hardware.model[f"llama-3.1-{size}"]()
        assert (older.max_model_len, newer.max_model_len) == (8192, 131_072)
        assert replace(newer, name=older.name, max_model_len=8192) == older


def test_the_devices_that_are_asked_for_can_share_the_heads(write: Write) -> None:
    """28 heads of Qwen2.5-7B do not go into 3 or 8 devices, and 4 of K and V not into 7."""
    tight = ("model=qwen2.5-7b", "model.num_params=90e9", "kv_memory=null")
    with pytest.raises(Mistakes, match="tensor_parallel of at least 28"):  # 180 GB, for which 6 would do
        capacity(write, *tight, "tensor_parallel=2")
    for devices in (3, 7, 8):
        with pytest.raises(Mistakes, match="which cannot share them evenly, expected one of 1, 2, 4, 28"):
            capacity(write, "model=qwen2.5-7b", f"tensor_parallel={devices}")


@pytest.mark.parametrize("table", ["models", "devices"])
def test_every_row_is_complete_and_says_where_it_comes_from(table: str) -> None:
    registry = {"models": hardware.model, "devices": hardware.device}[table]
    path = Path(hardware.__file__).parent / "tables" / f"{table}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for row in rows for name in (row["name"], *row["aliases"].split())]
    assert len(names) == len(set(names))
    for row in rows:
        assert row["source"]
        assert None not in row
        assert registry[row["name"]]().name == row["name"]
        assert row["source"] in registry.summary(row["name"])


def test_against_the_shared_tables(shared: Path) -> None:
    with (shared / "data" / "models.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            model = hardware.model[row["name"].lower()]()
            assert model.kv_bytes_per_token == int(row["kv_bytes_per_token_2byte"])
            assert model.weight_bytes / 1e9 == pytest.approx(float(row["weight_GB_2byte"]), rel=0.01)
            assert model.max_model_len == int(row["max_position"])


def test_layers_of_several_kinds_are_told_to_the_allocator(write: Write) -> None:
    """Gemma: 62 layers of 8 KiB a token; the slots are tokens without any window, the bytes all there are."""
    made = capacity(write, "model=gemma-3-27b", "kv_memory=1 GiB", "tensor_parallel=2")
    assert made.num_slots == 2**30 // (62 * 8192)
    assert made.kv_bytes == 2**30
    assert [(kind.count, kind.token_bytes, kind.window) for kind in made.layers] == [
        (10, 8192, None),
        (52, 8192, 1024),
    ]
    assert capacity(write, "model=gemma-3-27b", "num_blocks=100", "tensor_parallel=2").layers == made.layers


JAMBA = ("model=jamba", "max_model_len=2048", "tensor_parallel=4")


def test_states_need_an_allocator_that_keeps_them(write: Write) -> None:
    with pytest.raises(Mistakes, match=r"no place for the states.*got paged, expected prefix or jenga"):
        capacity(write, *JAMBA, "kv_memory=1 GiB")
    assert capacity(write, *JAMBA, "kv_memory=1 GiB", "allocator={kind: jenga}").kv_bytes == 2**30


def test_too_little_memory_for_the_pages_of_all_groups(write: Write) -> None:
    """A page of vLLM's has 80 tokens of 4 layers, 1.25 MiB; a large page of Jenga's 133 small ones, 33.25 MiB."""
    sets = (*JAMBA, "kv_memory=32 MiB")
    with pytest.raises(Mistakes, match="least common multiple of 8,512 slots, and there are 8,192"):
        capacity(write, *sets, "allocator={kind: jenga}")
    assert capacity(write, *sets, "allocator={kind: prefix}").kv_bytes == 2**25
    with pytest.raises(Mistakes, match="a page of all layer groups has 320 slots, and there are 256"):
        capacity(write, *JAMBA, "kv_memory=1 MiB", "allocator={kind: prefix}")
