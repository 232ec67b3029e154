"""Plug-ins: a policy of the user's own by file, and what is said of one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.conftest import SMALL, Kvsim, Write

OWN = '''\
from typing import Annotated, Literal

from sim import Bounds, Registry, StepTime, timing

shape: Registry[type] = Registry("shape")


@shape("flat")
class Flat:
    """The same for all."""

    def __init__(self, *, ms: Annotated[float, Bounds(gt=0)] = 10.0) -> None:
        self.ms = ms


class Rounding:
    """How times are rounded.

    Fields:
        digits: Digits kept.
    """

    def __init__(self, *, digits: int = 3) -> None:
        self.digits = digits


@timing("own")
class Own(StepTime):
    """A timing model of the user's own.

    Fields:
        shape: How time depends on the batch.
        mode: A word.
        rounding: How times are rounded.
    """

    def __init__(
        self,
        model,
        device,
        *,
        shape: Annotated[Flat, shape] = Flat(),
        mode: Literal["a", "b"] | None = None,
        rounding: Rounding = Rounding(),
        steps: tuple[int, ...] = (1, 2),
    ) -> None:
        assert isinstance(shape, Flat) and isinstance(rounding, Rounding)
        self.step_s = round(shape.ms / 1e3, rounding.digits)

    def seconds(self, step) -> float:
        return self.step_s

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        return self.step_s
'''
TIMED = SMALL.replace("{kind: fixed, prefill_ms: 20, decode_ms: 10}", "{kind: own}") + "plugins: [own.py]\n"


def test_a_plugin_beside_the_yaml_brings_a_policy(write: Write, kvsim: Kvsim) -> None:
    write("there/own.py", OWN)
    write("there/x.yaml", TIMED)
    told = kvsim("run", "there/x.yaml", "--no-plots", "--set", "timing.shape={kind: flat, ms: 20}")
    assert (told.code, told.err) == (0, "")
    said = kvsim("check", "there/x.yaml", "--set", "timing.shape.ms=0", "--set", "timing.mode=c",
                 "--set", "timing.rounding.digit=1", "--set", "timing.steps=[1, x]")  # fmt: skip
    assert said.lines == [
        "--set:1:17: timing.shape.ms: out of bounds, got 0, expected a number > 0",
        "--set:2:13: timing.mode: not allowed, got 'c', expected one of a, b or null",
        "--set:3:1: timing.rounding.digit: unknown key, expected one of digits, did you mean 'digits'?",
        "--set:4:18: timing.steps.1: wrong type, got 'x', expected an integer",
    ]
    assert "timing.shape" not in kvsim("list", "own").out
    assert "rounding.digits" in kvsim("list", "own").out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ny = x / 0\n", "raises ZeroDivisionError: division by zero (line 2)"),
        ("import nowhere\n", "raises ModuleNotFoundError: No module named 'nowhere' (line 1)"),
        ("def f(:\n", "raises SyntaxError: invalid syntax (line 1)"),
        ("raise SystemExit(3)\n", "raises SystemExit: 3 (line 1)"),
        (
            "from sim import allocator\n@allocator('paged')\nclass Mine: ...\n",
            "raises ValueError: allocator 'paged' is already registered by "
            "sim.allocators.paged.PagedAllocator (line 2)",
        ),
    ],
)
def test_a_plugin_that_raises(text: str, told: str, write: Write, kvsim: Kvsim) -> None:
    write("broken.py", text)
    write("x.yaml", SMALL + "plugins: [broken.py]\n")
    said = kvsim("check", "x.yaml")
    assert (said.code, said.lines) == (2, [f"x.yaml:12:11: plugins.0: {told}, got 'broken.py'"])


def test_a_plugin_that_is_missing_is_not_told_twice(write: Write, kvsim: Kvsim) -> None:
    write("x.yaml", TIMED.replace("{kind: own}", "{kind: theirs}").replace("opt-13b", "opt-13"))
    said = kvsim("check", "x.yaml")
    assert [line.split(",")[0] for line in said.lines] == [
        "x.yaml:2:8: model: unknown kind",
        "x.yaml:12:11: plugins.0: no such file or folder",
    ]


def test_a_policy_that_refuses_to_be_built(write: Write, kvsim: Kvsim) -> None:
    write("own.py", OWN.replace("self.step_s =", "raise OSError('no such wheel')\n        self.step_s ="))
    write("x.yaml", TIMED)
    said = kvsim("check", "x.yaml")
    assert said.lines == ["x.yaml:11:9: timing: Own raises OSError: no such wheel"]


def test_a_signature_that_no_yaml_fits(write: Write, kvsim: Kvsim) -> None:
    write(
        "odd.py",
        "from sim import timing\n@timing('odd')\nclass Odd:\n    def __init__(self, *, f: set[int]): ...\n",
    )
    said = kvsim("check", write("x.yaml", SMALL + "plugins: [odd.py]\n"))
    assert said.code == 2
    place = f"{Path('odd.py').resolve()}:2: Odd: field f"
    assert said.lines == [f"{place}: no YAML value fits the annotation set[int]"]


def test_a_plugin_that_raises_while_it_runs_is_named_with_its_line(write: Write, kvsim: Kvsim) -> None:
    broken = OWN.replace("        return self.step_s\n\n", '        raise KeyError("oops")\n\n', 1)
    file = write("own.py", broken)
    write("x.yaml", TIMED)
    told = kvsim("run", "x.yaml", "--no-plots")
    line = broken.splitlines().index('        raise KeyError("oops")') + 1
    assert told.code == 2
    assert f"{file.resolve()}:{line}: seconds raises KeyError: 'oops'" in told.err


def test_lists_and_the_schema_tell_of_a_policy_of_ones_own(write: Write, kvsim: Kvsim) -> None:
    assert "unknown kind, got 'own'" in kvsim("list", "own").err
    file = write("own.py", OWN)
    assert "A timing model of the user's own." in kvsim("list", "timing", "--plugin", file).out
    assert '"own"' in kvsim("schema", "--plugin", file).out
    said = kvsim("list", "--plugin", write("broken.py", "import nowhere\n"))
    assert (said.code, said.lines) == (
        2, ["broken.py: raises ModuleNotFoundError: No module named 'nowhere' (line 1)"]
    )  # fmt: skip
    for command in ("list", "schema"):
        said = kvsim(command, "--plugin", "brokn.py")
        assert (said.code, said.lines) == (2, ["brokn.py: no such file, did you mean 'broken.py'?"])


def test_a_plugin_is_one_file(write: Write, kvsim: Kvsim) -> None:
    write("there/shapes_of_mine.py", "MS = 10.0\n")
    write("there/own.py", f"import shapes_of_mine\n{OWN}")
    said = kvsim("check", write("there/x.yaml", TIMED))
    assert "No module named 'shapes_of_mine' (line 1); a plug-in is one file" in said.err


def test_a_kind_alone_that_lacks_a_field_is_told_what_it_lacks(write: Write, kvsim: Kvsim) -> None:
    said = kvsim("check", write("x.yaml", SMALL), "--set", "device=custom")
    assert "--set:1:1: device.tflops: missing, expected a number > 0" in said.lines
