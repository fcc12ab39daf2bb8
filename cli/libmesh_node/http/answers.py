"""What llama-server says, as the client's protocol would say it; and what its answers tell of themselves. Pure.

llama-server's errors have OpenAI's shape in outline: `code` repeats the status as a number, `param` is missing, and what
a client got wrong is now and then a 500. On `/v1/messages` they have that shape, too, where Anthropic's SDK looks for
another one. (llama.cpp, tools/server: `format_error_response`, and its handler of exceptions.)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from libmesh_node.http.errors import ANTHROPIC_TYPES, speaks_anthropic

LONGEST_ERROR = 64 << 10
"""Bytes of an error that is read; a longer one passes as it is."""

TAIL = 2048
"""Bytes at the end of an answer in which its timings and its usage stand."""

_CLIENTS_FAULT = re.compile(
    r"\[json\.exception\.|.* is required$|.* must be provided$|\w+ input is not supported", re.DOTALL
)
"""What a 500 says when the body was not what it should be."""

_NO_ENDPOINT = "File Not Found"
"""What llama-server says of any path or method that it does not know."""

_NAMES = {
    b"predicted_n": "completion",
    b"completion_tokens": "completion",
    b"output_tokens": "completion",
    b"prompt_tokens": "prompt",
    b"input_tokens": "prompt",
    b"cache_n": "cached",
    b"cached_tokens": "cached",
    b"cache_read_input_tokens": "cached",
    b"predicted_per_second": "speed",
}
"""By its name in an answer, what a number is to `Told`."""

_NUMBER = re.compile(rb'"(' + b"|".join(_NAMES) + rb')"\s*:\s*(\d{1,12}(?:\.\d{1,9})?)')


def refined_error(status: int, body: bytes, path: str) -> tuple[int, bytes]:
    """An error answer of a server, its status and body, in the protocol of `path`. What is not understood stays."""
    if len(body) > LONGEST_ERROR:
        return status, body
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return status, body
    error = said.get("error") if isinstance(said, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return status, body
    if status == 500 and _CLIENTS_FAULT.match(error["message"]):
        status, error = 400, error | {"type": "invalid_request_error"}
    if status == 404 and error["message"] == _NO_ENDPOINT:
        error = error | {"message": f"llama-server has no endpoint {path[:200]}, or not for this method."}
    kind = str(error.get("type") or "invalid_request_error")
    if speaks_anthropic(path):
        if said.get("type") == "error":
            return status, body
        kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return status, _json({"type": "error", "error": {"type": kind, "message": error["message"]}})
    code = error.get("code")
    error = error | {
        "type": kind,
        "param": error.get("param"),
        "code": code if isinstance(code, str) else kind,
    }
    return status, _json({"error": error})


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What an answer tells of itself; `None` where it says nothing. Tokens, and tokens per second."""

    completion: int | None = None
    prompt: int | None = None
    cached: int | None = None
    speed: float | None = None


@lru_cache(maxsize=1)  # asked twice of each answer, at its end
def told(tail: bytes) -> Told:
    """What stands in the last `TAIL` bytes of an answer, if it has OpenAI's, Anthropic's or llama-server's names."""
    last = {_NAMES[name]: float(number) for name, number in _NUMBER.findall(tail)}
    return Told(
        completion=_count(last.get("completion")),
        prompt=_count(last.get("prompt")),
        cached=_count(last.get("cached")),
        speed=last.get("speed"),
    )


def _count(number: float | None) -> int | None:
    return None if number is None else int(number)
