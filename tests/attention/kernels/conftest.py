"""Where kernels run: compiled on a GPU, or interpreted in a process of its own, since a module is one or the other.

Stories about kernels (`STORIES`) are collected where there is one of the two: on a GPU they run compiled.
`test_interpreter.py` runs them in processes with TRITON_INTERPRET=1 wherever Triton is installed.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

STORIES = ["test_decode.py", "test_prefill.py", "test_moves.py"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = importlib.util.find_spec("triton") is not None

collect_ignore: list[str] = []
if INTERPRETED:
    collect_ignore += ["test_interpreter.py", "test_compile.py"]
if not TRITON or not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore += STORIES


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run in this process."""
    return torch.device("cpu" if INTERPRETED else "cuda")
