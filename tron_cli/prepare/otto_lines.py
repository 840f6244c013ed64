"""Lines of OTTO's jsonl -> arrays of clicks, at the speed of array operations.

Lines written exactly as the published files are,

    {"session":42,"events":[{"aid":59625,"ts":1661724000278,"type":"clicks"},...]}

with or without the spaces that json.dumps puts, are read without an object per event: the colons of
a piece of text are found at once, every other byte has its place relative to a colon, and each is
compared with what it must be. A piece in which one byte is anything else goes through `json`, line
by line: any valid JSON is read, and what is broken is reported with its line.

Worker processes import this module, so it needs nothing but numpy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TYPES = ("clicks", "carts", "orders")
MAX_AID = 10**8 - 1  # eight digits; bounds the tables that are indexed with an aid
MAX_TIME = 2**53
PIECE_BYTES = 1 << 20  # its arrays fit into a core's cache
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Whole lines of a file: the bytes from start to stop, or, where given, `text` itself."""

    file: Path
    start: int
    stop: int
    text: bytes | None = None

    def read(self) -> bytes:
        if self.text is not None:
            return self.text
        with self.file.open("rb") as source:
            source.seek(self.start)
            return source.read(self.stop - self.start)


@dataclass
class Clicks:
    """The clicks of some lines, session after session, each session stably sorted by time.

    lengths: int64 [S], clicks of each session, also zero; aids: int32 [E]; times: int64 [E] ms;
    other_aids: int32, of the events that are no clicks. lines: how many were read, blank ones
    included; bad: (line within these lines from 1, what is wrong) of those that could not be read.
    """

    lengths: np.ndarray
    aids: np.ndarray
    times: np.ndarray
    other_aids: np.ndarray
    lines: int
    bad: list[tuple[int, str]] = field(default_factory=list)


def read_clicks(block: Block) -> Clicks:
    """Read the lines of a block."""
    text = block.read()
    if block.start == 0:
        text = text.removeprefix(BYTE_ORDER_MARK)
    parts = []
    for piece in _pieces(text or b"\n"):
        parts.append(_read_canonical(piece) or _read_any(piece))
    lines = 0
    bad = []
    for part in parts:
        bad += [(lines + line, problem) for line, problem in part.bad]
        lines += part.lines
    lengths = np.concatenate([part.lengths for part in parts])
    aids = np.concatenate([part.aids for part in parts])
    times = np.concatenate([part.times for part in parts])
    others = np.concatenate([part.other_aids for part in parts])
    return Clicks(lengths, *_sorted_by_time(lengths, aids, times), others, lines, bad)


def _pieces(text: bytes) -> Iterator[bytes]:
    """The text in pieces of whole lines, each with its line end."""
    start = 0
    while start < len(text):
        end = text.find(b"\n", min(start + PIECE_BYTES, len(text)) - 1) + 1
        if not end:
            yield text[start:] + b"\n"
            return
        yield text[start:end]
        start = end


