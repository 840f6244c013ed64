"""Messages fit a screen, whatever they quote."""

from __future__ import annotations

import pytest

from tron_cli.errors import MAX_CHARACTERS, InputError, RunError, counted, shortened


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_a_long_message_loses_its_middle(kind: type[InputError | RunError]) -> None:
    text = str(kind(f"a.jsonl, line 1: found {'x' * 2_000_000}; correct it"))
    assert len(text) <= MAX_CHARACTERS == 500
    assert text.startswith("a.jsonl, line 1: found xxx")
    assert text.endswith("xxx; correct it")


def test_a_message_is_one_line_of_printable_text() -> None:
    assert shortened("a\nb\tc\x1b[2J\0\ud800 é 漢") == "a b c\\x1b[2J\\x00\\ud800 é 漢"
    assert len(shortened("\0" * 499)) <= 500


def test_a_short_message_stays() -> None:
    sentence = "x" * MAX_CHARACTERS
    assert shortened(sentence) == sentence


def test_a_number_and_its_noun_agree() -> None:
    assert [counted(number, "session") for number in (0, 1, 2000)] == [
        "0 sessions",
        "1 session",
        "2,000 sessions",
    ]
    assert counted(2, "history", "histories") == "2 histories"
