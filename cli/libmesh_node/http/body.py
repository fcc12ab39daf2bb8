"""Read a request body; and find the `model` of a long one without understanding the rest, nor stopping the loop for long.

`json.loads` holds the interpreter for over a second on a hostile 64 MiB body. `scan_model` looks at quotes and brackets
only: a string is skipped at the speed of `bytes.find`, so an image in base64 costs next to nothing, and the scan can pause
between steps. It does not validate: llama-server gets the untouched bytes and is the judge of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

LONG = 1 << 18
"""Bytes of a body from which on it is read in a thread of its own. A shorter one is read once, before all else."""

STEP_TOKENS = 4096
"""Quotes and brackets looked at between two pauses: about a millisecond."""

MAX_TOKENS = 1_000_000
"""After this many the scan gives up with `TooComplex`: about a second of work in all, in steps that let others in
between. A conversation of 100,000 messages has as many."""

_TOKEN = re.compile(rb'["{}\[\]]')
_KEY_END = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
_SCALAR = re.compile(rb"[^,}\]\s]{0,64}")
_FORM_MODEL = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,512})\r\n', re.IGNORECASE)


class TooComplex(Exception):
    """The body has more than `MAX_TOKENS` quotes and brackets."""


class NotText(Exception):
    """`model` is there and is something other than text."""


def scan_model(body: bytes) -> Iterator[str | None]:
    """Yield `None` at each pause and at last the value of the top-level key `model`, or `None` without one.

    If the key occurs twice the last one counts, as in every JSON parser. Raises `TooComplex` or `NotText`.
    """
    depth = tokens = position = 0
    model: str | None = None
    while True:
        match = _TOKEN.search(body, position)
        if match is None:
            break
        start, position = match.start(), match.end()
        token = body[start]
        if token == 0x22:
            position = _string_end(body, position)
            if depth == 1 and (colon := _KEY_END.match(body, position)) is not None:
                position = colon.end()
                if _is_model(body[start : colon.start()]):
                    model, position = _value(body, position)
        elif token in b"{[":
            depth += 1
            if depth == 1 and token == 0x5B:
                break  # an array has no keys
        else:
            depth -= 1
            if depth <= 0:
                break
        tokens += 1
        if tokens > MAX_TOKENS:
            raise TooComplex
        if tokens % STEP_TOKENS == 0:
            yield None
    yield model


def read_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that `body` is; `None` if it is none, or none that can be read."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def model_of(request: Mapping[str, Any]) -> str | None:
    """`model` of a body that was read. Raises `NotText`."""
    model = request.get("model")
    if model is None or isinstance(model, str):
        return model
    raise NotText


def form_model(body: bytes) -> str | None:
    """The field `model` of a `multipart/form-data` body, or `None`."""
    match = _FORM_MODEL.search(body)
    return None if match is None else match.group(1).decode(errors="replace")


def _string_end(body: bytes, position: int) -> int:
    """Where the string that began before `position` ends: after its closing quote, or at the end of `body`."""
    while True:
        quote = body.find(b'"', position)
        if quote < 0:
            return len(body)
        backslashes = quote
        while backslashes > position and body[backslashes - 1] == 0x5C:
            backslashes -= 1
        if (quote - backslashes) % 2 == 0:
            return quote + 1
        position = quote + 1


def _value(body: bytes, position: int) -> tuple[str | None, int]:
    if body[position : position + 1] == b'"':
        end = _string_end(body, position + 1)
        return _text(body[position:end]), end
    match = _SCALAR.match(body, position)
    if match is not None and match.group() == b"null":
        return None, match.end()
    raise NotText


def _is_model(key: bytes) -> bool:
    return key == b'"model"' or (b"\\" in key and _text(key) == "model")


def _text(literal: bytes) -> str | None:
    try:
        value = json.loads(literal)
    except ValueError:  # broken JSON; llama-server will say so
        return None
    return value if isinstance(value, str) else None
