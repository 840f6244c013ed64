"""docs/configuration.md, from the settings: `python -m tron_cli.config.page > FILE` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tron_cli.config.experiment import FIELDS
from tron_cli.config.setting import TOOLS

_TOP = """\
# Configuration

<!-- `make docs` writes this page from the settings in tron_cli/config/experiment.py. -->

A config is a Python file that lists what differs from the defaults:

```python
from tron_cli.config import ExperimentConfig

config = ExperimentConfig(dataset_name="shop", embedding_dim=128, max_epochs=20)
```

`--config` takes the path of such a file or the name of a packaged config (`tron config list`). \
Settings on the command line override it:

```
tron train --config config_diginetica lr=1e-3 positions=start
tron config show config_diginetica lr=1e-3
tron config show config_diginetica --explain
```

`tron config show` prints every setting and where its value came from, `--explain` also what it \
means. Unknown names, wrong types and values out of range are errors, and so are settings that \
have no effect on the chosen model, loss, sampler or optimizer. Names and a colon before \
a meaning are those of the only models, losses, samplers or optimizers that have the setting. \
[Models and losses](models-and-losses.md) describes the models, losses, samplers and baselines, \
and [extending](extending.md) how to use code of your own in their place.
"""

_NAMES = """\
## Names in other tools

A dash marks what the tool does not have; RecBole's names are those of version 1.1 and later. \
Typing one of these names as a setting is an error that suggests ours. [Coming from other \
tools](coming-from.md) says how to run configurations of TRON and gSASRec as they are.
"""

# Flags, files, and names with an underscore are code.
_CODE = re.compile(r"(?<![\w-])(--[\w-]+|\w+\.p[yt]\b(?::\w+)?|\w+_\w+)")


def page() -> str:
    """Return docs/configuration.md."""
    sections: list[tuple[str, list[list[str]]]] = []
    for name, setting in FIELDS.items():
        if setting.section:
            sections.append((setting.section, []))
        allowed = setting.allowed
        if setting.choices:
            allowed = _names(setting.choices)
        default = setting.shown_default
        sections[-1][1].append(
            [
                f"`{name}`",
                f"`{default}`"
                if setting.kind in (str, tuple) and default != "required"
                else default,
                allowed,
                _names(setting.owners)
                + ": " * bool(setting.owners)
                + _CODE.sub(r"`\1`", setting.help),
            ]
        )
    header = ("setting", "default", "values", "meaning")
    parts = [_TOP, *(f"## {title}\n\n{_table(header, rows)}" for title, rows in sections)]
    rows = [
        [f"`{name}`", *(_names(setting.names_elsewhere(tool)) or "-" for tool in TOOLS)]
        for name, setting in FIELDS.items()
        if any(setting.names_elsewhere(tool) for tool in TOOLS)
    ]
    return "\n".join([*parts, _NAMES, _table(("setting", *TOOLS.values()), rows)])


def _names(names: Iterable[str]) -> str:
    return ", ".join(re.sub(r"([\w.-]+)$", r"`\1`", name) for name in names)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
