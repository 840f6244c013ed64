"""Declaration of a setting: type, default, range, meaning and names in other tools."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tron_cli.errors import InputError
from tron_cli.registry import REGISTERED

# Projects whose names of settings are known: the keyword at the field, and the project's name.
TOOLS = {"tron": "TRON (JSON)", "gsasrec": "gSASRec", "recbole": "RecBole", "rectools": "RecTools"}

_TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple: "a list of measures",
}


def shown(value: Any) -> str:
    """Return a value as it is typed after `key=`."""
    return " ".join(value) if isinstance(value, tuple) else str(value)


def setting(default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """Return a dataclass field; `about` are the fields of Setting that its type does not give."""
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Declaration of one setting of a configuration.

    low and high are allowed values, above and below are not. choices may be a registry, which grows
    as plugins are added. tron, gsasrec, recbole and rectools hold its names there, separated by
    commas; a name after "not" means the opposite. section: heading that starts at this setting.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[str] = ()
    section: str = ""
    tron: str = ""
    gsasrec: str = ""
    recbole: str = ""
    rectools: str = ""

    @property
    def range(self) -> str:
        """Allowed values in words, such as `at least 0 and below 1`; empty where any will do."""
        bounds = {
            "at least": self.low,
            "above": self.above,
            "at most": self.high,
            "below": self.below,
        }
        limits = [f"{words} {bound:,}" for words, bound in bounds.items() if bound is not None]
        return ", ".join(self.choices) or " and ".join(limits)

    @property
    def allowed(self) -> str:
        """Allowed values with their unit, for tables."""
        words = _TYPES[self.kind] if self.kind is bool else self.range or _TYPES[self.kind]
        if self.unit:
            words += f" ({self.unit})"
        return words + (", or None" if self.optional else "")

    @property
    def owners(self) -> list[str]:
        """Names of the only models, losses, samplers, optimizers that have it; empty: all have."""
        entries = {name: each for table in REGISTERED.values() for name, each in table.items()}
        return [name for name, entry in entries.items() if self.name in entry.owns]

    @property
    def shown_default(self) -> str:
        """Default value in words."""
        return "required" if self.default is dataclasses.MISSING else shown(self.default)

    def names_elsewhere(self, tool: str) -> list[str]:
        """Return the setting's names in one of TOOLS, such as ["not repeatable"]."""
        return [name for name in getattr(self, tool).split(", ") if name]

    def parsed(self, text: str) -> Any:
        """Return the value that a text on the command line stands for. Raises InputError."""
        if self.optional and text.lower() == "none":
            return None
        try:
            if self.kind is bool:
                return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            if self.kind in (int, float):
                return self.kind(text)
        except (KeyError, ValueError):
            raise self._wrong_type(repr(text)) from None
        if self.kind is str:
            return text
        return tuple(part for part in re.split(r"[,\s]+", text) if part)

    def typed(self, value: Any) -> Any:
        """Return a value of the setting's type; whole numbers become floats. Raises InputError."""
        if self.optional and value is None:
            return None
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise InputError(
                f"{self.name} must be below 2**63, got a number of {value.bit_length()} bits"
            )
        if self.kind is float and type(value) is int:
            return float(value)
        if type(value) is not self.kind:
            raise self._wrong_type(repr(value))
        return value

    def check(self, value: Any) -> None:
        """Raise InputError if a value of the right type is outside the range."""
        if value is None or not self.range:
            return
        if self.choices:
            if value not in self.choices:
                near = difflib.get_close_matches(value, self.choices, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"{self.name} must be one of {self.range}, got {value!r}{hint}")
            return
        inside = (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if not inside:
            finite = "" if math.isfinite(value) else "finite and "
            raise InputError(f"{self.name} must be {finite}{self.range}, got {value}")

    def _wrong_type(self, shown: str) -> InputError:
        expected = _TYPES[self.kind] + (" or None" if self.optional else "")
        return InputError(f"{self.name} must be {expected}, got {shown}")


def settings_of_class(config: type) -> dict[str, Setting]:
    """Return the settings that a dataclass declares, by name."""
    types_of = typing.get_type_hints(config)
    found = {}
    for field in dataclasses.fields(config):
        kind = types_of[field.name]
        optional = isinstance(kind, types.UnionType)
        if optional:
            kind = typing.get_args(kind)[0]
        found[field.name] = Setting(
            name=field.name,
            kind=typing.get_origin(kind) or kind,
            optional=optional,
            default=field.default,
            **field.metadata,
        )
    return found
