"""Plug-ins: Python files and installed packages whose import registers policies."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from experiments.mistakes import near_file
from sim.errors import UserError

GROUP = "kvsim.policies"


def load_all(files: Iterable[Path]) -> None:
    """Import installed plug-ins and these files. Raises UserError at the first that fails."""
    load_installed()
    for file in files:
        try:
            load_file(file)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error


@cache
def load_installed() -> None:
    """Import every entry point of the group `kvsim.policies`. Raises UserError if one fails."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise UserError(f"plug-in {entry.name!r} ({entry.value}): {_told(error)}") from error


def load_file(file: Path) -> None:
    """Import a plug-in once. Raises UserError with the line that failed."""
    if not file.is_file():
        near = near_file(file)
        raise UserError("no such file" + (f", did you mean {near!r}?" if near else ""))
    file = file.resolve()
    name = f"kvsim_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(_told(error, str(file))) from error


def _told(error: BaseException, file: str = "") -> str:
    """The error in one line, with the line of the plug-in that it came from."""
    where = ""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"raises SyntaxError: {error.msg} (line {error.lineno})"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            where = f" (line {frame.lineno})"
    if isinstance(error, ModuleNotFoundError) and Path(file).with_name(f"{error.name}.py").is_file():
        where += "; a plug-in is one file, as runs are told apart by what it says: put both into one, or install both"
    return f"raises {type(error).__name__}: {' '.join(str(error).split())}{where}"
