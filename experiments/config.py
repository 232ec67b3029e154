"""Configurations: an experiment's YAML, with `--set` over it, as the points that it describes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as File
from typing import Any

from experiments import axes, document, plugins
from experiments.document import Node
from experiments.experiment import Experiment
from experiments.forms import FilePath, Form, has, members, walk
from experiments.mistakes import Mistake, Mistakes, Path, Position, dotted, near_file, shown
from experiments.rehearsal import Rehearsal, at
from experiments.results import flow
from experiments.schema import Schema
from experiments.sections import Section
from sim.errors import UserError
from sim.registry import nearest

NAME = re.compile(r"\w[\w.+-]*")
MEMORY = {
    (name,)
    for name in (
        "model", "device", "tensor_parallel", "num_blocks", "kv_memory", "memory_utilization", "kv_cache_dtype",
        "max_model_len",
    )
}  # fmt: skip
"""Sections without which nothing can be said of the fit."""
_ABSENT = "no such file or folder"


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of everything, with every default filled in.

    `written` is the same without the defaults, which is an experiment by itself; `swept` holds what the sweep
    varies as it was written, `files` the paths of files that the point reads.
    """

    settings: dict[str, Any]
    written: dict[str, Any]
    swept: dict[str, Any]
    files: dict[Path, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run of an experiment does."""

    name: str
    purpose: str  # the comment at the top of the file
    replications: int
    plugins: list[str]
    swept: list[str]
    points: list[Point]


def experiment_schema() -> Schema:
    """The schema of an experiment over the policies registered by now."""
    return Schema(Section(Experiment))


def _purpose(file: File) -> str:
    """What an experiment says of itself: the comment in its first line."""
    try:
        with file.open(encoding="utf-8") as stream:
            first = stream.readline()
    except (OSError, UnicodeDecodeError):  # reported by whoever reads the rest
        return ""
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def load(file: File, sets: Sequence[str] = (), *, probe: bool = True) -> Plan:
    """Read and check an experiment. Raises Mistakes with everything that is wrong with it."""
    root, mistakes = document.read(file)
    return planned(file, root, mistakes, [*sets, *([] if probe else ["probe=false"])])


def planned(
    file: File, root: Node, mistakes: list[Mistake], sets: Sequence[str], schema: Schema | None = None
) -> Plan:
    """The same for a document that is read; `schema` where many are that load no plug-ins."""
    overrides: list[tuple[Path, Node]] = []
    for number, argument in enumerate(sets, 1):
        try:
            overrides.append(document.parse_set(argument, number))
        except Mistakes as error:
            mistakes += error.mistakes
    for path, node in overrides:
        root = root.put(path, node)
    reading = _Reading(file, root, overrides, mistakes, schema)
    plan = reading.plan()
    if reading.mistakes:
        raise Mistakes(reading.mistakes)
    return plan


class _Reading:
    """The way from a document to a plan, with the mistakes found on it."""

    def __init__(
        self,
        file: File,
        root: Node,
        overrides: list[tuple[Path, Node]],
        mistakes: list[Mistake],
        schema: Schema | None,
    ) -> None:
        self.schema = schema
        self.file = file
        self.root = root
        self.overrides = [(path, node) for path, node in overrides if path[0] != "sweep"]
        self.mistakes = mistakes
        self.rehearsal = Rehearsal()

    def plan(self) -> Plan:
        loaded = self._load_plugins()
        schema = self.schema or experiment_schema()
        groups, wrong = axes.read_axes(self.root.get("sweep"))
        self._note(wrong, self.root)
        malformed = {mistake.path[-1] for mistake in wrong}

        def follows(mistake: Mistake) -> bool:
            """True if a mistake may be nothing but the consequence of one that is noted already."""
            if mistake.what == "unknown kind":  # it may be a plug-in's
                return loaded is None and mistake.path[0] not in ("model", "device")
            return mistake.what == "missing" and mistake.path[0] in malformed

        # What --set says holds at every point: an axis at or below such a path is not swept any more.
        groups = axes.without(groups, [path for path, _ in self.overrides])
        swept = [axis.name for group in groups for axis in group]
        points = []
        told: list[dict[Path, str]] = []  # what each point puts where
        arising: dict[Mistake, list[int]] = {}  # at what points
        for number, values in enumerate(axes.points(groups)):
            told.append({path: flow(node.plain()) for path, node in values.items()})
            here = self.root.without("sweep")
            for path, node in [*values.items(), *self.overrides]:
                here = here.put(path, node)
            data = here.plain()
            settings, files, wrong = self._point(schema, here, data)
            for mistake in wrong:
                if not follows(mistake):
                    arising.setdefault(_placed(mistake, here), []).append(number)
            if settings is not None:
                written = {dotted(path): node.plain() for path, node in values.items()}
                points.append(Point(settings, data, {name: written[name] for name in swept}, files))
        self.mistakes += [
            replace(mistake, where=_where(mistake.path, told, numbers))
            for mistake, numbers in arising.items()
        ]
        name = self._name(points)
        return Plan(
            name,
            _purpose(self.file),
            points[0].settings["replications"] if points else 1,
            loaded or [],
            swept,
            points,
        )

    def _name(self, points: list[Point]) -> str:
        node = self.root.get("name")
        written = node.value if node is not None and isinstance(node.value, str) else None
        name = (points[0].settings["name"] if points else written) or self.file.stem
        if not NAME.fullmatch(name):
            wanted = "letters, digits, and . + - _ inside, as it names a folder"
            self._note([Mistake("not a name", ("name",), shown(name), wanted)], self.root)
        return str(name)

    def _load_plugins(self) -> list[str] | None:
        """Paths of the plug-ins, all loaded, or None if one of them fails."""
        node = self.root.get("plugins")
        listed = node.value if node is not None and isinstance(node.value, list) else []
        loaded: list[str] | None = []
        for index, item in enumerate(listed):
            if not isinstance(item.value, str):
                continue  # the schema says so
            try:
                found = self._located(item.value, item.at)
                plugins.load_file(found)
                loaded = None if loaded is None else [*loaded, str(found)]
            except UserError as error:
                near = near_file(self.file.parent / item.value) if str(error) == _ABSENT else None
                wrong = Mistake(str(error), ("plugins", index), got=shown(item.value), nearest=near)
                self._note([wrong], self.root)
                loaded = None
        plugins.load_installed()
        return loaded

    def _located(self, text: str, at: Position) -> File:
        """The file that a path means: beside the YAML that names it, else in the current folder."""
        bases = [File()] if at.file == "--set" else [self.file.parent, File()]
        found = next((found for base in bases if (found := (base / text)).exists()), None)
        if found is None:
            raise UserError(_ABSENT)
        if not os.access(found, os.R_OK):
            raise UserError("cannot be read: permission denied")
        return found.resolve()

    def _point(
        self, schema: Schema, here: Node, data: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, dict[Path, str], list[Mistake]]:
        """Settings of a point, None if it has mistakes; the files that it reads; the mistakes.

        `data` is what is written in `here`; relative paths in it become absolute.
        """
        files: dict[Path, str] = {}
        mistakes: list[Mistake] = []
        for path, form, value in walk(schema.form, data):
            if path[:1] != ("plugins",) and isinstance(value, str) and has(form, FilePath):
                try:
                    files[path] = str(_shipped(form, value) or self._located(value, here.position(path)))
                except UserError as error:
                    expected, guess = (
                        (form.expected, nearest(value, [*form.words])) if form.words else ("", None)
                    )
                    if guess is None and str(error) == _ABSENT:
                        guess = near_file(self.file.parent / value)
                    mistakes.append(Mistake(str(error), path, shown(value), expected, guess))
        for path, absolute in files.items():
            _place(data, path, absolute)
        settings, wrong = schema.resolve(data)
        mistakes += wrong
        heard = settings if not wrong else _rest(schema, data, wrong)
        if heard is not None:
            mistakes += self.rehearsal.mistakes(
                heard, here, partial(_default, schema, data), [mistake.path for mistake in mistakes]
            )
        return (settings if not mistakes else None), files, mistakes

    def _note(self, mistakes: list[Mistake], here: Node) -> None:
        self.mistakes += [_placed(mistake, here) for mistake in mistakes]


def _placed(mistake: Mistake, here: Node) -> Mistake:
    return mistake.placed(here.position(mistake.path, mistake.on_key))


def _where(path: Path, points: list[dict[Path, str]], numbers: list[int]) -> str:
    """What points at which a mistake arises have in common that others have not, unless the mistake stands in it."""
    common = []
    for axis, value in points[numbers[0]].items():
        related = axis == path[: len(axis)] or path == axis[: len(path)]
        alike = all(points[number][axis] == value for number in numbers)
        if not related and alike and any(point[axis] != value for point in points):
            common.append(f"{dotted(axis)}={value}")
    return ", ".join(common)


def _shipped(form: Form, name: str) -> File | None:
    """The file that ships under a name, where a form knows such names."""
    found = (member.shipped.get(name) for member in members(form) if isinstance(member, FilePath))
    return next((file for file in found if file is not None), None)


def _rest(schema: Schema, data: Any, mistakes: list[Mistake]) -> dict[str, Any] | None:
    """Settings without what is wrong in them, for the rehearsal of the rest; None if that says nothing."""
    if any(mistake.path[:1] in MEMORY or mistake.what == "missing" for mistake in mistakes):
        return None
    for mistake in mistakes:
        _place(data, mistake.path)
    settings, wrong = schema.resolve(data)
    return None if wrong else settings


def _default(schema: Schema, data: Any, path: Path) -> Any:
    """What the settings have at a path where nothing is written there; None if they are wrong without."""
    bare = deepcopy(data)
    _place(bare, path)
    settings, wrong = schema.resolve(bare)
    return None if wrong else at(settings, path)


def _place(data: Any, path: Path, *value: Any) -> None:
    """Put a value at a path, or take away what is there."""
    for part in path[:-1]:
        data = data[part]
    if value:
        (data[path[-1]],) = value
    elif isinstance(data, dict):
        data.pop(path[-1], None)
