"""Registries: a policy is a plain class or function under a decorator, its signature is its schema."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a number, carried in `Annotated[...]` beside the type of a policy's parameter."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __str__(self) -> str:
        signs = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return ", ".join(f"{sign} {value:g}" for sign, value in signs if value is not None)


@dataclass(frozen=True, slots=True)
class InFile:
    """Marks, in `Annotated[...]`, a parameter that stands in a YAML file of its own.

    Users give the path of the file, or the name of one of those shipped in `folder`; a policy gets what is in it.
    """

    folder: str


PositiveInt = Annotated[int, Bounds(ge=1)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
Fraction = Annotated[float, Bounds(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class Field:
    """One parameter of a policy as users see it."""

    name: str
    annotation: Any
    default: Any
    description: str

    @property
    def required(self) -> bool:
        """True if the user has to give a value."""
        return self.default is inspect.Parameter.empty


class UnknownKind(LookupError):
    """A kind that no policy is registered under; the message lists the known ones and the nearest."""

    def __init__(self, what: str, kind: str, known: list[str]) -> None:
        self.nearest = nearest(kind, known)
        hint = f"; did you mean {self.nearest!r}?" if self.nearest else ""
        super().__init__(f"unknown {what} {kind!r}: expected one of {', '.join(known)}{hint}")


def nearest(word: str, known: list[str]) -> str | None:
    """The known name that looks most like `word`, or None."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return found[0] if found else None


class Registry(Generic[T]):
    """Policies of one sort by kind; calling it gives the decorator that registers.

    >>> animal = Registry("animal")
    >>> @animal("cat")
    ... class Cat: ...
    >>> animal["cat"] is Cat
    True
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def __call__(self, kind: str, *aliases: str) -> Callable[[T], T]:
        """Register the decorated policy as `kind`. Raises ValueError if the name is taken by another."""

        def register(policy: T) -> T:
            for name in (kind, *aliases):
                holder = self._entries.get(self._aliases.get(name, name))
                if holder is not None and _origin(holder) != _origin(policy):
                    raise ValueError(f"{self.what} {name!r} is already registered by {_origin(holder)}")
            self._entries[kind] = policy
            self._aliases.update(dict.fromkeys(aliases, kind))
            return policy

        return register

    def __getitem__(self, kind: str) -> T:
        policy = self._entries.get(self._aliases.get(kind, kind))
        if policy is None:
            raise UnknownKind(self.what, kind, self.kinds)
        return policy

    def __contains__(self, kind: object) -> bool:
        return kind in self._entries or kind in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @property
    def kinds(self) -> list[str]:
        """Registered kinds in order of registration, without aliases."""
        return list(self._entries)

    @property
    def aliases(self) -> dict[str, str]:
        """Alias to kind."""
        return dict(self._aliases)

    def fields(self, kind: str) -> list[Field]:
        """The keyword-only parameters of a policy, with what its docstring says about each."""
        policy = self[kind]
        target = policy.__init__ if inspect.isclass(policy) else policy
        hints = typing.get_type_hints(target, include_extras=True)
        described = _described(inspect.getdoc(policy) or "")
        return [
            Field(name, hints.get(name, Any), parameter.default, described.get(name, ""))
            for name, parameter in inspect.signature(target).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]

    def summary(self, kind: str) -> str:
        """First line of the policy's docstring."""
        return (inspect.getdoc(self[kind]) or "").split("\n", 1)[0]


def _origin(policy: Any) -> str:
    return f"{policy.__module__}.{policy.__qualname__}"


def _described(docstring: str) -> dict[str, str]:
    """`name: text` entries of the docstring's `Fields:` section; indented lines continue an entry."""
    entries: dict[str, str] = {}
    name = ""
    _, found, section = docstring.partition("Fields:\n")
    for line in section.splitlines() if found else ():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent < 4:
            break
        head, colon, text = line.strip().partition(":")
        if colon and indent == 4 and head.isidentifier():
            name, entries[head] = head, text.strip()
        elif name:
            entries[name] += " " + line.strip()
    return entries
