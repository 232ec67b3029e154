"""Fitting to a measured run: runs of our own whose parameters are known, files that are none, the real servers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from experiments.config import load
from experiments.experiment import Experiment
from experiments.fit import Servings, _with, fit
from experiments.least_squares import least_squares
from experiments.measured import read_measured
from sim.errors import UserError
from tests.experiments.conftest import Kvsim, Write

SERVERS = Path(__file__).parents[2] / "configs" / "servers" / "rtx-pro-6000.yaml"
SERVER = """\
# A server of our own.
name: own
model: llama-3-8b
device: a100-40gb
num_blocks: 12000
workload: {kind: trace, path: asked.jsonl, format: jsonl}
allocator: {kind: prefix, block_size: 16}
scheduler: {kind: vllm_v1, max_num_seqs: 48, max_num_batched_tokens: 1024}
timing: {kind: roofline}
"""
TRUE = {"compute_efficiency": 0.4, "memory_efficiency": 0.65, "step_overhead_ms": 2.5}
PAIR = """\
{"arrival_time": 100.0, "input_toks": 30, "output_toks": 3, "queued_ts": 7.0, "scheduled_ts": 7.1, \
"first_token_ts": 7.5, "last_token_ts": 8.5}
{"arrival_time": 102.0, "input_toks": 20, "output_toks": 1, "queued_ts": 9.25, "scheduled_ts": 9.25, \
"first_token_ts": 10.0, "last_token_ts": 10.0}
"""


def ask(number: int, longest: int) -> str:
    """A workload, most of which comes within an instant."""
    draw = random.Random(1)
    rows = []
    for each in range(number):
        at = (5_000_000 if each < 2 * number // 3 else 200_000_000) * each
        prompt, output = draw.randint(100, 5000), draw.randint(2, longest)
        rows.append(json.dumps({"arrival_time_ns": at, "input_length": prompt, "output_length": output}))
    return "\n".join(rows)


@pytest.fixture
def server(write: Write) -> Path:
    """An experiment with 36 requests."""
    write("asked.jsonl", ask(36, 50))
    return write("own.yaml", SERVER)


def experiment(path: Path, *sets: str) -> Experiment:
    return Experiment(**load(path, sets, probe=False).points[0].settings)


def serve(path: Path, to: Path, figures: dict[str, float]) -> None:
    """Write the file that the experiment would leave behind, were it a server with these figures."""
    nobody = Servings.__new__(Servings)
    times = nobody.predicted(_with(experiment(path), figures))
    rows = []
    for number in range(len(times.arrival)):
        engine = 5000.0  # its clock starts elsewhere
        row = {
            "request_id": str(number), "input_toks": int(times.prompt_tokens[number]),
            "output_toks": int(times.output_tokens[number]), "arrival_time": 1.7e9 + times.arrival[number],
            "queued_ts": engine + times.arrival[number], "scheduled_ts": engine + times.scheduled[number],
            "first_token_ts": engine + times.first_token[number], "last_token_ts": engine + times.last_token[number],
        }  # fmt: skip
        rows.append(json.dumps(row))
    to.write_text("\n".join(reversed(rows)), encoding="utf-8")  # servers write requests as they end


def squares(run: Servings, asked: Experiment) -> float:
    return float(np.square(run.residuals(asked)).sum())


def test_a_fit_finds_the_figures_of_a_run_of_our_own(server, tmp_path):
    serve(server, tmp_path / "run.jsonl", TRUE)
    asked = experiment(server)
    run = Servings(asked, tmp_path / "run.jsonl")
    fitted = fit(run, asked)
    assert fitted["compute_efficiency"] == pytest.approx(TRUE["compute_efficiency"], rel=0.01)
    assert fitted["memory_efficiency"] == pytest.approx(TRUE["memory_efficiency"], rel=0.02)
    # Reading the weights and the overhead are both once a step: only the context tells them apart.
    assert fitted["step_overhead_ms"] == pytest.approx(TRUE["step_overhead_ms"], abs=0.5)
    assert squares(run, _with(asked, fitted)) < 1e-5 < squares(run, asked)


def test_a_fit_finds_the_blocks_where_memory_binds(server, tmp_path):
    Path("asked.jsonl").write_text(ask(60, 200), encoding="utf-8")
    serve(server, tmp_path / "run.jsonl", {**TRUE, "num_blocks": 4000})
    asked = experiment(server, "num_blocks=6000")
    run = Servings(asked, tmp_path / "run.jsonl")
    fitted = fit(run, asked, blocks=True)
    assert fitted["num_blocks"] == pytest.approx(4000, rel=0.03)
    assert squares(run, _with(asked, fitted)) < 2e-3 < 0.02 < squares(run, asked)


def test_the_commands(server, kvsim: Kvsim, tmp_path):
    Path("asked.jsonl").write_text(ask(8, 20), encoding="utf-8")
    serve(server, Path("run.jsonl"), TRUE)
    answer = kvsim("compare", server, "--measured", "run.jsonl")
    assert answer.code == 0
    assert answer.out.startswith("run.jsonl: llama-3-8b on 1 x a100-40gb-sxm\n")
    (makespan,) = [line.split() for line in answer.out.splitlines() if line.startswith("makespan s")]
    assert float(makespan[4]) < -2, "the datasheet's bound is too fast"
    answer = kvsim("fit", server, "--measured", "run.jsonl", "--out", "fitted.yaml")
    assert answer.code == 0
    assert "compute_efficiency: 0." in answer.out
    again = kvsim("compare", "fitted.yaml", "--measured", "run.jsonl")
    assert answer.out.startswith(again.out), "what was written serves as what was told"
    assert (
        Path("fitted.yaml")
        .read_text(encoding="utf-8")
        .startswith("# A server of our own. Fitted to run.jsonl")
    )
    assert kvsim("run", "fitted.yaml", "--no-plots", "--no-probe", "--out", tmp_path / "out").code == 0


def test_a_figure_at_its_bound_is_told(server, kvsim: Kvsim):
    Path("asked.jsonl").write_text(ask(12, 40), encoding="utf-8")
    serve(server, Path("run.jsonl"), {**TRUE, "memory_efficiency": 1.0})
    device = "device={kind: a100-40gb, memory_gb_per_s: 1000}"
    answer = kvsim("fit", server, "--measured", "run.jsonl", "--set", device)
    assert "memory_efficiency: 1  stands at its bound" in answer.out


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('{"arrival_time": 102.0', "[102.0", ":2: got no JSON"),
        ('"arrival_time": 102.0, ', "", ":2: arrival_time: got None, expected a time in seconds"),
        ('"queued_ts": 9.25', '"queued_ts": "soon"', ":2: queued_ts: got 'soon', expected a time"),
        ('"queued_ts": 9.25', '"queued_ts": NaN', ":2: queued_ts: got nan, expected a time"),
        ('"input_toks": 20', '"input_toks": 0', ":2: input_toks: got 0, expected a whole number >= 1"),
        ('"output_toks": 3', '"output_toks": true', ":1: output_toks: got True, expected a whole number"),
        ('"first_token_ts": 7.5', '"first_token_ts": 7.0', ":1: first_token_ts: got 7.0, before scheduled_ts, 7.1"),
        (PAIR, "\n", ": got no requests"),
        (PAIR, "7\n", ":1: got 7, expected a JSON object"),
    ],
)  # fmt: skip
def test_a_file_that_is_none(old, new, complaint, tmp_path):
    assert old in PAIR
    path = tmp_path / "run.jsonl"
    path.write_text(PAIR.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_measured(path)
    assert f"{path}{complaint}" in str(error.value)


def test_a_file_that_is_not_there(server, kvsim: Kvsim):
    answer = kvsim("compare", server, "--measured", "none.jsonl")
    assert (answer.code, answer.err) == (2, "none.jsonl: cannot be read: No such file or directory\n")


def test_clocks_and_figures(tmp_path):
    """The second request is queued a quarter of a second after it was sent; the first, at once."""
    path = tmp_path / "run.jsonl"
    path.write_text(PAIR, encoding="utf-8")
    times, lines = read_measured(path)
    assert lines == [1, 2]
    assert times.ttft.tolist() == pytest.approx([0.5, 1.0])
    assert times.e2e.tolist() == pytest.approx([1.5, 1.0])
    assert times.tpot.tolist() == pytest.approx([0.5])
    figures = times.figures()
    assert figures["makespan s"] == pytest.approx(3.0)
    assert figures["output tokens/s"] == pytest.approx(4 / 3)
    assert figures["mean running"] == pytest.approx((1.4 + 0.75) / 3)


def test_another_workload_is_refused(server, kvsim: Kvsim):
    serve(server, Path("run.jsonl"), TRUE)
    text = Path("run.jsonl").read_text(encoding="utf-8")
    first = json.loads(text.splitlines()[-1])
    for name, value, complaint in (
        ("input_toks", 7, f"other.jsonl:36: input_toks: got 7, request 0 of the workload has {first['input_toks']}"),
        ("arrival_time", first["arrival_time"] - 3, ":35: arrival_time: got 3.005 s after the first, request 1"),
    ):  # fmt: skip
        lines = [*text.splitlines()[:-1], json.dumps({**first, name: value})]
        Path("other.jsonl").write_text("\n".join(lines), encoding="utf-8")
        answer = kvsim("fit", server, "--measured", "other.jsonl")
        assert answer.code == 2
        assert complaint in answer.err
    Path("other.jsonl").write_text("\n".join(text.splitlines()[1:]), encoding="utf-8")
    answer = kvsim("fit", server, "--measured", "other.jsonl")
    assert "got 35 requests, expected the 36 of the workload" in answer.err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "timing={kind: linear}"], "timing.kind: got 'linear', expected roofline"),
        (["--set", "sweep={seed: [1, 2]}"], "sweep: got 2 points, expected one experiment"),
        (["--set", "num_blocks=10"], "the experiment refuses request"),
        (["--out", "nowhere/fitted.yaml"], "--out: nowhere/fitted.yaml cannot be written"),
    ],
)
def test_what_cannot_be_fitted(options, complaint, server, kvsim: Kvsim):
    serve(server, Path("run.jsonl"), TRUE)
    answer = kvsim("fit", server, "--measured", "run.jsonl", *options)
    assert answer.code == 2
    assert complaint in answer.err


def test_least_squares_follow_a_bent_valley_and_stay_inside():
    low, high = np.array([-2.0, -2.0]), np.array([2.0, 2.0])

    def banana(point):  # Rosenbrock's, least at (1, 1)
        assert (low <= point).all()
        assert (point <= high).all()
        return np.array([10 * (point[1] - point[0] ** 2), 1 - point[0]])

    start, steps = np.array([-1.2, 1.0]), np.array([0.01, 0.01])
    found = least_squares(banana, start, steps, low, high, rounds=60)
    np.testing.assert_allclose(found, [1.0, 1.0], atol=1e-2)
    at_bound = least_squares(lambda point: point - [9.0, 0.5], start, steps, low, high)
    np.testing.assert_allclose(at_bound, [2.0, 0.5], atol=1e-6)
    nowhere = least_squares(
        lambda point: point - 1.5 if point[0] < 1 else np.full(2, np.inf), start, steps, low, high
    )
    assert nowhere[0] < 1, "where there is no answer is no place to stay"


def test_the_real_servers(shared):
    """The run that was fitted, and one that was not: another model on two GPUs."""
    folder = shared / "vllm_runs"
    for run, workload, sets, bounds in (
        ("Llama-3.1-8B", "llama31", [], (0.05, 0.10)),
        ("Qwen3-32B", "qwen3", ["model=qwen3-32b", "tensor_parallel=2"], (0.10, 0.15)),
    ):
        path = f"workload.path={folder / f'workload_sharegpt300_{workload}_blksz16.jsonl'}"
        asked = experiment(SERVERS, path, *sets)
        servings = Servings(asked, folder / f"RTXPRO6000_{run}.requests.jsonl")
        measured, predicted = servings.measured.figures(), servings.predicted(asked).figures()
        for name, bound in (
            ("makespan s", bounds[0]), ("output tokens/s", bounds[0]), ("mean running", bounds[0]),
            ("TTFT mean s", bounds[1]),
        ):  # fmt: skip
            assert predicted[name] == pytest.approx(measured[name], rel=bound), (run, name)
