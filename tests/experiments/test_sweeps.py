"""Sweeps: points, the same requests at each, several processes, and what is left when one is killed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments.config import load
from experiments.results import Results
from sim.errors import UserError
from tests.experiments.conftest import SMALL, Kvsim, Write

SWEEP = (
    SMALL
    + """\
sweep:
  zip:
    allocator: [{kind: contiguous, reserve: max}, {kind: paged, block_size: 16}]
    scheduler: [orca, {kind: vllm_v0, preemption: recompute}]
  workload.arrivals.rate: [2, 4]
"""
)
SLOW = '''\
import os
import time

from sim import StepTime, timing


@timing("slow")
class Slow(StepTime):
    """Steps of 10 ms that take a while to compute, so that a test has time to interrupt them."""

    def __init__(self, model, device, *, pause_s: float = 0.3) -> None:
        self.pause_s = pause_s

    def seconds(self, step) -> float:
        time.sleep(self.pause_s)
        self.pause_s = 0
        return 0.01

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        return 0.01
'''
FAULTY = '''\
import os

from sim import Stalled, StepTime, timing


@timing("faulty")
class Faulty(StepTime):
    """Fails as it is told to."""

    def __init__(self, model, device, *, how: str) -> None:
        self.how = how

    def seconds(self, step) -> float:
        if self.how == "stall":
            raise Stalled("request 3 needs 7 blocks, 3 are there")
        if self.how == "bug":
            raise KeyError("slot")
        if self.how == "die":
            os.kill(os.getpid(), 9)
        return 0.01

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        return 0.01
'''


def rows(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(folder: str) -> list[str]:
    """runs.csv as it is, but for its last two columns."""
    lines = (Path(folder) / "runs.csv").read_text().splitlines()
    assert lines[0].endswith(",wall_s,cpu_s")
    return [line.rsplit(",", 2)[0] for line in lines]


def test_points_in_the_order_written_the_last_axis_fastest(write: Write) -> None:
    plan = load(write("x.yaml", SWEEP))
    told = [
        (point.settings["allocator"]["kind"], point.settings["scheduler"]["kind"],
         point.settings["workload"]["arrivals"]["rate"])
        for point in plan.points
    ]  # fmt: skip
    assert told == [
        ("contiguous", "orca", 2), ("contiguous", "orca", 4), ("paged", "vllm_v0", 2), ("paged", "vllm_v0", 4)
    ]  # fmt: skip
    assert plan.swept == ["allocator", "scheduler", "workload.arrivals.rate"]


def test_an_axis_inside_another_is_put_into_its_values(write: Write) -> None:
    text = SMALL + "sweep: {allocator.block_size: [8, 32], allocator: [paged, {kind: paged, watermark: 0}]}\n"
    plan = load(write("x.yaml", text))
    told = [
        (point.settings["allocator"]["block_size"], point.settings["allocator"]["watermark"])
        for point in plan.points
    ]
    assert told == [(8, 0.01), (8, 0.0), (32, 0.01), (32, 0.0)]


def test_every_point_sees_the_same_requests(write: Write, kvsim: Kvsim) -> None:
    text = SMALL.replace("fixed, prompt: 100, output: 20", "sharegpt")
    text += "replications: 2\nsweep: {allocator: [contiguous, paged], scheduler: [orca, static]}\n"
    write("x.yaml", text)
    assert kvsim("run", "x.yaml", "--no-plots", "--jobs", "1").code == 0
    seen: dict[str, set[str]] = {"0": set(), "1": set()}
    for row in rows("results/small"):
        table = pq.read_table(Path("results/small", row["run_id"], "requests.parquet")).sort_by("request_id")
        columns = table.select(["request_id", "arrival_time", "prompt_tokens", "output_tokens"])
        seen[row["replication"]].add(str(columns.to_pydict()))
    assert [len(of_one) for of_one in seen.values()] == [1, 1]
    assert seen["0"] != seen["1"]


def test_runs_hold_a_row_per_point_with_what_was_swept(write: Write, kvsim: Kvsim) -> None:
    write("x.yaml", SWEEP)
    said = kvsim("run", "x.yaml", "--no-plots", "--jobs", "1")
    assert said.code == 0
    assert said.out.splitlines()[0].split()[:3] == ["allocator", "scheduler", "workload.arrivals.rate"]
    assert said.out.splitlines()[-1] == "4 runs in results/small"
    first = rows("results/small")[0]
    assert list(first)[:5] == ["run_id", "replication", "allocator", "scheduler", "workload.arrivals.rate"]
    assert first["allocator"] == "{kind: contiguous, reserve: max}"
    assert first["requests_finished"] == "60"
    table = pq.read_table("results/small/runs.parquet")
    assert table.column("workload.arrivals.rate").to_pylist() == [2, 4, 2, 4]
    assert table.column("run_id").to_pylist() == [row["run_id"] for row in rows("results/small")]


def test_several_processes_give_what_one_gives(write: Write, kvsim: Kvsim) -> None:
    write("x.yaml", SWEEP)
    assert kvsim("run", "x.yaml", "--no-plots", "--jobs", "1", "--out", "one").code == 0
    assert kvsim("run", "x.yaml", "--no-plots", "--jobs", "2", "--out", "two").code == 0
    assert without_times("one/small") == without_times("two/small")


def test_what_is_stored_is_not_run_again(write: Write, kvsim: Kvsim) -> None:
    write("x.yaml", SWEEP)
    kvsim("run", "x.yaml", "--no-plots", "--jobs", "1")
    before = Path("results/small/runs.csv").read_bytes()
    again = kvsim("run", "x.yaml", "--no-plots", "--jobs", "1")
    assert again.out.splitlines()[-1] == "4 runs in results/small, 4 of them stored before"
    assert Path("results/small/runs.csv").read_bytes() == before
    more = kvsim("run", "x.yaml", "--no-plots", "--jobs", "1", "--set", "sweep.workload.arrivals.rate=[4, 8]")
    assert more.out.splitlines()[-1] == "4 runs in results/small, 2 of them stored before"
    other = kvsim("run", "x.yaml", "--no-plots", "--jobs", "1", "--set", "seed=1")
    assert other.out.splitlines()[-1] == "4 runs in results/small"


def test_a_changed_input_file_is_another_run(write: Write, kvsim: Kvsim) -> None:
    trace = "arrival_time_s,prompt_tokens,output_tokens\n0,5,5\n1,5,5\n"
    sets = ("--no-plots", "--set", "workload={kind: trace, path: trace.csv}")
    write("trace.csv", trace)
    kvsim("run", "small.yaml", *sets)
    write("elsewhere/trace.csv", trace)
    moved = kvsim("run", "small.yaml", *sets, "--set", "workload.path=elsewhere/trace.csv")
    assert "stored before" in moved.out
    write("trace.csv", trace + "2,5,5\n")
    assert "stored before" not in kvsim("run", "small.yaml", *sets).out


def test_a_point_that_fails_does_not_stop_the_others(write: Write, kvsim: Kvsim) -> None:
    write("faulty.py", FAULTY)
    write("x.yaml", SMALL.replace("{kind: fixed, prefill_ms: 20, decode_ms: 10}", "{kind: faulty}")
          + "plugins: [faulty.py]\nsweep:\n  timing.how: [stall, bug, die, fine]\n")  # fmt: skip
    said = kvsim("run", "x.yaml", "--no-plots", "--jobs", "2")
    assert said.code == 2  # one of them is the plug-in's own fault
    line = FAULTY.splitlines().index(next(line for line in FAULTY.splitlines() if "KeyError" in line)) + 1
    assert said.lines == [
        "failed: timing.how=stall: request 3 needs 7 blocks, 3 are there",
        f"failed: timing.how=bug: {Path('faulty.py').resolve()}:{line}: seconds raises KeyError: 'slot'",
        "failed: timing.how=die: its process was ended by SIGKILL, perhaps for want of memory",
    ]
    assert [row["timing.how"] for row in rows("results/small")] == ["fine"]
    assert not list(Path("results/small").glob(".*"))


def test_two_cannot_write_into_one_folder(write: Write) -> None:
    pytest.importorskip("fcntl")
    first, second = Results(Path("results/x")), Results(Path("results/x"))
    first.open()
    with pytest.raises(UserError, match="another kvsim is writing there"):
        second.open()
    first.close()
    second.open()
    second.close()


def children_of(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_a_killed_sweep_goes_on_where_it_was(write: Write, kvsim: Kvsim) -> None:
    write("slow.py", SLOW)
    text = SMALL.replace("{kind: fixed, prefill_ms: 20, decode_ms: 10}", "{kind: slow}")
    write("x.yaml", text + "plugins: [slow.py]\nsweep:\n  workload.arrivals.rate: [1, 2, 3, 4, 5, 6, 7, 8]\n")
    command = [sys.executable, "-m", "experiments", "run", "x.yaml", "--no-plots", "--jobs", "2"]
    root = Path(__file__).parents[2]
    victim = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.DEVNULL)
    folder = Path("results/small")
    deadline = time.monotonic() + 30
    while len(list(folder.glob("*/summary.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children_of(victim.pid)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    stored = {path.parent.name for path in folder.glob("[!.]*/summary.json")}
    assert 2 <= len(stored) < 8
    assert not (folder / "runs.csv").exists()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers outlived their parent"

    resumed = kvsim("run", "x.yaml", "--no-plots", "--jobs", "2")
    assert resumed.code == 0
    assert "stored before" in resumed.out
    assert not list(folder.glob(".*"))
    assert kvsim("run", "x.yaml", "--no-plots", "--jobs", "2", "--out", "whole").code == 0
    assert without_times("results/small") == without_times("whole/small")
    assert stored < {row["run_id"] for row in rows("results/small")}


@pytest.mark.parametrize("table", ["requests", "steps", "memory"])
@pytest.mark.parametrize("left", [0, 100])
def test_a_run_whose_tables_are_damaged_is_run_again(
    table: str, left: int, write: Write, kvsim: Kvsim
) -> None:
    write("x.yaml", SMALL)
    assert kvsim("run", "x.yaml").code == 0
    (file,) = Path("results/small").glob(f"*/{table}.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    drawn = kvsim("plot", "results/small")
    assert drawn.code in (0, 2)
    assert "fault of kvsim" not in drawn.err
    said = kvsim("run", "x.yaml")
    assert (said.code, said.err) == (0, "")
    assert "stored before" not in said.out
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="interrupts a group of processes as a terminal does")
@pytest.mark.parametrize(("after_s", "times"), [(0.5, 1), (0.9, 3), (1.4, 3)])
def test_an_interrupted_sweep_says_so_and_nothing_else(after_s: float, times: int, write: Write) -> None:
    write("slow.py", SLOW.replace("0.3", "9"))
    text = SMALL.replace("{kind: fixed, prefill_ms: 20, decode_ms: 10}", "{kind: slow}")
    write("x.yaml", text + "plugins: [slow.py]\nsweep:\n  workload.arrivals.rate: [1, 2, 3, 4]\n")
    root = Path(__file__).parents[2]
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # or ignored, as after nohup
    run = "from experiments.cli import main; main(sys.argv[1:])"
    sweep = subprocess.Popen(
        [sys.executable, "-c", f"{heard}; {run}", "run", "x.yaml", "--jobs", "2"], text=True,
        env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not Path("results/small").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(after_s - 0.5)
    for _ in range(times):
        os.killpg(sweep.pid, signal.SIGINT)
        time.sleep(0.05)
    out, err = sweep.communicate(timeout=30)
    assert (sweep.returncode, out) == (130, "")
    assert err == "interrupted; what is stored stays, the same command goes on from there\n"
    assert not list(Path("results/small").glob(".*"))
