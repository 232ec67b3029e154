"""Axes: what a sweep varies, and the points that follow from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from experiments.document import Node
from experiments.mistakes import Mistake, Path, shown

WHOLE = ("name", "replications", "sweep", "plugins")
"""Sections that belong to the experiment as a whole and not to a point."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A dotted path and the values that it takes."""

    path: Path
    values: Sequence[Node]

    @property
    def name(self) -> str:
        """The dotted path."""
        return ".".join(map(str, self.path))


def read_axes(sweep: Node | None) -> tuple[list[list[Axis]], list[Mistake]]:
    """Groups of axes that vary together, in the order written, and what is wrong with them."""
    if sweep is None or sweep.value is None:
        return [], []
    if not isinstance(sweep.value, dict):
        return [], [
            Mistake(
                "wrong type", ("sweep",), shown(sweep.plain()), "a mapping of paths to values", at=sweep.at
            )
        ]
    groups: list[list[Axis]] = []
    mistakes: list[Mistake] = []
    for name, node in sweep.value.items():
        if node.value is None:  # not swept: how --set takes an axis away
            continue
        if name != "zip":
            axis, wrong = _axis(("sweep",), name, node)
            groups += [[axis]] if axis else []
        elif isinstance(node.value, dict):
            read = [_axis(("sweep", "zip"), inner, child) for inner, child in node.value.items()]
            group, wrong = (
                [axis for axis, _ in read if axis],
                [mistake for _, found in read for mistake in found],
            )
            groups += [group] if group else []
            wrong += _unequal(group, node)
        else:
            wrong = [
                Mistake(
                    "wrong type",
                    ("sweep", "zip"),
                    shown(node.plain()),
                    "a mapping of paths to values",
                    at=node.at,
                )
            ]
        mistakes += wrong
    return groups, mistakes + _repeated(groups)


def _axis(parents: Path, name: str, node: Node) -> tuple[Axis | None, list[Mistake]]:
    path = (*parents, name)
    if not isinstance(node.value, list) or not node.value:
        return None, [
            Mistake("no values", path, shown(node.plain()), "a list of at least one value", at=node.at)
        ]
    parts = tuple(name.split("."))
    if not all(parts) or parts[0] in WHOLE:
        what = "not a path" if not all(parts) else f"{parts[0]} cannot be swept"
        return None, [Mistake(what, path, at=node.key_at)]
    # A mistake about the path points at the axis, one about a value at the value.
    return Axis(parts, [Node(item.value, item.at, node.key_at) for item in node.value]), []


def _unequal(group: list[Axis], node: Node) -> list[Mistake]:
    lengths = {axis.name: len(axis.values) for axis in group}
    if len(set(lengths.values())) < 2:
        return []
    got = ", ".join(f"{length} for {name}" for name, length in lengths.items())
    return [
        Mistake("axes of different lengths", ("sweep", "zip"), got, "as many values for each", at=node.key_at)
    ]


def _repeated(groups: list[list[Axis]]) -> list[Mistake]:
    seen: set[Path] = set()
    mistakes = []
    for axis in itertools.chain.from_iterable(groups):
        if axis.path in seen:
            at = axis.values[0].key_at
            mistakes.append(Mistake("swept twice, under zip and beside it", ("sweep", axis.name), at=at))
        seen.add(axis.path)
    return mistakes


def points(groups: list[list[Axis]]) -> Iterator[dict[Path, Node]]:
    """What each point puts where; the last group varies fastest, a path stands after its parents."""
    rows = []
    for group in groups:
        longest = max(len(axis.values) for axis in group)
        rows.append(
            [{axis.path: axis.values[index % len(axis.values)] for axis in group} for index in range(longest)]
        )
    for combination in itertools.product(*rows):
        merged = {path: node for row in combination for path, node in row.items()}
        yield dict(sorted(merged.items(), key=lambda item: len(item[0])))


def without(groups: list[list[Axis]], paths: Iterable[Path]) -> list[list[Axis]]:
    """The groups without the axes at or below some paths."""
    fixed = list(paths)
    kept = [[axis for axis in group if not any(axis.path[: len(f)] == f for f in fixed)] for group in groups]
    return [group for group in kept if group]
