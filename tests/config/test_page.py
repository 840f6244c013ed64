"""docs/configuration.md is what the settings say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tron_cli.config import FIELDS, parse_overrides
from tron_cli.config.page import page
from tron_cli.errors import InputError

FILE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_committed_page_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == page(), "stale: run `make docs`"


def test_every_setting_stands_in_a_table_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| [^|]+ \| [^|]+ \|$", page(), flags=re.MULTILINE)
    shown = {name: default.strip("`") for name, default in rows}
    assert list(shown) == list(FIELDS)
    assert shown.pop("dataset_name") == "required"
    assert shown.pop("metrics").split() == list(FIELDS["metrics"].default)
    assert all(text == str(FIELDS[name].default) for name, text in shown.items())


def test_names_of_other_tools_get_the_hint_that_the_table_gives() -> None:
    table = page().partition("## Names in other tools")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, flags=re.MULTILINE)
    named = [(name, other) for name, cells in rows for other in re.findall(r"`([\w.]+)", cells)]
    assert len(named) > 60
    for name, other in named:
        if other not in FIELDS:
            with pytest.raises(InputError, match=f"did you mean {name}"):
                parse_overrides([f"{other}=1"])
