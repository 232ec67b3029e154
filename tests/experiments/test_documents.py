"""Documents: where everything stands, and what may be put over it."""

from __future__ import annotations

import pytest

from experiments.document import Node, parse, parse_set
from experiments.mistakes import Mistakes, Position

START = Position("x.yaml", 1, 1)


def read(text: str) -> Node:
    node, mistakes = parse(text, START)
    assert not mistakes
    return node


def test_every_value_and_key_knows_its_place() -> None:
    node = read("a: 1\nb:\n  - {c: x}\n  - d\n")
    assert node.plain() == {"a": 1, "b": [{"c": "x"}, "d"]}
    assert str(node.position(("b", 0, "c"))) == "x.yaml:3:9"
    assert str(node.position(("b", 0, "c"), on_key=True)) == "x.yaml:3:6"
    assert str(node.position(("b", 1))) == "x.yaml:4:5"


def test_what_is_absent_is_looked_for_at_its_nearest_ancestor() -> None:
    node = read("a:\n  b: 1\n")
    assert str(node.position(("a", "z", "y"))) == "x.yaml:1:1"
    assert str(node.position(("z",))) == "x.yaml:1:1"


def test_scalars_are_those_of_yaml_1_2() -> None:
    node = read("[1e-5, 0o17, 1_000, yes, on, 010, 12:30, ~, .5, 12 GiB]")
    assert node.plain() == [1e-5, 15, 1000, "yes", "on", 10, "12:30", None, 0.5, "12 GiB"]


def test_anchors_and_merges() -> None:
    node = read("base: &b {kind: paged, block_size: 8}\none: *b\ntwo:\n  <<: *b\n  block_size: 16\n")
    assert node.plain()["one"] == {"kind": "paged", "block_size": 8}
    assert node.plain()["two"] == {"kind": "paged", "block_size": 16}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\na: 2\nb: {c: 1, c: 2}", ["x.yaml:2:1: a: duplicate", "x.yaml:3:11: b.c: duplicate"]),
        ("a: !secret 3", ["x.yaml:1:4: a: a value that YAML tag '!secret' does not describe"]),
        ("? [1, 2]\n: 3", ["x.yaml:1:3: a key that is no name"]),
    ],
)
def test_what_is_wrong_with_the_form_is_collected(text: str, told: list[str]) -> None:
    _, mistakes = parse(text, START)
    assert all(str(mistake).startswith(line) for mistake, line in zip(mistakes, told, strict=True))


@pytest.mark.parametrize("text", ["a: [1", "a: 'x", "{a: 1", "a: @x", "--- 1\n--- 2", "a: *nowhere", "a: \0"])
def test_a_syntax_error_has_a_place(text: str) -> None:
    with pytest.raises(Mistakes, match=r"^x\.yaml:\d+:\d+: YAML syntax error, "):
        parse(text, START)


def test_putting_leaves_the_original_alone() -> None:
    node = read("a: {kind: x}\nb: paged\nc: [1, 2]\n")
    path, three = parse_set("a.n=3", 1)
    changed = node.put(path, three)
    assert node.plain()["a"] == {"kind": "x"}
    assert changed.plain()["a"] == {"kind": "x", "n": 3}
    assert str(changed.position(("a", "n"))) == "--set:1:5"
    assert node.put(("b", "n"), three).plain()["b"] == {"kind": "paged", "n": 3}
    assert node.put(("c", "1"), three).plain()["c"] == [1, 3]
    assert node.put(("d", "e"), three).plain()["d"] == {"e": 3}


def test_below_sweep_stands_a_dotted_path() -> None:
    assert parse_set("sweep.workload.arrivals.rate=[1]", 1)[0] == ("sweep", "workload.arrivals.rate")
    assert parse_set("sweep.zip.allocator.block_size=[1]", 1)[0] == ("sweep", "zip", "allocator.block_size")
    assert parse_set("sweep=null", 1)[0] == ("sweep",)
