"""The README's own texts, run as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from experiments.cli import run_command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"^```{language}\n(.*?)^```", README, re.S | re.M)[1]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The README's allocator and experiment, in a folder of their own."""
    (tmp_path / "lowest_first.py").write_text(block("python"), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(block("yaml"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    from sim import allocator

    allocator._entries.pop("lowest_first", None)
    for name in [name for name, module in sys.modules.items() if "lowest_first" in str(module)]:
        del sys.modules[name]


def test_the_first_two_blocks_are_the_two_commands():
    blocks = re.findall(r"^```[a-z ]*\n(.*?)^```", README, re.S | re.M)
    assert "kvsim run configs/quickstart.yaml" in blocks[0]
    assert "pytest" in blocks[1]


def test_the_allocator_of_the_readme_runs_its_experiment(mine, capsys):
    assert run_command(["run", "mine.yaml", "--no-plots", "--jobs", "1"]) == 0
    assert "\n1 run in" in capsys.readouterr().out
    assert list((mine / "results" / "mine").glob("*/requests.parquet"))


def test_the_allocator_of_the_readme_equals_the_naive_stepper(mine, monkeypatch):
    from tests.sim import test_oracle

    monkeypatch.syspath_prepend(str(mine))
    __import__("lowest_first")
    monkeypatch.setitem(test_oracle.ALLOCATORS, "readme", ("lowest_first", {"block_size": 4}))
    ms = test_oracle.MS
    rows = [(3 * ms * (n % 4), 1 + 7 * n % 31, 1 + 11 * n % 29, 1, False) for n in range(40)]
    for kind in test_oracle.scheduler.kinds:
        for slots in (64, 400):
            test_oracle.assert_equal(
                *test_oracle.both(test_oracle.Given(rows), "readme", kind, "linear", slots)
            )


def test_every_shipped_experiment_is_valid_and_says_what_it_shows(capsys):
    for path in sorted((ROOT / "configs").glob("**/*.yaml")):
        assert path.read_text(encoding="utf-8").startswith("# "), path
        if path.name == "azure_code.yaml" or path.parent.name in (
            "parity",
            "servers",
        ):  # needs the user's files
            assert run_command(["check", str(path)]) == 2
            assert "workload.path" in capsys.readouterr().err
        else:
            assert run_command(["check", str(path)]) == 0


def test_the_example_of_the_attention_core_runs():
    text = (ROOT / "attention" / "README.md").read_text(encoding="utf-8")
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M):
        exec(code, names)
    assert len(names["decoded"].outputs[0]) == 4
    assert names["both"].shape == (2, 1, 512)
    assert names["kv_cache"].length(names["child"]) == 9
