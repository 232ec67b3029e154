"""Annotations: what the signature of a policy says about its fields, without pydantic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from sim.registry import Field, InFile, Registry


@dataclass(frozen=True, slots=True)
class DefaultKind:
    """Marks a nested policy whose mapping may go without `kind`."""

    kind: str


def fields_of(policy: Callable[..., Any]) -> list[Field]:
    """The keyword-only parameters of any class or function, as a registry tells them of its policies."""
    alone: Registry[Any] = Registry("section")
    alone("this")(policy)
    return alone.fields("this")


def alternatives(annotation: Any, marks: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The members of a union, each with the marks that `Annotated` puts on it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *more = get_args(annotation)
        yield from alternatives(base, (*more, *marks))
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from alternatives(member, marks)
    else:
        yield annotation, marks


def registry_in(base: Any, marks: tuple[Any, ...]) -> Registry[Any] | None:
    """The registry that a nested policy comes from."""
    return next((mark for mark in marks if isinstance(mark, Registry)), None)


def file_in(base: Any, marks: tuple[Any, ...]) -> InFile | None:
    """The mark of a section that stands in a file of its own."""
    return next((mark for mark in marks if isinstance(mark, InFile)), None)


def section_in(base: Any, marks: tuple[Any, ...]) -> type | None:
    """The class whose parameters a nested section gives: the annotation itself, or a mark on a plain dict."""
    return next((mark for mark in (*marks, base) if isinstance(mark, type) and mark not in _PLAIN), None)


_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
