"""The stories about kernels, told by Triton's interpreter on the CPU."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attention.kernels.conftest import STORIES

pytest.importorskip("triton", reason="triton is not installed (pip install kvsim[triton])")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each story, side by side."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-rs", "--tb=short"]
    paths = {story: str(Path(__file__).with_name(story).relative_to(ROOT)) for story in STORIES}
    with contextlib.ExitStack() as stack:
        yield {
            story: stack.enter_context(
                subprocess.Popen(
                    [*command, path], cwd=ROOT, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )
            for story, path in paths.items()
        }  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_interpreted(told, story):
    report, _ = told[story].communicate()
    assert told[story].returncode == 0, report
    assert re.search(r"\d+ passed", report), report
    assert "skipped" not in report, report
