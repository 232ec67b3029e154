"""Registries: kinds, aliases, fields from signatures, and what is said about a name that nobody knows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest

from sim import Bounds, PositiveInt, Registry, allocator, scheduler, timing, victim
from sim.registry import Fraction, NonNegativeFloat, UnknownKind, nearest

REGISTRIES = {"allocator": allocator, "scheduler": scheduler, "timing": timing, "victim": victim}


@pytest.fixture
def animal() -> Registry[Any]:
    registry: Registry[Any] = Registry("animal")

    @registry("cat", "kitty")
    class Cat:
        """A cat.

        It has more to say.

        Fields:
            lives: How many lives it has,
                of nine.
            mood: What it wants.
            weight_kg: Without the fur.

        Notes:
            age: Not a field.
        """

        def __init__(
            self,
            home: str,
            *,
            lives: PositiveInt = 9,
            mood: Literal["food", "sleep"],
            weight_kg: NonNegativeFloat | None = None,
            age: int = 3,
        ) -> None: ...

    @registry("cow")
    def cow(grass: float, *, share: Fraction = 0.5) -> float:
        """A cow."""
        return grass * share

    return registry


def test_kinds_and_aliases(animal):
    assert animal.kinds == list(animal) == ["cat", "cow"]
    assert animal["kitty"] is animal["cat"]
    assert animal.aliases == {"kitty": "cat"}
    assert "cat" in animal
    assert "kitty" in animal
    assert "dog" not in animal
    assert 3 not in animal


def test_fields_are_the_keyword_parameters(animal):
    lives, mood, weight, age = animal.fields("kitty")
    assert [lives.name, mood.name, weight.name, age.name] == ["lives", "mood", "weight_kg", "age"]
    assert lives.annotation == Annotated[int, Bounds(ge=1)]
    assert lives.default == 9
    assert lives.description == "How many lives it has, of nine."
    assert mood.annotation == Literal["food", "sleep"]
    assert [mood.required, lives.required, weight.required] == [True, False, False]
    assert weight.description == "Without the fur."
    assert age.description == ""  # said outside the section
    (share,) = animal.fields("cow")
    assert (share.name, share.annotation) == ("share", Annotated[float, Bounds(ge=0, le=1)])


def test_summaries_are_first_lines(animal):
    assert animal.summary("cat") == "A cat."
    assert animal.summary("cow") == "A cow."


@pytest.mark.parametrize(
    ("word", "hint"), [("cta", "; did you mean 'cat'?"), ("cows", "; did you mean 'cow'?"), ("zebra", "")]
)
def test_an_unknown_kind_names_the_known_ones_and_the_nearest(animal, word, hint):
    with pytest.raises(UnknownKind) as caught:
        animal[word]
    assert str(caught.value) == f"unknown animal {word!r}: expected one of cat, cow{hint}"


@pytest.mark.parametrize(
    ("registry", "word", "meant"),
    [
        (allocator, "page", "paged"), (allocator, "contigous", "contiguous"), (scheduler, "vllm-v0", "vllm_v0"),
        (scheduler, "statik", "static"), (timing, "roof_line", "roofline"), (timing, "fix", "fixed"),
        (victim, "last", "latest"),
    ],
)  # fmt: skip
def test_did_you_mean(registry, word, meant):
    with pytest.raises(UnknownKind, match=f"did you mean '{meant}'"):
        registry[word]


def test_nearest():
    assert nearest("watermrk", ["block_size", "watermark"]) == "watermark"
    assert nearest("x", ["block_size", "watermark"]) is None


def test_a_name_is_registered_once(animal):
    for kind, alias in (("cat", ()), ("dog", ("cat",)), ("dog", ("kitty",)), ("kitty", ())):
        with pytest.raises(ValueError, match=r"animal '(cat|kitty)' is already registered by .*Cat"):

            @animal(kind, *alias)
            class Dog:
                """A dog."""

    assert animal.kinds == ["cat", "cow"]


def test_loading_a_policy_again_replaces_it(animal):
    """A plug-in file that is read twice defines its classes twice."""
    old = animal["cow"]

    def cow(grass: float) -> float:
        """A newer cow."""
        return grass

    cow.__module__, cow.__qualname__ = old.__module__, old.__qualname__
    animal("cow")(cow)
    assert animal["cow"] is cow


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(ge=0), ">= 0"), (Bounds(gt=0, le=1), "> 0, <= 1"), (Bounds(ge=0, lt=1), ">= 0, < 1"), (Bounds(), ""),
        (Bounds(ge=0.5), ">= 0.5"),
    ],
)  # fmt: skip
def test_bounds_read_well(bounds, text):
    assert str(bounds) == text


@pytest.mark.parametrize(
    ("what", "kind"), [(what, kind) for what, registry in REGISTRIES.items() for kind in registry.kinds]
)
def test_every_policy_describes_itself(what, kind):
    registry = REGISTRIES[what]
    assert registry.summary(kind).endswith(".")
    for field in registry.fields(kind):
        assert field.description, f"{what} {kind}: {field.name} is not described in the docstring"
        assert field.annotation is not Any, f"{what} {kind}: {field.name} has no annotation"
