"""Forms: what a value of the YAML may look like.

Each form gives the pydantic schema that validates it, the words that describe it in error messages and in
`kvsim list`, and the forms of the values inside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from pydantic_core import CoreSchema
from pydantic_core import core_schema as core

from experiments.mistakes import Path, listed
from experiments.sizes import PATTERN, parse_size
from sim.registry import Bounds, Registry

TAG = "\0"
"""Starts the parts of an error's location that are no keys; YAML cannot contain it."""


class Form(ABC):
    """What a value may look like."""

    expected: str
    words: Sequence[str] = ()  # texts that are allowed, for the nearest one

    @abstractmethod
    def schema(self) -> CoreSchema:
        """The pydantic schema that accepts and completes such a value."""

    def inside(self, value: Any) -> Mapping[Any, Form]:
        """Forms of the parts of a value by key or index."""
        return {}

    def default(self, value: Any) -> Any:
        """A default from a signature as the YAML would say it."""
        return str(value) if isinstance(value, File) else value


@dataclass(frozen=True)
class Simple(Form):
    """A scalar that needs no more than its schema."""

    core: CoreSchema
    expected: str
    words: Sequence[str] = ()

    def schema(self) -> CoreSchema:
        return self.core


@dataclass(frozen=True)
class FilePath(Form):
    """The path of a file or folder that exists."""

    expected: str = "a path"
    shipped: Mapping[str, File] = field(default_factory=dict)  # by the names that stand for them

    @property
    def words(self) -> Sequence[str]:  # type: ignore[override]
        return list(self.shipped)

    def schema(self) -> CoreSchema:
        return core.str_schema(strict=True, min_length=1)


@dataclass(frozen=True)
class Items(Form):
    """A list of values of one form."""

    item: Form

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a list, each {self.item.expected}"

    def schema(self) -> CoreSchema:
        return core.list_schema(self.item.schema(), strict=True)

    def inside(self, value: Any) -> Mapping[Any, Form]:
        return dict.fromkeys(range(len(value)), self.item) if isinstance(value, list) else {}

    def default(self, value: Any) -> Any:
        return list(value) if isinstance(value, list | tuple) else []


@dataclass(frozen=True)
class Table(Form):
    """A mapping with keys of the user's choice."""

    item: Form

    @property
    def expected(self) -> str:  # type: ignore[override]
        return "a mapping" if self.item is ANYTHING else f"a mapping, each value {self.item.expected}"

    def schema(self) -> CoreSchema:
        return core.dict_schema(core.str_schema(), self.item.schema(), strict=True)

    def inside(self, value: Any) -> Mapping[Any, Form]:
        return dict.fromkeys(value, self.item) if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Either(Form):
    """A value of one of several forms."""

    forms: Sequence[Form]

    @property
    def expected(self) -> str:  # type: ignore[override]
        return " or ".join(dict.fromkeys(form.expected for form in self.forms))

    @property
    def words(self) -> Sequence[str]:  # type: ignore[override]
        return [word for form in self.forms for word in form.words]

    def schema(self) -> CoreSchema:
        *others, last = self.forms
        if len(others) == 1 and last is NULL:
            return core.nullable_schema(others[0].schema())
        return core.union_schema([(form.schema(), f"{TAG}{index}") for index, form in enumerate(self.forms)])

    def inside(self, value: Any) -> Mapping[Any, Form]:
        return {key: form for member in self.forms for key, form in member.inside(value).items()}

    def default(self, value: Any) -> Any:
        return value if value is None else self.forms[0].default(value)


NULL = Simple(core.none_schema(), "null")
ANYTHING = Simple(core.any_schema(), "any value")
SIZE = Simple(
    core.json_or_python_schema(
        json_schema=core.union_schema([core.int_schema(ge=1), core.str_schema(pattern=PATTERN)]),
        python_schema=core.no_info_before_validator_function(
            lambda value: parse_size(value) if isinstance(value, str) else value,
            core.int_schema(strict=True, ge=1),
        ),
    ),
    "a size such as 12 GiB",
)
SCALARS: dict[Any, tuple[Callable[..., CoreSchema], str]] = {
    int: (core.int_schema, "an integer"),
    float: (core.float_schema, "a number"),
    bool: (core.bool_schema, "true or false"),
    str: (core.str_schema, "a text"),
}


def choice(values: Sequence[Any]) -> Form:
    """One of a few values."""
    return Simple(
        core.literal_schema(list(values)), f"one of {listed(map(str, values))}", [str(v) for v in values]
    )


def name_in(registry: Registry[Any]) -> Form:
    """The name of a policy that a class looks up by itself."""
    names = [*registry.kinds, *registry.aliases]
    schema = core.no_info_before_validator_function(
        lambda value: registry.aliases.get(value, value) if isinstance(value, str) else value,
        core.literal_schema(names),
    )
    return Simple(schema, f"one of {listed(registry.kinds)}", names)


def scalar(base: Any, bounds: Bounds | None) -> Form:
    """A number within bounds, a flag or a text."""
    make, name = SCALARS[base]
    limits = {
        key: value for key in ("ge", "gt", "le", "lt") if (value := getattr(bounds, key, None)) is not None
    }
    if base is float:
        limits["allow_inf_nan"] = False
    return Simple(make(strict=True, **limits), f"{name} {bounds}" if bounds else name)


def members(form: Form) -> Sequence[Form]:
    """The alternatives of a form, itself if it has none."""
    return form.forms if isinstance(form, Either) else [form]


def has(form: Form, sort: type[Form]) -> bool:
    """True if a form, or one of its alternatives, is of a sort."""
    return any(isinstance(member, sort) for member in members(form))


def walk(form: Form, value: Any, path: Path = ()) -> Iterator[tuple[Path, Form, Any]]:
    """Every value in a document that a form is known for, with its path, the outer ones first."""
    yield path, form, value
    for key, part in form.inside(value).items():
        if isinstance(key, int) or key in value:
            yield from walk(part, value[key], (*path, key))
