"""One thread for torch, and the devices that there are."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
