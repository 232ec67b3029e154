"""Settings that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"  # torch keeps to one thread, wherever and whenever a test imports it

settings.register_profile(
    "kvsim",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kvsim")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared traces and recordings; tests that need it skip where it is absent."""
    path = Path(os.environ.get("KVSIM_SHARED", Path(__file__).parent.parent.parent / "shared"))
    if not (path / "traces").is_dir():
        pytest.skip(f"no shared traces at {path} (set KVSIM_SHARED)")
    return path
