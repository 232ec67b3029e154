"""The README's own texts, run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from experiments.cli import run_command

ROOT = Path(__file__).parent.parent
OWN = ("lowest_first", "one_prompt")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The README's policies and experiment, in a folder of their own."""
    for name, text in zip(OWN, blocks("python"), strict=True):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    from sim import allocator, scheduler, victim

    for registry in (allocator, scheduler, victim):
        for name in (*OWN, "longest_prompt"):
            registry._entries.pop(name, None)
    for name in [name for name, module in sys.modules.items() if any(own in str(module) for own in OWN)]:
        del sys.modules[name]


def test_the_first_two_blocks_are_the_two_commands():
    first, second, *_ = blocks("[a-z ]*")
    assert "kvsim run configs/quickstart.yaml" in first
    assert "pytest" in second


def test_the_policies_of_the_readme_run_its_experiment(mine, capsys):
    command = ["run", "mine.yaml", "--no-plots", "--jobs", "1"]
    assert run_command(command) == 0
    assert run_command([*command, *shlex.split(blocks("sh")[2])[3:]]) == 0
    assert capsys.readouterr().out.count("\n1 run in") == 2
    assert len(list((mine / "results" / "mine").glob("*/requests.parquet"))) == 2


def test_the_policies_of_the_readme_equal_the_naive_stepper(mine, monkeypatch):
    from tests.sim import test_oracle

    monkeypatch.syspath_prepend(str(mine))
    for name in OWN:
        __import__(name)
    monkeypatch.setitem(test_oracle.ALLOCATORS, "readme", ("lowest_first", {"block_size": 4}))
    ms = test_oracle.MS
    rows = [(3 * ms * (n % 4), 1 + 7 * n % 31, 1 + 11 * n % 29, 1, False) for n in range(40)]
    assert "one_prompt" in test_oracle.scheduler.kinds
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
