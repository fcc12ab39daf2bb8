"""Event streams (WHATWG HTML, 9.2 "Server-sent events"): bytes in, whole events out. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_EVENT = 4 << 20
"""Bytes of one event. A longer one is no answer of llama-server's."""

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


def holds_event(data: bytes) -> bool:
    """Whether an event ends within `data`."""
    return _END.search(data) is not None


def skip_comments(data: bytes) -> bytes:
    """`data` from its first event on that is no comment."""
    start = 0
    while data.startswith(b":", start) and (end := _END.search(data, start)) is not None:
        start = end.end()
    return data[start:]


class EventTooLong(ValueError):
    """No event ended within `MAX_EVENT` bytes."""


class EventReader:
    """Cuts a stream of bytes into events, however the bytes arrive."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes, each with the blank line that ends it.

        Raises `EventTooLong` once no whole event is left to return.
        """
        self._held += data
        if b"\r" not in self._held:  # as in nearly all streams; several times as fast
            *whole, self._held = self._held.split(b"\n\n")
            events = [event + b"\n\n" for event in whole]
        else:
            events = []
            start = 0
            for end in _END.finditer(self._held):
                events.append(self._held[start : end.end()])
                start = end.end()
            self._held = self._held[start:]
        if len(self._held) > MAX_EVENT and not events:
            raise EventTooLong
        return events


def event_data(event: bytes) -> bytes:
    """The data of one event; empty for a comment."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]
    lines = event.splitlines()
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))


_AS_IT_IS = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Kept: `json.dumps` makes an encoder for each call that wants it so."""


def data_event(value: object) -> bytes:
    """The event that carries `value` as JSON."""
    return b"data: " + encode_json(value) + b"\n\n"


_VALUE = json.JSONDecoder().raw_decode


def decode_json(data: bytes) -> Any:
    """What JSON says, as `json.loads` reads it, for a short event in half the calls. Raises `ValueError` or `RecursionError`."""
    try:
        text = data.decode()
        value, end = _VALUE(text)
    except ValueError:  # space before it, another encoding, or none
        return json.loads(data)
    return value if end == len(text) else json.loads(data)


def encode_json(value: object) -> bytes:
    """`value` as JSON, in UTF-8; escaped where a text has half a surrogate pair, which JSON can say and UTF-8 cannot."""
    try:
        return _AS_IT_IS(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def comment(text: str) -> bytes:
    """A line that every reader of events skips."""
    return b": " + text.encode() + b"\n\n"
