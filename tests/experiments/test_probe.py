"""The probe of a run from the command line: on by default, told in the summary, not counted in its time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.experiments.conftest import SMALL, Kvsim, Write

BROKEN = """
from sim import allocator
from sim.allocators import PagedAllocator


@allocator("forgetful")
class Forgetful(PagedAllocator):
    \"\"\"Paged memory that loses the order of its blocks.\"\"\"

    def grow(self, batches):
        books = super().grow(batches)
        for _, sequences in batches:
            for sequence in sequences:
                sequence.block_table.reverse()
        return books
"""


def stored(file: str) -> dict:
    (found,) = Path("results/small").glob(f"*/{file}.json")
    return json.loads(found.read_text())


def test_a_run_is_probed_by_default(kvsim: Kvsim, write: Write) -> None:
    write("small.yaml", SMALL)
    said = kvsim("run", "small.yaml", "--no-plots")
    assert said.code == 0, said.err
    summary, manifest = stored("summary"), stored("manifest")
    assert 8 <= summary["probe_steps"] <= 80
    assert 0 < summary["probe_max_error"] < 1e-5
    assert manifest["probe_cpu_s"] > 0
    assert summary["cpu_s"] > 0


def test_the_probe_changes_no_figure(kvsim: Kvsim, write: Write) -> None:
    write("small.yaml", SMALL)
    own = ("run_id", "wall_s", "cpu_s", "probe_steps", "probe_max_error")
    figures = []
    for number, arguments in enumerate((["--no-probe"], ["--set", "probe.every=3"], ["--set", "probe=true"])):
        folder = Path(f"out{number}")
        said = kvsim("run", "small.yaml", "--no-plots", "--out", folder, *arguments)
        assert said.code == 0, said.err
        (file,) = folder.glob("small/*/summary.json")
        figures.append(json.loads(file.read_text()))
    assert [summary["probe_steps"] > 0 for summary in figures] == [False, True, True]
    assert figures[0]["probe_max_error"] is None
    first, *others = [
        {name: value for name, value in summary.items() if name not in own} for summary in figures
    ]
    assert others == [first, first]


def test_a_point_with_wrong_tables_fails(kvsim: Kvsim, write: Write) -> None:
    write("forgetful.py", BROKEN)
    text = SMALL.replace("kind: paged", "kind: forgetful").replace("output: 20", "output: 60")
    write("small.yaml", text + "plugins: [forgetful.py]\n")
    said = kvsim("run", "small.yaml", "--no-plots", "--set", "probe.every=1")
    assert said.code == 1
    assert "failed: the run: step " in said.err
    assert "sequence 0.0, token 112, device slot " in said.err
    assert kvsim("run", "small.yaml", "--no-plots", "--no-probe").code == 0


def test_a_failure_can_be_looked_into_and_run_again(kvsim: Kvsim, write: Write) -> None:
    write("forgetful.py", BROKEN)
    text = SMALL.replace("kind: paged", "kind: forgetful").replace("output: 20", "output: 60")
    write("small.yaml", text + "plugins: [forgetful.py]\nsweep: {seed: [3]}\n")
    said = kvsim("run", "small.yaml", "--no-plots", "--set", "probe.every=2")
    (place,) = Path("results/small").glob("*.failed")
    assert f"to look into it: {place}" in said.err

    told = json.loads((place / "failure.json").read_text())
    assert told["message"] in said.err
    assert told["message"].startswith(told["when"])
    arrays = np.load(place / "ledger.npz")
    first = told["sequences"][0]
    wanted = arrays[first["sequence"]]
    assert len(wanted) == first["num_tokens"]
    blocks = arrays["device slots"].reshape(-1, 16)[first["block_table"]]
    assert not np.array_equal(blocks.ravel()[: len(wanted)], wanted), "what is wrong shows in the arrays"
    assert {*blocks.ravel()} - {-1} <= {*wanted}, "it is the order of the blocks"

    again = kvsim("run", place / "replay.yaml", "--no-plots", "--out", "again")
    assert again.code == 1
    assert told["message"] in again.err


def test_a_device_that_is_not_there_is_the_users_mistake(kvsim: Kvsim, write: Write) -> None:
    write("small.yaml", SMALL)
    said = kvsim("run", "small.yaml", "--no-plots", "--set", "probe.device=cuda:99")
    assert said.code == 2
    assert "probe.device: got 'cuda:99', expected auto or a device of torch" in said.err


def test_sampled_steps_correct_a_profile(kvsim: Kvsim, write: Write) -> None:
    model = (
        "{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, head_dim: 16, num_params: 1e8, "
        "max_model_len: 400}"
    )
    text = SMALL.replace("model: opt-13b", f"model: {model}").replace("kv_memory: 2 GiB", "num_blocks: 400")
    text = text.replace("device: a100-40gb\n", "")
    text = text[: text.index("timing:")] + "timing: {kind: calibrated, profile: cpu-xeon}\n"
    write("small.yaml", text)
    said = kvsim("run", "small.yaml", "--no-plots", "--set", "probe={every: 10, calibrate: true}")
    assert said.code == 0, said.err
    summary, manifest = stored("summary"), stored("manifest")
    assert manifest["reproducible"] is False
    assert summary["calibrated_steps"] >= 10
    assert summary["attention_error_before_median"] > 0
    assert summary["attention_error_after_median"] > 0
    assert f"attention on {summary['calibrated_steps']} steps: by the profile " in said.out

    said = kvsim("check", "small.yaml", "--set", "probe.calibrate=true", "--set", "model=null",
                 "--set", "timing={kind: fixed}")  # fmt: skip
    assert said.code == 2
    assert "probe: calibrate needs a model" in said.err
