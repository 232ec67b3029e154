"""The command line: what it prints, its exit codes, and how little it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.conftest import SMALL, Kvsim, Write

ROOT = Path(__file__).parents[2]


def test_a_good_experiment(write: Write, kvsim: Kvsim) -> None:
    assert kvsim("check", "small.yaml") == (0, "small.yaml: ok, 1 run\n", "")
    assert kvsim("check", "small.yaml", "--set", "replications=3").out == "small.yaml: ok, 3 runs\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["chek", "x.yaml"],
            "kvsim: unknown command, got 'chek', expected one of run, check, list, schema, plot, report, validate, "
            "calibrate, parity, hit-rate, fit, compare, demo, bench, did you mean 'check'?; see kvsim --help",
        ),
        (
            ["run", "x.yaml", "--jbos", "4"],
            "kvsim run: not understood: --jbos 4, did you mean '--jobs'?; see kvsim run --help",
        ),
        (["check", "x.yaml", "y.yaml"], "kvsim check: not understood: y.yaml; see kvsim check --help"),
        (
            ["run", "x.yaml", "--out", ""],
            "kvsim run: argument --out: got '', expected a path; see kvsim run --help",
        ),
        (["run"], "kvsim run: the following arguments are required: CONFIG; see kvsim run --help"),
        (
            ["run", "x.yaml", "--jobs", "0"],
            "kvsim run: argument --jobs: got '0', expected an integer >= 1; see kvsim run --help",
        ),
    ],
)
def test_a_command_that_is_not_understood(arguments: list[str], line: str, kvsim: Kvsim) -> None:
    assert kvsim(*arguments) == (2, "", line + "\n")


def test_list_of_a_word_that_names_nothing(kvsim: Kvsim) -> None:
    said = kvsim("list", "pagd")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(
        "kvsim list: unknown kind, got 'pagd', expected experiment, combinations, model, "
    )
    assert said.err.endswith(" or a policy, did you mean 'paged'?\n")


def test_debug_shows_where(write: Write, kvsim: Kvsim) -> None:
    with pytest.raises(Exception, match="nowhere"):
        kvsim("--debug", "check", "nowhere.yaml")
    with pytest.raises(Exception, match="nowhere"):
        kvsim("check", "nowhere.yaml", "--debug")


def test_list_tells_fields_bounds_and_defaults(kvsim: Kvsim) -> None:
    told = kvsim("list").out
    for registry in (
        "model",
        "device",
        "workload",
        "allocator",
        "scheduler",
        "timing",
        "arrivals",
        "lengths",
    ):
        assert f"\n{registry}:\n" in told
    lines = [" ".join(line.split()) for line in kvsim("list", "paged").out.splitlines()]
    assert "block_size an integer >= 1, default 16 KV slots per block." in lines
    assert kvsim("list", "allocators").out == kvsim("list", "allocator").out
    assert "sampling.beam_width" in kvsim("list", "synthetic").out
    assert "num_layers" in kvsim("list", "opt-13b").out
    assert "replications" in kvsim("list", "experiment").out


def test_the_schema_describes_what_check_accepts(kvsim: Kvsim) -> None:
    schema = json.loads(kvsim("schema").out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    kinds, policies = schema["properties"]["allocator"]["anyOf"]
    assert {"contiguous", "paged"} <= set(kinds["enum"])
    paged = next(
        policy for policy in policies["oneOf"] if policy["properties"]["kind"].get("const") == "paged"
    )
    assert paged["properties"]["block_size"] == {
        "default": 16, "description": "KV slots per block.", "minimum": 1, "type": "integer"
    }  # fmt: skip
    assert paged["required"] == ["kind"]


def test_a_bar_shows_where_somebody_watches(
    write: Write, kvsim: Kvsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        watched = kvsim("run", "small.yaml", "--no-plots", "--set", "replications=2", "--jobs", "1")
    assert "2/2 runs" in watched.err
    assert kvsim("run", "small.yaml", "--no-plots", "--set", "seed=5").err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_no_fault_of_kvsim(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments", "list"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert (run.returncode, run.stderr) == (1, "kvsim: standard output: no space left on device\n")


def test_a_terminal_that_knows_ascii_only_is_no_reason_to_stop(tmp_path: Path) -> None:
    code = "from experiments.cli import main; import experiments.cli as cli\n"
    code += "cli._COMMANDS['demo'] = lambda options: print('a \u2014 b') or 0\nmain(['demo'])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "a ? b\n", "")


def test_a_python_without_the_packages_says_how_to_get_them(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-S", "-m", "experiments", "check", "x.yaml"], capture_output=True, text=True,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("kvsim: numpy is not installed: run pip install -e .")
    assert len(run.stderr.splitlines()) == 1


def test_the_benchmarks_are_listed(kvsim: Kvsim) -> None:
    assert "one of sim, policies, paper, attention, beams" in " ".join(kvsim("bench", "--help").out.split())
    assert "expected one of sim, policies, paper, attention, beams" in kvsim("bench", "sin").err


def modules_after(code: str, cwd: Path) -> set[str]:
    """Modules that a fresh interpreter has imported after some code."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, file=sys.stderr)"],
        capture_output=True, text=True, check=True, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return set(run.stderr.split())


def test_a_run_that_nobody_reads_is_stored_as_a_whole(write: Write, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as kvsim run | true
    code = "from experiments.cli import main; main(['run', 'small.yaml', '--no-probe'])"
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")
    assert (tmp_path / "results" / "small" / "report.html").exists()


def test_help_imports_next_to_nothing(tmp_path: Path) -> None:
    code = "from experiments.cli import run_command\ntry: run_command(['--help'])\nexcept SystemExit: pass"
    heavy = {
        "numpy",
        "simpy",
        "pydantic_core",
        "ruamel",
        "pyarrow",
        "rich",
        "pandas",
        "torch",
        "matplotlib",
        "sim",
    }
    assert not heavy & modules_after(code, tmp_path)


def test_a_run_imports_nothing_heavy(write: Write) -> None:
    command = ["run", "small.yaml", "--no-plots", "--no-probe"]
    code = f"from experiments.cli import run_command\nassert run_command({command}) == 0"
    heavy = {"torch", "pandas", "matplotlib", "rich", "pydantic"}
    assert not heavy & modules_after(code, Path.cwd())


def test_a_worker_imports_no_yaml_and_no_schema(write: Write) -> None:
    write("make.py", "")
    code = (
        "from experiments.performance import Job, perform\n"
        "import json, pathlib\n"
        "job = Job(**json.loads(pathlib.Path('job.json').read_text()))\n"
        "assert perform(job) is None"
    )
    from dataclasses import asdict

    from experiments.config import load
    from experiments.sweep import _runs

    Path("out").mkdir()
    ((_, job),) = _runs(load(write("x.yaml", SMALL), probe=False), Path("out"))
    write("job.json", json.dumps(asdict(job)))
    imported = modules_after(code, Path.cwd())
    assert not {"torch", "pandas", "matplotlib", "rich", "pydantic_core", "ruamel"} & imported
    assert len(list(Path("out").glob("*/summary.json"))) == 1


def test_the_module_is_the_command(write: Write) -> None:
    command = [sys.executable, "-m", "experiments", "check", "small.yaml"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (run.returncode, run.stdout, run.stderr) == (0, "small.yaml: ok, 1 run\n", "")
