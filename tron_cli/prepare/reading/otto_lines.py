"""OTTO's JSON lines to arrays of clicks, by array operations.

Lines written exactly as the published files are,

    {"session":42,"events":[{"aid":59625,"ts":1661724000278,"type":"clicks"},...]}

with or without the spaces of json.dumps, are read without an object per event: the braces of
a piece of text are found at once, every other byte has its place relative to a brace, and each is
compared with the expected one. A piece with any other byte goes through `json`, line by line: any
valid JSON is read, and broken lines are reported by number.

Operations on long arrays release the interpreter's lock, so that threads read in parallel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TYPES = ("clicks", "carts", "orders")
MAX_AID = 10**8 - 1  # eight digits; bounds the tables that are indexed with an aid
MIN_TIME, MAX_TIME = 10**12, 10**13 - 1  # of 13 digits: the years 2001 to 2286
PIECE_BYTES = 1 << 21  # long arrays, which still fit into a core's cache


@dataclass
class Clicks:
    """Clicks of some lines, session after session, each session stably sorted by time.

    sessions: int64 [S], the session numbers, -1 where a line has none; lengths: int64 [S], clicks
    of each session, possibly zero; aids: int32 [E]; times: int64 [E] ms; other_aids: int32, of the
    events that are not clicks. lines: number of lines read, blank ones included; bad: (line within
    these lines from 1, what is wrong) of those that could not be read.
    """

    sessions: np.ndarray
    lengths: np.ndarray
    aids: np.ndarray
    times: np.ndarray
    other_aids: np.ndarray
    lines: int
    bad: list[tuple[int, str]] = field(default_factory=list)


def read_clicks(text: bytearray) -> Clicks:
    """Read whole lines of a file, the last one perhaps without its line end; changes `text`."""
    if not text.endswith(b"\n"):
        text += b"\n"
    text += _PADDING
    parts = []
    for start, stop in _pieces(text):
        parts.append(_read_canonical(text, start, stop) or _read_any(bytes(text[start:stop])))
    lines = 0
    bad = []
    for part in parts:
        bad += [(lines + line, problem) for line, problem in part.bad]
        lines += part.lines
    sessions = np.concatenate([part.sessions for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    aids = np.concatenate([part.aids for part in parts])
    times = np.concatenate([part.times for part in parts])
    others = np.concatenate([part.other_aids for part in parts])
    clicks = _sorted_by_time(lengths, aids, times)
    return Clicks(sessions, lengths, *clicks, others, lines, bad)


def _pieces(text: bytearray) -> Iterator[tuple[int, int]]:
    """Yield start and stop of pieces of whole lines in a padded text."""
    start, size = 0, len(text) - len(_PADDING)
    while start < size:
        stop = text.find(b"\n", min(start + PIECE_BYTES, size) - 1) + 1
        yield start, stop
        start = stop


def _sorted_by_time(
    lengths: np.ndarray, aids: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    starts_session = np.zeros(len(times) + 1, bool)
    starts_session[np.cumsum(lengths)] = True
    # Between sessions, time may go back.
    if not ((times[1:] < times[:-1]) & ~starts_session[1:-1]).any():
        return aids, times
    order = np.lexsort((times, np.repeat(np.arange(len(lengths)), lengths)))
    return aids[order], times[order]


# --- text exactly as published -------------------------------------------------------------------


def _word(text: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(text, "little"))


# Appended to the text, so that its last event is followed by the bytes that follow the last event
# of any line, and windows near the end stay within bounds.
_PADDING = b'{"session":' + bytes(64)
_BRACE, _COLON, _QUOTE, _ZERO = b'{:"0'
_1_BYTE, _2_BYTES, _3_BYTES, _4_BYTES, _5_BYTES, _7_BYTES = (
    np.uint64(8 * count) for count in (1, 2, 3, 4, 5, 7)
)
_LOWEST_3, _LOWEST_7 = np.uint64(2**24 - 1), np.uint64(2**56 - 1)
_PLACES = _word(bytes(range(7, -1, -1)))  # times 256**p: p in the highest byte
# What follows "clicks" and "orders", what follows "carts"}; the same two at the end of a line.
_AFTER_TYPE = np.array([_word(b) for b in (b'},{"aid"', b',{"aid":', b'}]}\n{"se', b']}\n{"ses')])


def _read_canonical(text: bytearray, start: int, stop: int) -> Clicks | None:
    """Read the lines from start to stop; None unless each byte is as in the published files.

    A brace opens every line and every event. Every byte from one to the next is compared, so that
    nothing else is accepted, whatever the search for braces found.
    """
    # Remove spaces after colons and commas. If the text is accepted without them, they stood
    # between tokens, where JSON ignores them.
    if text.find(b'": ', start, min(start + 64, stop)) >= 0:
        lines = text[start:stop]
        lines = lines.replace(b'": ', b'":').replace(b', "', b',"').replace(b", {", b",{")
        text, start, stop = lines + _PADDING, 0, len(lines)
    size = stop - start
    data = np.frombuffer(text, np.uint8, offset=start)
    # words[p] is the eight bytes from p on, the first one lowest; windows[p] are 64 bytes.
    words = np.ndarray((size,), "<u8", text, start, strides=(1,))
    windows = np.ndarray((size,), "V64", text, start, strides=(1,))

    brace = _braces(data[:size])
    is_line = data[brace + 2] == ord("s")
    is_line[-1] = True
    if brace[0] != 0 or not is_line[0] or brace[-1] != size:
        return None
    first, event = np.flatnonzero(is_line)[:-1], np.flatnonzero(~is_line)

    # Sizes. In a line's head only the session number varies, in an event the article and the type.
    # Checking them keeps all positions within bounds.
    line = brace[first]
    is_empty = is_line[first + 1]
    opened = brace[first + 1] - 3 * is_empty  # behind the bracket of the list
    session_digits = opened - line - len('{"session":,"events":[')
    begin = brace[event]
    is_last = is_line[event + 1]
    ts_end = brace[event + 1]  # moved back step by step
    ts_end -= len('"clicks"},')
    ts_end -= is_last
    ts_end -= is_last
    is_cart = data[ts_end] != _QUOTE  # "carts" is one byte shorter
    ts_end += is_cart
    ts_end -= len(',"type":')
    aid_digits = ts_end - len('{"aid":,"ts":1661724000278')
    aid_digits -= begin
    for digits in (session_digits, aid_digits):
        if digits.min(initial=1) < 1 or digits.max(initial=8) > 8:
            return None

    # Values, out of the 64 bytes around each time: the article ends at the 21st, the time at the
    # 40th; then `,"type":` and the type are a word each.
    _, aid_head, aid_tail, ts_head, ts_tail, key, kind, after = (
        windows[ts_end - 40].view("<u8").reshape(-1, 8).T
    )
    aid = aid_head >> _5_BYTES
    aid |= aid_tail << _3_BYTES
    aids = _last_digits(aid, aid_digits)
    sessions = _last_digits(words[opened - len('12345678,"events":[')], session_digits)
    high, low = _last_digits(ts_head, 5), _last_digits(ts_tail, 8)
    is_click, is_order = kind == _word(b'"clicks"'), kind == _word(b'"orders"')
    if (
        aids is None
        or sessions is None
        or high is None
        or low is None
        # JSON knows no leading zeros.
        or ((data[begin + len('{"aid":')] == _ZERO) & (aid_digits > 1)).any()
        or ((data[line + len('{"session":')] == _ZERO) & (session_digits > 1)).any()
        or high.min(initial=10**4) < 10**4
        or ((kind == _word(b'"carts"}')) != is_cart).any()
        or not (is_click | is_order | is_cart).all()
    ):
        return None

    # Keys and all that lies between. What follows an event begins the next one, or the next line.
    unusual = np.flatnonzero(after != _AFTER_TYPE[0])
    opening = words[opened]
    if (
        (aid_tail >> _5_BYTES != _word(b',"t')).any()
        or (ts_head & _LOWEST_3 != _word(b's":')).any()
        or (key != _word(b',"type":')).any()
        or (after[unusual] != _AFTER_TYPE[is_cart[unusual] + 2 * is_last[unusual]]).any()
        or (data[begin + len('{"aid"')] != _COLON).any()
        or (words[line] != _word(b'{"sessio')).any()
        or (words[line + 8] & _LOWEST_3 != _word(b'n":')).any()
        or (words[opened - 11] != _word(b',"events')).any()
        or (words[opened - 8] != _word(b'vents":[')).any()
        or (opening[~is_empty] & _LOWEST_7 != _word(b'{"aid":')).any()
        or (opening[is_empty] & _LOWEST_3 != _word(b"]}\n")).any()
    ):
        return None

    clicks_before = np.zeros(len(event) + 1, np.int64)
    np.cumsum(is_click, out=clicks_before[1:])
    events_before = np.append(first - np.arange(len(first)), len(event))
    high *= 10**8
    high += low
    aids = aids.astype(np.int32)
    click, other = np.flatnonzero(is_click), np.flatnonzero(~is_click)
    return Clicks(
        sessions=sessions,
        lengths=np.diff(clicks_before[events_before]),
        aids=aids[click],
        times=high[click],
        other_aids=aids[other],
        lines=len(first),
    )


def _braces(data: np.ndarray) -> np.ndarray:
    """Return the places of opening braces, and of the end of `data`: int64.

    Eight bytes hold at most one, so that only an eighth of the places is looked at.
    """
    size = len(data)
    is_brace = np.zeros(size // 8 * 8 + 8, bool)
    np.equal(data, _BRACE, out=is_brace[:size])
    is_brace[size] = True
    eights = is_brace.view("<u8")
    brace = np.flatnonzero(eights != 0)
    place = eights[brace]
    place *= _PLACES
    place >>= _7_BYTES
    brace *= 8
    brace += place.view(np.int64)
    return brace


_ZEROS = _word(b"00000000")
_TO_HIGH_BIT, _HIGH_BITS = np.uint64(0x7676767676767676), np.uint64(0x8080808080808080)
_PAIRS, _OUTER = np.uint64(10), np.uint64(0x000000FF000000FF)
_WEIGHTS = np.uint64(10**6 << 32 | 100), np.uint64(10**4 << 32 | 1)
_JUNK = np.arange(64, -1, -8).astype(np.uint64)  # bits before the last so many bytes


def _last_digits(text: np.ndarray, digits: np.ndarray | int) -> np.ndarray | None:
    """Parse the last `digits` (1 to 8) bytes of each word: int64, or None if one is no number."""
    junk = _JUNK[digits]
    word: np.ndarray = text ^ _ZEROS  # a byte per digit, the first one lowest
    word >>= junk
    word <<= junk
    check = word + _TO_HIGH_BIT
    check |= word
    if np.bitwise_or.reduce(check) & _HIGH_BITS:
        return None
    # Combine neighbours into numbers of two digits, then of four and eight, within the word.
    seconds = word >> _1_BYTE
    word *= _PAIRS
    word += seconds
    firsts = word & _OUTER
    firsts *= _WEIGHTS[0]
    word >>= _2_BYTES
    word &= _OUTER
    word *= _WEIGHTS[1]
    word += firsts
    word >>= _4_BYTES
    return word.view(np.int64)


# --- any other text ------------------------------------------------------------------------------


def _read_any(text: bytes) -> Clicks:
    """Read lines as JSON, one by one."""
    sessions: list[int] = []
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
            number, events = _session(line)
        except ValueError as error:
            bad.append((number, str(error)))
            continue
        clicks = [(aid, time) for aid, time, is_click in events if is_click]
        sessions.append(number)
        lengths.append(len(clicks))
        aids += [aid for aid, _ in clicks]
        times += [time for _, time in clicks]
        other_aids += [aid for aid, _, is_click in events if not is_click]
    return Clicks(
        np.array(sessions, np.int64),
        np.array(lengths, np.int64),
        np.array(aids, np.int32),
        np.array(times, np.int64),
        np.array(other_aids, np.int32),
        len(lines),
        bad,
    )


def _session(line: bytes) -> tuple[int, list[tuple[int, int, bool]]]:
    """Return (number, [(aid, time, is_click)]) of a line; raise ValueError with its fault."""
    try:
        session = json.loads(line.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    events = session.get("events") if isinstance(session, dict) else None
    if not isinstance(events, list):
        raise ValueError('expected an object with a list of "events"')
    number = session.get("session")
    is_number = type(number) is int and 0 <= number < 2**63
    return number if is_number else -1, [_event(event) for event in events]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1)
        raise ValueError(f"the key {key!r} occurs more than once")
    return found


def _event(event: Any) -> tuple[int, int, bool]:
    if not isinstance(event, dict):
        raise ValueError(f"expected an object as event, found {_shown(event)}")
    aid, time, kind = event.get("aid"), event.get("ts"), event.get("type")
    if type(aid) is not int or not 0 <= aid <= MAX_AID:
        raise ValueError(
            f'expected "aid" to be an integer from 0 to {MAX_AID}, found {_shown(aid)}'
        )
    if type(time) is not int or not MIN_TIME <= time <= MAX_TIME:
        problem = 'expected "ts" to be a time in milliseconds, of 13 digits'
        raise ValueError(f"{problem}, found {_shown(time)}")
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f'expected "type" to be one of {", ".join(TYPES)}, found {_shown(kind)}')
    return aid, time, kind == "clicks"


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)[:60]
