"""Documents: YAML with the place of everything in it, and values put over it by `--set` and by sweeps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any

from experiments.mistakes import Mistake, Mistakes, Path, Position, near_file, shown


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a document: a mapping or list of nodes, or a scalar; where it and its key stand."""

    value: Any
    at: Position
    key_at: Position

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def get(self, *path: str | int) -> Node | None:
        """The node at a path, None if there is none."""
        node = self
        for part in path:
            try:
                node = node.value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return node

    def position(self, path: Path, on_key: bool = False) -> Position:
        """Where the value (or the key) at a path stands, or else its nearest ancestor."""
        node: Node | None = self
        for depth in range(len(path), -1, -1):
            node = self.get(*path[:depth])
            if node is not None:
                return node.key_at if on_key or depth < len(path) else node.at
        return self.at

    def put(self, path: Path, node: Node) -> Node:
        """The same document with another node at a path; mappings on the way are made where they lack.

        A policy given by its kind alone becomes a mapping: `allocator: paged` can be given a block size.
        """
        if not path:
            return node
        head, rest = path[0], path[1:]
        if isinstance(self.value, list):
            items = list(self.value)
            index = int(head) if str(head).isdigit() else len(items)
            child = items[index] if index < len(items) else Node({}, node.at, node.key_at)
            items[index : index + 1] = [child.put(rest, node)]
            return replace(self, value=items)
        if isinstance(self.value, dict):
            children = self.value
        elif isinstance(self.value, str):
            children = {"kind": Node(self.value, self.at, self.key_at)}
        else:
            children = {}
        child = children.get(str(head)) or Node({}, node.at, node.key_at)
        at = self.at if isinstance(self.value, dict) else node.key_at
        return replace(self, value={**children, str(head): child.put(rest, node)}, at=at)

    def without(self, *keys: str) -> Node:
        """The same mapping without some keys."""
        return replace(self, value={key: node for key, node in self.value.items() if key not in keys})


def read(file: File) -> tuple[Node, list[Mistake]]:
    """The document in a file, and what is wrong with its form. Raises Mistakes if there is none."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Mistakes(
            [Mistake(f"not a text file, byte {error.start} is not UTF-8", at=Position(str(file)))]
        ) from None
    except OSError as error:
        raise Mistakes([_unreadable(file, error)]) from None
    root, mistakes = parse(text, Position(str(file), 1, 1))
    if not isinstance(root.value, dict):
        raise Mistakes([Mistake("wrong type", got=shown(root.plain()), expected="a mapping", at=root.at)])
    return root, mistakes


def parse(text: str, origin: Position) -> tuple[Node, list[Mistake]]:
    """The document in a text that starts at `origin`. Raises Mistakes at a syntax error."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor may be used twice
            composed = yaml.compose(text)
    except MarkedYAMLError as error:
        at = _moved(origin, error.problem_mark) if error.problem_mark else origin
        problem = " ".join(filter(None, (error.problem, error.context)))
        raise Mistakes([Mistake(f"YAML syntax error, {problem}", at=at)]) from None
    except YAMLError as error:
        raise Mistakes([Mistake(f"YAML syntax error, {str(error).splitlines()[0]}", at=origin)]) from None
    if composed is None:
        return Node(None, origin, origin), []
    reader = _Reader(yaml.constructor, origin)
    return reader.node(composed, origin, ()), reader.mistakes


def parse_set(argument: str, number: int) -> tuple[Path, Node]:
    """Path and value of the `--set` argument of this number. Raises Mistakes if it is not `path=value`."""
    start = Position("--set", number, 1)
    name, equals, text = argument.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise Mistakes(
            [Mistake("not a setting", got=shown(argument), expected="path=value as in a.b=3", at=start)]
        )
    path: Path = tuple(parts)
    if parts[0] == "sweep":  # below it stand dotted paths
        fixed = 2 if parts[1:2] == ["zip"] else 1
        path = (*parts[:fixed], ".".join(parts[fixed:])) if parts[fixed:] else tuple(parts)
    root, mistakes = parse(text, Position("--set", number, len(name) + 2))
    if mistakes:
        raise Mistakes(mistakes)
    return path, replace(root, key_at=start)


class _Reader:
    """Turns ruamel's nodes into ours and collects what is wrong with them."""

    def __init__(self, constructor: Any, origin: Position) -> None:
        self.constructor = constructor
        self.origin = origin
        self.mistakes: list[Mistake] = []

    def node(self, composed: Any, key_at: Position, path: Path, parents: tuple[int, ...] = ()) -> Node:
        at = _moved(self.origin, composed.start_mark)
        if id(composed) in parents:
            self.mistakes.append(Mistake("an alias that contains itself", path, at=key_at))
            return Node(None, at, key_at)
        parents = (*parents, id(composed))
        if composed.id == "mapping":
            return Node(self.mapping(composed, path, parents), at, key_at)
        if composed.id == "sequence":
            items = [
                self.node(item, at, (*path, index), parents) for index, item in enumerate(composed.value)
            ]
            return Node(items, at, key_at)
        return Node(self.scalar(composed, path, at), at, key_at)

    def mapping(self, composed: Any, path: Path, parents: tuple[int, ...]) -> dict[str, Node]:
        children: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in composed.value:
            key_at = _moved(self.origin, key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                for part in value.value if value.id == "sequence" else [value]:
                    found = self.node(part, key_at, path, parents).value
                    merged = {**found, **merged} if isinstance(found, dict) else merged
            elif key.id != "scalar":
                self.mistakes.append(Mistake("a key that is no name", path, at=key_at))
            elif key.value in children:
                first = children[key.value].key_at
                what = f"duplicate key, it already stands in line {first.line}"
                self.mistakes.append(Mistake(what, (*path, key.value), at=key_at))
            else:
                children[key.value] = self.node(value, key_at, (*path, key.value), parents)
        return {**merged, **children}

    def scalar(self, composed: Any, path: Path, at: Position) -> Any:
        from ruamel.yaml.error import YAMLError

        try:
            return self.constructor.construct_object(composed, deep=True)
        except (YAMLError, ValueError):
            what = f"a value that YAML tag {composed.tag!r} does not describe"
            self.mistakes.append(Mistake(what, path, got=shown(composed.value), at=at))
            return None


def _moved(origin: Position, mark: Any) -> Position:
    """ruamel counts from 0; the first line of a `--set` value starts behind its path."""
    column = mark.column + (origin.column if mark.line == 0 else 1)
    return Position(origin.file, origin.line + mark.line, column)


def _unreadable(file: File, error: OSError) -> Mistake:
    near = near_file(file) if isinstance(error, FileNotFoundError) else None
    reason = (error.strerror or str(error)).lower()
    return Mistake(f"cannot be read: {reason}", nearest=near, at=Position(str(file)))
