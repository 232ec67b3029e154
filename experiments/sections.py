"""Sections: mappings whose keys are the parameters of a class or function; signatures turned into forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path as File
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic_core import CoreSchema
from pydantic_core import core_schema as core

from experiments import profiles
from experiments.annotations import DefaultKind, alternatives, fields_of, file_in, registry_in, section_in
from experiments.forms import (
    ANYTHING,
    NULL,
    SCALARS,
    SIZE,
    TAG,
    Either,
    FilePath,
    Form,
    Items,
    Simple,
    Table,
    choice,
    name_in,
    scalar,
)
from experiments.mistakes import listed
from experiments.sizes import IN_BYTES
from sim.errors import UserError
from sim.registry import Bounds, Field, Registry


class Section(Form):
    """A mapping whose keys are the keyword-only parameters of a class or function."""

    def __init__(self, policy: Callable[..., Any], kind: CoreSchema | None = None) -> None:
        self.policy = policy
        self.kind = kind  # the schema of the key `kind` of a policy

    @cached_property
    def fields(self) -> dict[str, Field]:
        """The parameters by name."""
        return {field.name: field for field in fields_of(self.policy)}

    @cached_property
    def forms(self) -> dict[str, Form]:
        """The forms of the parameters by name."""
        return {name: self._form(field) for name, field in self.fields.items()}

    def _form(self, field: Field) -> Form:
        try:
            form = form_of(field.annotation)
        except UserError as error:
            raise UserError(f"{_place(self.policy)}: field {field.name}: {error}") from None
        if isinstance(form, Policy) and not field.required:  # a mapping without kind is of the default's
            form.default_kind = form.default_kind or form.default(field.default)
        return form

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a mapping of {listed(self.forms)}" if self.forms else "an empty mapping"

    def schema(self) -> CoreSchema:
        fields = {}
        if self.kind is not None:
            fields["kind"] = core.typed_dict_field(self.kind, required=self.kind["type"] != "default")
        for name, field in self.fields.items():
            form = self.forms[name]
            value = form.schema()
            if not field.required:
                value = core.with_default_schema(
                    value, default=form.default(field.default), validate_default=True
                )
            fields[name] = core.typed_dict_field(
                value, required=field.required, metadata=_described(field.description)
            )
        summary = (inspect.getdoc(self.policy) or "").split("\n", 1)[0]
        return core.typed_dict_schema(fields, extra_behavior="forbid", metadata=_described(summary))

    def inside(self, value: Any) -> Mapping[Any, Form]:
        return self.forms if isinstance(value, dict) else {}

    def default(self, value: Any) -> Any:
        return value if isinstance(value, dict) else {}  # an instance, which has defaults only


def _place(policy: Callable[..., Any]) -> str:
    """File, line and name of a policy."""
    try:
        where = f"{inspect.getsourcefile(policy)}:{inspect.getsourcelines(policy)[1]}: "
    except (OSError, TypeError):  # its source is not there
        where = f"{policy.__module__}."
    return f"{where}{policy.__qualname__}"


def _described(text: str) -> dict[str, Any]:
    return {"pydantic_js_updates": {"description": text}} if text else {}


class Policy(Form):
    """One of a registry's policies: a mapping with its `kind` and fields, or its kind alone."""

    def __init__(self, registry: Registry[Any], default_kind: str | None = None) -> None:
        self.registry = registry
        self.default_kind = default_kind
        self._sections: dict[str, Section] = {}

    def section(self, kind: str) -> Section:
        """The mapping that describes a policy of a known kind or alias."""
        kind = self.registry.aliases.get(kind, kind)
        if kind not in self._sections:
            aliases = [alias for alias, name in self.registry.aliases.items() if name == kind]
            named: CoreSchema = core.literal_schema([kind, *aliases])
            if kind == self.default_kind:
                named = core.with_default_schema(named, default=kind)
            self._sections[kind] = Section(self.registry[kind], named)
        return self._sections[kind]

    @property
    def words(self) -> Sequence[str]:  # type: ignore[override]
        return [*self.registry.kinds, *self.registry.aliases]

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"one of {listed(self.registry.kinds)}"

    def kind_in(self, value: Any) -> Any:
        """The kind that a value names, known or not; None if it names none."""
        return value.get("kind", self.default_kind) if isinstance(value, dict) else value

    def schema(self) -> CoreSchema:
        choices = {TAG + kind: self.section(kind).schema() for kind in self.registry.kinds}
        union = core.tagged_union_schema(choices, discriminator=self._tag)
        kinds = core.literal_schema(list(self.words))
        return core.json_or_python_schema(
            json_schema=core.union_schema([kinds, union]),
            python_schema=core.no_info_before_validator_function(self._expanded, union),
        )

    def _tag(self, value: Any) -> str | None:
        kind = self.kind_in(value)
        return TAG + kind if isinstance(kind, str) else None

    def _expanded(self, value: Any) -> Any:
        kind = self.kind_in(value)
        if not isinstance(kind, str):
            return value
        kind = self.registry.aliases.get(kind, kind)
        return {**value, "kind": kind} if isinstance(value, dict) else {"kind": kind}

    def inside(self, value: Any) -> Mapping[Any, Form]:
        if not isinstance(value, dict):
            return {}
        kind = self.kind_in(value)
        known = isinstance(kind, str) and kind in self.registry
        return {
            "kind": Simple(core.any_schema(), self.expected, self.words),
            **(self.section(kind).forms if known else {}),
        }

    def default(self, value: Any) -> Any:
        for kind in self.registry.kinds:
            policy = self.registry[kind]
            if value is policy or (inspect.isclass(policy) and type(value) is policy):
                return kind
        return value


def form_of(annotation: Any) -> Form:
    """The form that an annotation describes. Raises UserError for one that no YAML value fits."""
    forms = [_one(base, marks) for base, marks in alternatives(annotation)]
    forms.sort(key=lambda form: form is NULL)  # null last
    return forms[0] if len(forms) == 1 else Either(forms)


def _one(base: Any, marks: tuple[Any, ...]) -> Form:
    registry = registry_in(base, marks)
    if base in (None, NoneType):
        return NULL
    if registry is not None and base is str:
        return name_in(registry)
    if registry is not None:
        return Policy(registry, next((mark.kind for mark in marks if isinstance(mark, DefaultKind)), None))
    if IN_BYTES in marks:
        return SIZE
    if base in SCALARS:
        return scalar(base, next((mark for mark in marks if isinstance(mark, Bounds)), None))
    if inspect.isclass(base) and issubclass(base, File):
        return FilePath()
    in_file = file_in(base, marks)
    if in_file is not None:
        names = profiles.shipped(in_file.folder)
        return FilePath(f"a path, or one of {listed(names)}" if names else "a path", names)
    section = section_in(base, marks)
    if section is not None and fields_of(section):
        return Section(section)
    origin, arguments = get_origin(base) or base, get_args(base)
    if origin is Literal:
        return choice(arguments)
    if origin in (list, tuple):
        return Items(form_of(arguments[0]) if arguments else ANYTHING)
    if origin is dict:
        return Table(form_of(arguments[1]) if arguments else ANYTHING)
    if base is Any:
        return ANYTHING
    raise UserError(f"no YAML value fits the annotation {base}")