def _sorted_by_time(
    lengths: np.ndarray, aids: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    starts_session = np.zeros(len(times) + 1, bool)
    starts_session[np.cumsum(lengths)] = True
    # From one session to the next time may go back.
    if not ((times[1:] < times[:-1]) & ~starts_session[1:-1]).any():
        return aids, times
    order = np.lexsort((times, np.repeat(np.arange(len(lengths)), lengths)))
    return aids[order], times[order]


# --- text exactly as published -------------------------------------------------------------------


def _word(text: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(text, "little"))


_ONE_BYTE, _TWO_BYTES = np.uint64(8), np.uint64(16)
_LOWEST_2, _LOWEST_3 = np.uint64(0xFFFF), np.uint64(0xFFFFFF)
_LOWEST_4 = np.uint64(0xFFFFFFFF)


def _read_canonical(text: bytes) -> Clicks | None:
    """Read lines exactly as published; None where a byte is not what it must be.

    Arrays of positions are called by what lies there: `aid` has the positions of the colons after
    "aid", `comma` those of commas.
    """
    # Spaces after the colon of a key or after a comma may go: where the text is accepted without
    # them, they stood between tokens, and there JSON ignores them.
    if b'": ' in text[:64]:
        text = text.replace(b'": ', b'":').replace(b', "', b',"').replace(b", {", b",{")
    size = len(text)
    text += bytes(16)  # words near the end stay within bounds
    # words[p] is the eight bytes from p on, the first one lowest.
    words = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))
    colon = np.flatnonzero(np.frombuffer(text, np.uint8, size) == ord(":"))
    if not len(colon) or colon[0] != len('{"session"'):
        return None

    # Keys. The colons are those after "session" and "events" of a line, and after "aid", "ts" and
    # "type" of an event. Five kinds, told apart by the word that ends there, as many as there are
    # colons: so there is no other, and `number` (which colon it is) gives every event its line.
    key = words[colon - 7]
    is_aid = np.append(key >> _ONE_BYTE == _word(b'{"aid":'), False)
    number = np.flatnonzero(is_aid)
    first = np.flatnonzero(key == _word(b'ession":'))
    if (
        not len(first)
        or first[0] != 0
        or 3 * len(number) + 2 * len(first) != len(colon)
        or first[-1] + 1 >= len(colon)
        or (len(number) and number[-1] + 2 >= len(colon))
        or (key[first + 1] != _word(b'events":')).any()
        or (key[number + 1] >> _TWO_BYTES != _word(b',"ts":')).any()
        or (key[number + 2] != _word(b',"type":')).any()
    ):
        return None
    session, events = colon[first], colon[first + 1]
    aid, ts, kind = colon[number], colon[number + 1], colon[number + 2]

    # Values.
    aids = _integers(words, aid + 1, ts - 5)
    sessions = _integers(words, session + 1, events - 9)
    high, low = _last_digits(words[ts - 2], 5), _last_digits(words[ts + 6], 8)
    value = words[kind + 1]
    is_click, is_cart = value == _word(b'"clicks"'), value == _word(b'"carts"}')
    if (
        aids is None
        or sessions is None
        or high is None
        or low is None
        or (high < 10**4).any()
        or (kind - ts != len(':1661724000278,"type"')).any()
        or not (is_click | is_cart | (value == _word(b'"orders"'))).all()
    ):
        return None

    # What lies between: every event is followed by the next one or by the end of its line, every
    # line by the next one.
    brace = kind + 9 - is_cart
    after = words[brace]
    is_last = ~is_aid[number + 3]
    start = session - 10
    is_empty = ~is_aid[first + 2]
    opening = words[events + 1]
    end = np.empty_like(start)
    end[is_empty] = events[is_empty] + 5
    end[~is_empty] = brace[is_last] + 4
    if (
        (after[~is_last] & _LOWEST_3 != _word(b"},{")).any()
        or (aid[1:] != brace[:-1] + 8)[~is_last[:-1]].any()
        or (after[is_last] & _LOWEST_4 != _word(b"}]}\n")).any()
        or (opening[~is_empty] != _word(b'[{"aid":')).any()
        or (opening[is_empty] & _LOWEST_4 != _word(b"[]}\n")).any()
        or (words[start] != _word(b'{"sessio')).any()
        or (words[events - 9] & _LOWEST_2 != _word(b',"')).any()
        or start[0] != 0
        or end[-1] != size
        or (start[1:] != end[:-1]).any()
    ):
        return None

    clicks_before = np.zeros(len(number) + 1, np.int64)
    np.cumsum(is_click, out=clicks_before[1:])
    events_before = (np.append(first, len(colon)) - 2 * np.arange(len(first) + 1)) // 3
    return Clicks(
        lengths=np.diff(clicks_before[events_before]),
        aids=aids[is_click].astype(np.int32),
        times=(high * 10**8 + low)[is_click],
        other_aids=aids[~is_click].astype(np.int32),
        lines=len(first),
    )


