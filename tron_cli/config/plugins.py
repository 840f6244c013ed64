"""Models, losses and samplers from outside the package, added to the registry by name.

`mine.py:Mean` names a class or function of a file, `package.module:Mean` one of a module. Such code
runs only where a person names it, in a configuration or with `--plugin`; a checkpoint that names it
does not run it. Installed packages may also register entry points in the groups tron.models,
tron.losses and tron.samplers, which have plain names and are loaded like those of the package.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from tron_cli.errors import InputError, described, place_of
from tron_cli.registry import (
    BASELINES,
    CATALOGUE_LOSSES,
    LOSSES,
    MODELS,
    REGISTERED,
    SAMPLERS,
    Entry,
    load,
)

# Settings whose value may name code from outside, and the group of their entry points.
GROUPS = {"model": "tron.models", "loss": "tron.losses", "negative_sampler": "tron.samplers"}

_SAMPLED = ["positive_N", "negative_NK", "keep_NK"]
_OVER_CATALOGUE = ["hidden_ND", "table_VD", "targets_N"]


class UnnamedCodeError(InputError):
    """Refusal of a checkpoint that needs code which nobody has named."""


# Code that a person named in this process: the path of the entry by name.
_named: dict[str, str] = {}


def registered_name(key: str, name: str, settings: Collection[str]) -> str:
    """Return the name under which the registry has `name`, loading code from outside if needed.

    key: a setting of GROUPS. settings: names of all settings, which the code's parameters may
    have. A name that is not found is returned as it is. Raises InputError where the code cannot be
    loaded, or is not of the kind that the key needs.
    """
    if name in REGISTERED[key]:
        return name
    if ":" in name:
        name = add_plugin(name)
        path = _named[name]
    else:
        points = importlib.metadata.entry_points(group=GROUPS[key], name=name)
        if not points:
            return name
        point = next(iter(points))
        _check_attribute(_module(point.module), point.attr, f"{key}={name}")
        path = f"{point.module}:{point.attr}"
    if name not in REGISTERED[key]:
        _register(key, name, Entry(path), settings)
    return name


def add_plugin(reference: str) -> str:
    """Load the code that a person named, and return its name: `mine.py:Mean` without folders.

    Raises InputError where it cannot be loaded.
    """
    place, _, attribute = reference.rpartition(":")
    if not place or not attribute.isidentifier():
        raise InputError(
            f"expected code as path/to/file.py:Name or package.module:Name, got {reference!r}"
        )
    if not place.endswith(".py"):
        name, module = reference, _module(place)
    else:
        name = f"{Path(place).name}:{attribute}"
        if reference == name in _named:
            return name  # from whichever folder
        module = _module_of_file(Path(place).resolve())
    _check_attribute(module, attribute, reference)
    path = f"{module.__name__}:{attribute}"
    if _named.setdefault(name, path) != path:
        raise InputError(
            f"{reference} and another file of this run are both called {name}; rename one of them"
        )
    return name


def check_named(values: Mapping[str, Any]) -> None:
    """Raise UnnamedCodeError for settings of a checkpoint whose code nobody has named."""
    for key in GROUPS:
        name = values.get(key)
        if isinstance(name, str) and ":" in name and name not in _named:
            folder = "path/to/" if ".py:" in name else ""
            raise UnnamedCodeError(
                f"{key}={name}, code from outside tron that runs only when it is named; if you "
                f"trust it, add --plugin {folder}{name}"
            )


def label(name: str) -> str:
    """Return a name as part of a file's name: `mine.Mean` for `mine.py:Mean`."""
    return re.sub(r"[^\w.+-]", "_", name.replace(".py:", ".").replace(":", "."))


def _register(key: str, name: str, entry: Entry, settings: Collection[str]) -> None:
    found = load(entry)
    if not callable(found):
        raise InputError(f"{key}={name} is neither a class nor a function, but {found!r}")
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError as error:  # of code that is not Python
        raise InputError(f"{key}={name} does not say which parameters it has") from error
    asked = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    given = [str(each).partition(":")[0] for each in parameters if each.name not in asked]
    unknown = [each for each in asked if each not in settings and each != "num_items"]
    if unknown:
        near = difflib.get_close_matches(unknown[0], settings, n=1)
        hint = f"did you mean {near[0]}?" if near else "`tron config show` lists them all"
        raise InputError(f"{key}={name} asks for {unknown[0]!r}, which is no setting; {hint}")
    table: dict[str, Entry]
    if key == "model":
        is_baseline = getattr(found, "is_baseline", False)
        if not isinstance(found, type) or not (is_baseline or hasattr(found, "forward")):
            raise InputError(
                f"model={name} is no class with `forward(batch, rows_UD)`, such as a subclass of "
                "tron_cli.models.Model, nor a subclass of tron_cli.baselines.base.Baseline"
            )
        _check_parameters(f"model={name}", given, [[]])
        table = BASELINES if is_baseline else MODELS
    elif key == "loss":
        _check_parameters(f"loss={name}", given, [_SAMPLED, _OVER_CATALOGUE])
        table = LOSSES if given == _SAMPLED else CATALOGUE_LOSSES
    else:
        _check_parameters(f"negative_sampler={name}", given, [["count_I"]])
        table = SAMPLERS
    only_some_have = {each for other in REGISTERED[key].values() for each in other.owns}
    entry = Entry(
        entry.path,
        owns=tuple(each for each in asked if each in only_some_have),
        shares_table=getattr(found, "shares_table", True),
        masks_inputs=getattr(found, "masks_inputs", False),
    )
    table[name] = REGISTERED[key][name] = entry


def _check_parameters(what: str, given: list[str], expected: list[list[str]]) -> None:
    """Raise InputError unless the parameters before the * are those of the registry's interface."""
    if given not in expected:
        ways = " or ".join(f"({', '.join([*names, '*', '...'])})" for names in expected)
        raise InputError(
            f"{what} has the parameters ({', '.join(given)}, ...); expected {ways}, with settings "
            "behind the *"
        )


def _check_attribute(module: ModuleType, attribute: str, reference: str) -> None:
    if not hasattr(module, attribute):
        there = [name for name in vars(module) if not name.startswith("_")]
        near = difflib.get_close_matches(attribute, there, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it defines {', '.join(there) or 'nothing'}"
        raise InputError(f"{reference}: {module.__file__} defines no {attribute}; {hint}")


def _module(name: str) -> ModuleType:
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise InputError(f"module {name} cannot be imported: {described(error)}") from error


@functools.cache
def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"no file {path}, whose code was asked for")
    # The module has a name of its own: a file called random.py must not replace that module.
    name = f"tron_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{place_of(path, error)}: {described(error)}") from error
    return module
