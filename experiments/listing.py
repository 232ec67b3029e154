"""Listings: every policy with its fields, bounds and defaults, as `kvsim list` prints them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.annotations import alternatives, registry_in, section_in
from experiments.combinations import combinations
from experiments.experiment import Experiment
from experiments.forms import Form, members
from experiments.mistakes import shown
from experiments.sections import Policy, Section
from experiments.text import aligned
from sim.errors import UserError
from sim.registry import Field, Registry, nearest

WIDEST = 60
"""Characters of the longest enumeration that is spelt out."""


def registries() -> dict[str, Registry[Any]]:
    """Every registry that an experiment names a policy of, by the field that does, outer ones first."""
    found: dict[str, Registry[Any]] = {}
    for name, registry in _registries_in(Section(Experiment)):
        found.setdefault(name, registry)
    return found


def _registries_in(section: Section) -> Iterator[tuple[str, Registry[Any]]]:
    inner: list[Section] = []
    for field in section.fields.values():
        for base, marks in alternatives(field.annotation):
            registry = registry_in(base, marks)
            if registry is not None:
                yield field.name, registry
                policy = Policy(registry)
                inner += [policy.section(kind) for kind in registry.kinds]
            elif (nested := section_in(base, marks)) is not None:
                inner.append(Section(nested))
    for nested_section in inner:
        yield from _registries_in(nested_section)


def listing(word: str | None) -> str:
    """All policies, those of one registry, or one policy; or what combines. Raises UserError for other words."""
    if word == "combinations":
        return combinations()
    known = registries()
    whole = "\n".join(["experiment:", *aligned(_fields(Section(Experiment), "  "))])
    if word == "experiment":
        return whole
    if word is None:
        return "\n\n".join([whole, *(_registry(name, registry) for name, registry in known.items())])
    for name, registry in known.items():
        if word in (name, f"{name}s"):
            return _registry(name, registry)
    found = [_policy(registry, word) for registry in known.values() if word in registry]
    if found:
        return "\n\n".join(found)
    words = [
        "experiment",
        "combinations",
        *known,
        *(kind for registry in known.values() for kind in [*registry.kinds, *registry.aliases]),
    ]
    guess = nearest(word, words)
    hint = f", did you mean {guess!r}?" if guess else ""
    raise UserError(
        f"kvsim list: unknown kind, got {word!r}, expected experiment, combinations, {', '.join(known)} or a "
        f"policy{hint}"
    )


def _registry(name: str, registry: Registry[Any]) -> str:
    if name in ("model", "device"):  # rows of a table; their fields are those of custom
        rows = [(f"  {_named(registry, kind)}", registry.summary(kind)) for kind in registry.kinds]
        return "\n".join([f"{name}:", *aligned(rows)])
    return "\n\n".join([f"{name}:", *(_policy(registry, kind) for kind in registry.kinds)])


def _policy(registry: Registry[Any], kind: str) -> str:
    kind = registry.aliases.get(kind, kind)
    rows = list(_fields(Policy(registry).section(kind)))
    return "\n".join(
        [f"  {_named(registry, kind)}: {registry.summary(kind)}", *(aligned(rows) if rows else [])]
    )


def _fields(section: Section, prefix: str = "    ") -> Iterator[tuple[str, str, str]]:
    """Name, form and description of each field; those of a nested section under their dotted names."""
    for name, field in section.fields.items():
        form = section.forms[name]
        nested = next((member for member in members(form) if isinstance(member, Section)), None)
        if nested is None:
            told = form.expected if len(form.expected) <= WIDEST else f"one of those of kvsim list {name}"
            yield f"{prefix}{name}", f"{told}, {_default(field, form)}", field.description
        else:
            yield from _fields(nested, f"{prefix}{name}.")


def _named(registry: Registry[Any], kind: str) -> str:
    aliases = [alias for alias, name in registry.aliases.items() if name == kind]
    return f"{kind} ({', '.join(aliases)})" if aliases else kind


def _default(field: Field, form: Form) -> str:
    if field.required:
        return "required"
    value = form.default(field.default)
    return f"default {value if isinstance(value, str) else shown(value)}"