_ZEROS = _word(b"00000000")
_TO_HIGH_BIT, _HIGH_BITS = np.uint64(0x7676767676767676), np.uint64(0x8080808080808080)
_PAIRS, _OUTER = np.uint64(10), np.uint64(0x000000FF000000FF)
_WEIGHTS = np.uint64(10**6 << 32 | 100), np.uint64(10**4 << 32 | 1)
_LEAST = np.array([0, 10, 100, 10**3, 10**4, 10**5, 10**6, 10**7])


def _integers(words: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray | None:
    """int64: the numbers spelled from start to stop; None unless all have one to eight digits."""
    digits = stop - start
    if len(digits) and not (digits.min() >= 1 and digits.max() <= 8):
        return None
    values = _last_digits(words[stop - 8], digits)
    # JSON knows no leading zeros.
    return None if values is None or (values < _LEAST[digits - 1]).any() else values


def _last_digits(word: np.ndarray, digits: np.ndarray | int) -> np.ndarray | None:
    """int64: the number that the last `digits` bytes of each word spell; None if one does not."""
    junk = (8 * (8 - np.asarray(digits))).astype(np.uint64)  # bits before the first digit
    word = (word ^ _ZEROS) >> junk << junk  # a byte per digit, the first one lowest
    if (((word + _TO_HIGH_BIT) | word) & _HIGH_BITS).any():
        return None
    # Neighbours into numbers of two digits, then of eight, all within the word.
    word = word * _PAIRS + (word >> _ONE_BYTE)
    word = (word & _OUTER) * _WEIGHTS[0] + (word >> _TWO_BYTES & _OUTER) * _WEIGHTS[1]
    return (word >> np.uint64(32)).astype(np.int64)


# --- any other text ------------------------------------------------------------------------------


def _read_any(text: bytes) -> Clicks:
    """Read lines as JSON, one by one."""
    lengths: list[int] = []
    aids: list[int] = []
    times: list[int] = []
    other_aids: list[int] = []
    bad: list[tuple[int, str]] = []
    lines = text.split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            events = _events(line)
        except ValueError as error:
            bad.append((number, str(error)))
            continue
        clicks = [(aid, time) for aid, time, is_click in events if is_click]
        lengths.append(len(clicks))
        aids += [aid for aid, _ in clicks]
        times += [time for _, time in clicks]
        other_aids += [aid for aid, _, is_click in events if not is_click]
    return Clicks(
        np.array(lengths, np.int64),
        np.array(aids, np.int32),
        np.array(times, np.int64),
        np.array(other_aids, np.int32),
        len(lines),
        bad,
    )


def _events(line: bytes) -> list[tuple[int, int, bool]]:
    """(aid, time, is it a click) of the events of a line; ValueError says what is wrong with it."""
    try:
        session = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    events = session.get("events") if isinstance(session, dict) else None
    if not isinstance(events, list):
        raise ValueError('expected an object with a list of "events"')
    return [_event(event) for event in events]


def _event(event: Any) -> tuple[int, int, bool]:
    if not isinstance(event, dict):
        raise ValueError(f"expected an object as event, found {_shown(event)}")
    aid, time, kind = event.get("aid"), event.get("ts"), event.get("type")
    if type(aid) is not int or not 0 <= aid <= MAX_AID:
        raise ValueError(
            f'expected "aid" to be an integer from 0 to {MAX_AID}, found {_shown(aid)}'
        )
    if type(time) is not int or not 0 <= time <= MAX_TIME:
        raise ValueError(f'expected "ts" to be a time in milliseconds, found {_shown(time)}')
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f'expected "type" to be one of {", ".join(TYPES)}, found {_shown(kind)}')
    return aid, time, kind == "clicks"


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)[:60]
