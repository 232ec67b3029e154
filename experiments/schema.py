"""The schema of the YAML: values checked against their forms, and pydantic's findings put into our words."""

from __future__ import annotations

from typing import Any

from pydantic_core import SchemaValidator, ValidationError

from experiments.forms import TAG, Form, members, walk
from experiments.mistakes import Mistake, Path, listed, shown
from experiments.sections import Policy
from sim.registry import nearest


class Schema:
    """What documents of one form have to look like."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self._validator = SchemaValidator(form.schema())

    def resolve(self, data: Any) -> tuple[Any, list[Mistake]]:
        """The data with every default filled in, or every mistake in it."""
        try:
            return self._validator.validate_python(data), []
        except ValidationError as error:
            return None, self._translated(data, error)

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema for editors. No section is required, since a sweep may give it."""
        from pydantic.json_schema import GenerateJsonSchema

        class Untitled(GenerateJsonSchema):
            """Leaves out the titles, which repeat the names of the fields."""

            def field_title_should_be_set(self, schema: Any) -> bool:
                return False

        generated = Untitled().generate(self.form.schema())
        generated.pop("required", None)
        return {"$schema": Untitled.schema_dialect, **generated}

    def _translated(self, data: Any, error: ValidationError) -> list[Mistake]:
        known = {path: (form, value) for path, form, value in walk(self.form, data)}
        found: dict[Path, Mistake] = {}
        for line in error.errors(include_url=False, include_context=False, include_input=False):
            path = tuple(part for part in line["loc"] if not str(part).startswith(TAG))
            mistake = _mistake(line["type"], path, known)
            earlier = found.get(mistake.path)
            if earlier is None or earlier.what == "wrong type":  # another member of a union says more
                found[mistake.path] = mistake
        return [
            mistake
            for path, mistake in found.items()
            if not (
                mistake.what == "wrong type" and any(other[: len(path)] == path != other for other in found)
            )
        ]


def _mistake(code: str, path: Path, known: dict[Path, tuple[Form, Any]]) -> Mistake:
    if code == "extra_forbidden":
        form, value = known[path[:-1]]
        names = [str(name) for name in form.inside(value)]
        expected = f"one of {listed(names)}" if names else "no keys"
        what = f"unknown key{_lacking(form, value, path[-1])}"
        guess = nearest(str(path[-1]), names)
        return Mistake(what, path, expected=expected, nearest=guess, on_key=True)
    if code == "missing":
        form, value = known[path[:-1]]
        inside = form.inside(value if isinstance(value, dict) else {"kind": value})  # a kind may stand alone
        return Mistake("missing", path, expected=inside[path[-1]].expected, on_key=True)
    form, value = known[path]
    policy = _policy(form)
    if policy is not None and isinstance(value, dict) and code.startswith("union_tag"):
        if policy.kind_in(value) is None:
            return Mistake("missing", (*path, "kind"), expected=policy.expected, on_key=True)
        path, value = (*path, "kind"), policy.kind_in(value)
    if policy is not None and isinstance(value, str):
        return Mistake(
            "unknown kind", path, shown(value), policy.expected, nearest(value, list(policy.words))
        )
    if code.endswith("_type") or code.startswith("union_tag"):
        what = "wrong type"
    elif code.startswith(("greater", "less", "finite")):
        what = "out of bounds"
    elif code == "value_error":
        what = "not understood"
    else:
        what = "not allowed"
    guess = nearest(value, list(form.words)) if isinstance(value, str) else None
    return Mistake(what, path, shown(value), form.expected, guess)


def _lacking(form: Form, value: Any, key: Any) -> str:
    """Why a policy does not have a key that others like it have, where it says so."""
    policy = _policy(form)
    if policy is None or policy.kind_in(value) not in policy.registry:
        return ""
    reason = getattr(policy.registry[policy.kind_in(value)], "absent", {}).get(key)
    return f": {reason}" if reason else ""


def _policy(form: Form) -> Policy | None:
    return next((member for member in members(form) if isinstance(member, Policy)), None)
