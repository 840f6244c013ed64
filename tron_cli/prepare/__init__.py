"""Preparation of datasets. The package itself is callable: it is the function `tron_cli.prepare`.

Importing any of its modules sets the attribute `prepare` of `tron_cli` to this package, which would
replace a function of that name.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Prepare(ModuleType):
    def __call__(self, source: str, **options: Any) -> Any:
        """Prepare a dataset; see `tron_cli.api.preparation.prepare`."""
        # Imported by name, because rooms may not import `api`, which is above this one.
        api = importlib.import_module("tron_cli.api.preparation")
        return api.prepare(source, **options)


sys.modules[__name__].__class__ = _Prepare
