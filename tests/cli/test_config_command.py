"""`tron config`."""

from __future__ import annotations

import json

from helpers.command_lines import Command

from tron_cli.config import FIELDS, packaged_configs


def test_config_show_tells_where_every_value_came_from(command: Command) -> None:
    code, out, _ = command("config", "show", "config_otto", "lr=0.01", "positions=start")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()[2:]}
    assert set(rows) == set(FIELDS)
    assert rows["lr"].split()[1:] == ["0.01", "command", "line"]
    assert rows["dataset_name"].split()[1:] == ["otto", "config_otto.py"]
    assert rows["embedding_dim"].split()[1:] == ["200", "default"]


def test_config_show_explains_every_setting(command: Command) -> None:
    code, out, _ = command("config", "show", "config_otto", "lr=0.01", "--explain")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[2:] if not line.startswith(" ")]
    assert [row[0] for row in rows] == list(FIELDS)
    assert ["lr", "0.01", "0.0005"] in rows
    assert "\n  peak learning rate [above 0]\n" in out
    words = " ".join(out.split())
    assert "sessions per batch, or windows of them (training_windows) [at least 1 " in words
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 100

    code, out, _ = command("config", "show", "config_otto", "lr=0.01", "--explain", "--json")
    assert code == 0
    assert json.loads(out)["lr"] == {
        "value": 0.01, "default": "0.0005", "allowed": "above 0", "meaning": "peak learning rate",
    }  # fmt: skip


def test_config_list_names_what_config_show_takes(command: Command) -> None:
    _, out, _ = command("config", "list")
    assert out.split() == packaged_configs()
    for name in out.split():
        assert command("config", "show", name)[0] == 0
