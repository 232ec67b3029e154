"""Identity: what makes a run the same run, as hashes of its settings, its input files and the code."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SIMULATING = (
    "sim/**/*.py", "workloads/**/*.py", "attention/**/*.py", "experiments/build.py",
    "experiments/hardware.py", "experiments/recording.py", "experiments/tables/*.csv",
)  # fmt: skip
"""The code that figures come from; commands and plots may change without a new run."""


@cache
def version() -> str:
    """The version of the package."""
    import tomllib

    try:
        return metadata.version("kvsim")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        with (ROOT / "pyproject.toml").open("rb") as file:
            return str(tomllib.load(file)["project"]["version"])


@cache
def code_version() -> str:
    """The version, with a hash of the simulating code."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in _SIMULATING for path in ROOT.glob(pattern)):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(file.read_bytes())
    return f"{version()}+{digest.hexdigest()[:12]}"


def content_hash(path: str) -> str:
    """Hash of a file, or of all files in a folder with their names."""
    digest = hashlib.sha256()
    top = Path(path)
    for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
        if file.is_file():
            digest.update(b"" if file == top else file.relative_to(top).as_posix().encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def run_id(settings: dict[str, Any], replication: int, contents: dict[str, str], plugins: list[str]) -> str:
    """Name of a run's folder.

    Of the files that settings name, by dotted path in `contents`, and of `plugins`, the hash of what is in
    them counts and not where they lie.
    """
    flat = _without_places(settings, contents)
    # numpy does not promise that its random streams stay the same from version to version.
    counted = [flat, replication, sorted(plugins), code_version(), metadata.version("numpy")]
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def _without_places(value: Any, contents: dict[str, str], path: str = "") -> Any:
    prefix = f"{path}." if path else ""
    if isinstance(value, dict):
        return {key: _without_places(inner, contents, f"{prefix}{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner, contents, f"{prefix}{index}") for index, inner in enumerate(value)]
    return contents.get(path, value)
