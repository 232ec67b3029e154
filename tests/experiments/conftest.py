"""An experiment small enough for tests, and the command line as a user meets it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments import listing
from experiments.cli import run_command

SMALL = """\
name: small
model: opt-13b
device: a100-40gb
kv_memory: 2 GiB
workload:
  num_requests: 60
  arrivals: {kind: poisson, rate: 4.0}
  lengths: {kind: fixed, prompt: 100, output: 20}
allocator: {kind: paged, block_size: 16}
scheduler: {kind: vllm_v0}
timing: {kind: fixed, prefill_ms: 20, decode_ms: 10}
"""


class Said(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines on standard error."""
        return self.err.splitlines()


Kvsim = Callable[..., Said]
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_policies() -> Iterator[None]:
    """Forget the policies that a test's plug-ins register."""
    registries = [*listing.registries().values()]
    kept = [(dict(registry._entries), dict(registry._aliases)) for registry in registries]
    yield
    for registry, (entries, aliases) in zip(registries, kept, strict=True):
        registry._entries, registry._aliases = entries, aliases
    for name in [name for name in sys.modules if name.startswith("kvsim_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def kvsim(capsys: pytest.CaptureFixture[str]) -> Kvsim:
    """Run a command in this process."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        try:
            code = run_command([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into the current folder, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)

    def to(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    to("small.yaml", SMALL)
    return to
