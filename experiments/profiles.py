"""Profiles: sections of an experiment that stand in a YAML file of their own, shipped ones found by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path as File
from typing import Any

from experiments.mistakes import Mistakes


def shipped(folder: str) -> dict[str, File]:
    """The shipped files of a folder under `tables/` by the name that users give."""
    found = File(str(files("experiments"))) / "tables" / folder
    return {file.stem: file for file in sorted(found.glob("*.yaml"))}


def read(file: File, section: type[Any]) -> Any:
    """The section that a file holds. Raises Mistakes with everything that is wrong in it, and where."""
    from experiments import build, document
    from experiments.schema import Schema
    from experiments.sections import Section

    root, mistakes = document.read(file)
    settings, wrong = Schema(Section(section)).resolve(root.plain())
    try:
        if mistakes or wrong:
            raise Mistakes([*mistakes, *wrong])
        return build.construct(section, settings, ())
    except Mistakes as error:
        raise Mistakes(
            [mistake.placed(root.position(mistake.path, mistake.on_key)) for mistake in error.mistakes]
        ) from None
