"""Everything said about a setting comes from its declaration."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tron_cli.config import FIELDS
from tron_cli.config.setting import TOOLS, Setting, setting, settings_of_class
from tron_cli.errors import InputError


@dataclass
class Cake:
    """A class of settings with one of each type."""

    layers: int = setting(2, help="layers", unit="layers", low=1, high=1000)
    sugar: float | None = setting(None, help="share of sugar", above=0, below=1, tron="a, not b")
    shape: str = setting("round", help="shape", choices=("round", "square"))
    iced: bool = setting(False, help="with icing")
    guests: tuple[str, ...] = setting(("you", "me"), help="names")


CAKE = settings_of_class(Cake)


@pytest.mark.parametrize(
    ("name", "allowed", "default"),
    [
        ("layers", "at least 1 and at most 1,000 (layers)", "2"),
        ("sugar", "above 0 and below 1, or None", "None"),
        ("shape", "round, square", "round"),
        ("iced", "True or False", "False"),
        ("guests", "a list of measures", "you me"),
    ],
)
def test_tables_show_range_unit_and_default(name: str, allowed: str, default: str) -> None:
    assert (CAKE[name].allowed, CAKE[name].shown_default) == (allowed, default)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("layers", "3", 3),
        ("sugar", "none", None),
        ("sugar", "1e-1", 0.1),
        ("iced", "TRUE", True),
        ("guests", "a,b c", ("a", "b", "c")),
        ("shape", "None", "None"),
    ],
)
def test_texts_are_read_by_the_declared_type(name: str, text: str, value: object) -> None:
    assert CAKE[name].parsed(text) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers", 0, "layers must be at least 1 and at most 1,000, got 0"),
        ("layers", 1001, "layers must be at least 1 and at most 1,000, got 1001"),
        ("sugar", 0.0, "sugar must be above 0 and below 1, got 0.0"),
        ("sugar", 1.0, "sugar must be above 0 and below 1, got 1.0"),
        ("sugar", float("nan"), "sugar must be finite and above 0 and below 1, got nan"),
        ("shape", "rond", "shape must be one of round, square, got 'rond'; did you mean 'round'?"),
    ],
)
def test_a_value_out_of_range_is_told_the_whole_range(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(InputError) as error:
        CAKE[name].check(value)
    assert str(error.value) == message


@pytest.mark.parametrize(("name", "value"), [("layers", 1), ("layers", 1000), ("sugar", None)])
def test_bounds_and_none_are_in_the_range(name: str, value: object) -> None:
    CAKE[name].check(value)


def test_names_elsewhere_are_split() -> None:
    assert CAKE["sugar"].names_elsewhere("tron") == ["a", "not b"]
    assert CAKE["layers"].names_elsewhere("tron") == []


def test_a_keyword_that_no_setting_has_is_refused() -> None:
    with pytest.raises(TypeError, match="hight"):
        Setting(name="x", kind=int, optional=False, default=0, help="x", hight=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_is_allowed_and_every_name_is_one(name: str) -> None:
    declared = FIELDS[name]
    if name != "dataset_name":
        declared.check(declared.typed(declared.default))
    names = [other for tool in TOOLS for other in declared.names_elsewhere(tool)]
    assert all(other.removeprefix("not ").replace(".", "_").isidentifier() for other in names)


def test_the_owners_of_a_setting_are_those_of_the_registry() -> None:
    assert FIELDS["popularity_alpha"].owners == ["popularity", "mixed"]
    assert FIELDS["lr"].owners == []
