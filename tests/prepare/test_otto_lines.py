"""OTTO's lines: the fast reader against json."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.otto_logs import START, expected_clicks, published_line, random_events, random_log

from tron_cli.prepare.reading import otto_lines
from tron_cli.prepare.reading.otto_lines import Clicks, read_clicks


def read_text(text: bytes) -> Clicks:
    return read_clicks(bytearray(text))


def as_lists(clicks: Clicks) -> list[list[tuple[int, int]]]:
    ends = np.cumsum(clicks.lengths)
    pairs = list(zip(clicks.aids.tolist(), clicks.times.tolist(), strict=True))
    return [pairs[end - n : end] for end, n in zip(ends, clicks.lengths, strict=True)]


def by_json(text: bytes) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """(clicks of every readable line, numbers of the broken ones), as the json module has it."""
    sessions, broken = [], []
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            events = [(e["aid"], e["ts"], e["type"]) for e in json.loads(line)["events"]]
            for aid, ts, kind in events:
                assert type(aid) is int
                assert 0 <= aid < 10**8
                assert type(ts) is int
                assert 10**12 <= ts < 10**13
                assert kind in ("clicks", "carts", "orders")
            sessions.append([(a, t) for a, t, _ in expected_clicks(events)])
        except (ValueError, KeyError, TypeError, AssertionError):
            broken.append(number)
    return sessions, broken


def assert_reads_like_json(text: bytes) -> None:
    clicks = read_text(text)
    sessions, broken = by_json(text)
    assert as_lists(clicks) == sessions
    assert [line for line, _ in clicks.bad] == broken


def test_published_lines_are_read_without_json(monkeypatch: pytest.MonkeyPatch) -> None:
    log = random_log(0, 300)
    published = "".join(published_line(i, s) + "\n" for i, s in enumerate(log)).encode()
    spaced = b"".join(json.dumps(json.loads(x)).encode() + b"\n" for x in published.splitlines())
    expected = [[(a, t) for a, t, _ in expected_clicks(s)] for s in log]
    others = sorted(a for s in log for a, _, kind in s if kind != "clicks")
    monkeypatch.setattr(otto_lines, "_read_any", None)
    for text in (published, published[:-1], spaced):
        clicks = read_text(text)
        assert as_lists(clicks) == expected
        assert sorted(clicks.other_aids.tolist()) == others
        assert (clicks.lines, clicks.bad) == (len(log), [])


def test_lines_in_the_wrong_order_of_keys_are_not_mistaken() -> None:
    # The right number of every key, but events stand before the first line.
    start, event = b'{"session":1,"events":[', b'{"aid":5,"ts":1659304800025,"type":"clicks"}'
    assert_reads_like_json(
        b'    {"aid":5,"ts":1659304800025,"type":"clicks"}]}\n' + start + b"]}\n"
    )
    assert_reads_like_json(start + event + b"," + event + b"]}\n" + event + b"]}\n")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_text_is_read_like_json_reads_it(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 2:
        monkeypatch.setattr(otto_lines, "PIECE_BYTES", 100)  # a line or two
    rng = np.random.default_rng(seed)
    pieces = [
        b'"',
        b":",
        b",",
        b"0",
        b"7",
        b"{",
        b"}",
        b"]",
        b"[",
        b"\n",
        b" ",
        b"s",
        b"\\",
        b"\xc3",
    ]
    pieces += [b"},{", b']}\n{"session":', b'"aid":', b'"ts":', b"-", b"1e3", b"null", b"orders"]
    pieces += [b"{{", b"{" * 8, b'"clicks"', b'"carts"}', b'{"aid":', b'{"s', b"]}\n"]
    for _ in range(700):
        log = [random_events(rng, int(n), 3000, 1) for n in rng.integers(0, 4, 3)]
        text = "".join(published_line(i, s) + "\n" for i, s in enumerate(log)).encode()
        for _ in range(rng.integers(1, 3)):
            at = int(rng.integers(0, len(text)))
            gone = int(rng.choice([0, 1, 1, 1, 2, 8]))
            text = (
                text[:at]
                + pieces[rng.integers(len(pieces))] * int(rng.integers(0, 2))
                + text[at + gone :]
            )
        assert_reads_like_json(text)


@pytest.mark.parametrize(
    "line",
    [
        b'{"events":[{"type":"clicks","ts":1659304800025,"aid":5}],"session":1}',
        b'{"session": 1, "events": [ {"aid" : 5, "ts": 1659304800025, "type": "clicks"} ] } ',
        b'{"session":1,"events":[{"aid":5,"ts":1659304800025,"type":"cl\\u0069cks"}]}',
        b'{"session":1,"events":[{"aid":5,"ts":1659304800025,"type":"clicks","price":{"aid":7}}]}',
        b'{"session":"a","events":[{"aid":99999999,"ts":9999999999999,"type":"clicks"}]}',
        b'{"session":123456789,"events":[{"aid":0,"ts":1000000000000,"type":"clicks"}]}',
        b'{"session":1,"events":[]}',
    ],
)
def test_any_valid_json_is_read(line: bytes) -> None:
    published = published_line(2, [(3, START, "clicks"), (4, START + 1, "clicks")]).encode()
    for text in (line, line + b"\r\n" + published, published + b"\n\n" + line + b"\n"):
        clicks = read_text(text)
        assert not clicks.bad
        assert_reads_like_json(text)
