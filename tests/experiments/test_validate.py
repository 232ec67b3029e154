"""`kvsim validate`: the table, and the exit code."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attention.functional import paged_attention
from attention.validation import validate as validation
from experiments.validate import run_validate
from sim.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few problems, without Triton's interpreter, in one type."""
    validate, implementations = validation.validate, validation.implementations
    monkeypatch.setattr(validation, "validate", partial(validate, small=True))
    monkeypatch.setattr(validation, "DTYPES", (torch.float32,))
    monkeypatch.setattr(
        validation, "implementations",
        lambda device: {name: attend for name, attend in implementations(device).items() if name != "triton"},
    )  # fmt: skip


def test_all_is_well(capsys):
    assert run_validate("cpu") == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "paged attention on cpu against plain attention in float64: reference, torch"
    assert lines[2].split() == [
        "property",
        "implementation",
        "type",
        "cases",
        "worst",
        "error",
        "bound",
        "share",
        "ok",
    ]
    assert lines[-1].endswith("comparisons, all within their bounds")
    table = lines[3:-2]
    assert len(table) == len(set(table)) > 30
    assert all(line.endswith("  ok") for line in table)
    assert any(line.startswith("after copy-on-write  ") for line in table)


def test_an_implementation_that_is_wrong_exits_with_1(monkeypatch, capsys):
    def broken(**arguments):
        return paged_attention(**{**arguments, "sliding_window": None}, impl="torch")

    monkeypatch.setattr(validation, "implementations", lambda _: {"broken": broken})
    assert run_validate("cpu") == 1
    lines = capsys.readouterr().out.splitlines()
    over = [line for line in lines if line.endswith("  OVER")]
    assert [line.partition("  ")[0] for line in over] == ["sliding window", "log-sum-exp"]
    assert "over their bounds: sliding window (broken, float32); log-sum-exp (broken, float32)" in lines[-1]


@pytest.mark.parametrize("device", ["cuda:99", "teapot", "meta"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UserError, match=f"device: got '{device}', expected auto, cpu"):
        run_validate(device)
    assert torch.get_num_threads() == 1


def test_threads_are_left_as_they_were(monkeypatch):
    monkeypatch.setattr(validation, "validate", lambda *_, **__: [])
    torch.set_num_threads(2)
    try:
        assert run_validate("cpu") == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
