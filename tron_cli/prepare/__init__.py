"""Preparation of datasets. The package itself is callable: it is the function `tron_cli.prepare`.

A function of that name in the package above would be replaced by this package whenever one of its
modules is imported.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Prepare(ModuleType):
    def __call__(self, source: str, **options: Any) -> Any:
        """Prepare a dataset; see `tron_cli.api.preparation.prepare`."""
        # By name, because this package stands below the one that it calls.
        api = importlib.import_module("tron_cli.api.preparation")
        return api.prepare(source, **options)


sys.modules[__name__].__class__ = _Prepare
