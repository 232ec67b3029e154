"""Profiles: sections of an experiment that stand in a YAML file of their own, shipped ones found by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path as File


def shipped(folder: str) -> dict[str, File]:
    """The shipped files of a folder under `tables/` by the name that users give."""
    found = File(str(files("experiments"))) / "tables" / folder
    return {file.stem: file for file in sorted(found.glob("*.yaml"))}
