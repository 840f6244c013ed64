"""Checks of arguments by their annotations, with errors of one sentence."""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, Union

from tron_cli.errors import InputError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    os.PathLike: "a path",
    types.NoneType: "None",
}


def checked(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return the function with checks of its arguments, which raise InputError."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        hints = typing.get_type_hints(function, include_extras=True)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            is_many = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            for each in value if is_many else [value]:
                check(name, each, hints[name])
        return function(*args, **kwargs)

    return call


def check(
    name: str, value: Any, hint: Any, low: float | None = None, high: float | None = None
) -> None:
    """Raise InputError where the value of the argument `name` does not have the annotated type.

    low, high: inclusive bounds of a number.
    """
    if isinstance(value, str) and not value.strip() and not _takes_lists(hint):
        raise InputError(f"{name} is empty; give a value, or leave it out")
    if not _fits(value, hint):
        choices = [choice for choice in _choices(hint) if isinstance(choice, str)]
        near = difflib.get_close_matches(str(value), choices, n=1)
        did_you_mean = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{name} must be {_in_words(hint)}, got {value!r}{did_you_mean}")
    if value is not None and low is not None and not low <= value <= (high or math.inf):
        bounds = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise InputError(f"{name} must be {bounds}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin in (list, tuple, collections.abc.Sequence):
        is_list = isinstance(value, list | tuple)
        return is_list and all(_fits(each, parts[0]) for each in value)
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _takes_lists(hint: Any) -> bool:
    """Return True where text may be a list of words, which may be empty."""
    kinds = {typing.get_origin(part) for part in (hint, *typing.get_args(hint))}
    return collections.abc.Sequence in kinds


def _choices(hint: Any) -> tuple[Any, ...]:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return parts
    return tuple(choice for part in parts for choice in _choices(part))


def _in_words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [typing.get_origin(part) or part for part in parts]
        named = [part for part in parts if part is not str or os.PathLike not in kinds]
        return " or ".join(_in_words(part) for part in named)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list, each {_in_words(parts[0])}"
    kind = origin or hint
    return _WORDS.get(kind) or str(kind.__name__)
