"""What a request says of itself that matters for where it is sent. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

MAX_PREFIXES = 256
"""Turns of a conversation that are told apart, counted from its end; also the blocks of a plain prompt."""

BLOCK = 1024
"""Characters of a plain prompt that make one prefix. A shorter prompt is warm nowhere: computing it costs nothing."""

CHARACTERS_PER_TOKEN = 3
"""To guess how long a prompt is, rather too long than too short: English has about 4, code and German about 3."""

_PICTURE_TOKENS = 500

_SHOWN = frozenset(
    {
        "image",
        "image_url",
        "input_image",
        "audio",
        "input_audio",
        "document",
        "file",
        "input_file",
        "video_url",
    }
)
"""Kinds of parts whose data are no text."""

MARK = "cache_control"
"""Where a client of Anthropic's API would have a prompt cached: with each turn the marks move on to the newest messages."""

_NAMES = frozenset({"type", "role", "id", "multimodal_data"})
"""Fields of a message that are no part of its text."""

_DEPTH = 8
"""Levels of a request that are looked into: the results of tools, in messages, have parts of their own."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One request, as far as routing cares.

    Attributes:
        session: what the client calls this conversation; empty if it does not.
        prompt_tokens: a guess.
        max_tokens: that it may generate; `None` if it does not say.
        tools: whether it offers tools to the model.
        vision: whether it shows pictures.
        batch: whether it can wait: others go first.
        streams: whether its answer comes token by token.
        request: its body, until `prefixes` are found out; and `marked`, whether marks of caches may be in it.
    """

    session: str = ""
    prompt_tokens: int = 0
    max_tokens: int | None = None
    tools: bool = False
    vision: bool = False
    batch: bool = False
    streams: bool = False
    request: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    marked: bool = field(default=False, repr=False, compare=False)

    @cached_property
    def prefixes(self) -> tuple[bytes, ...]:
        """Names of what the prompt begins with, the longest first: a server that answered one has it warm.

        Found out when first asked for: it takes as long as all else that is read here, and where there is one server it can
        be left until that has begun.
        """
        request = _lasting(self.request) if self.marked else self.request
        names = tuple(_prefixes(request, _messages(request)))
        self.__dict__["request"] = {}  # which takes several times what the body does
        return names


NOTHING = Wanted()
"""Of a request that says nothing, or nothing that can be read."""


def read_wanted(request: dict[str, Any], headers: Mapping[str, str], *, marked: bool = False) -> Wanted:
    """What a request's body and headers say. What cannot be read counts as not there; never raises.

    `marked` is whether `MARK` is anywhere in the body. `request` is kept, and must not be changed any more.
    """
    batch = headers.get("X-Priority", "").lower() in ("batch", "low")
    limits = (
        request.get(key) for key in ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict")
    )
    return Wanted(
        session=_session(request),
        prompt_tokens=_guess(request),
        max_tokens=next((limit for limit in limits if type(limit) is int and limit >= 0), None),
        tools=bool(request.get("tools")),
        vision=any(kind in ("image_url", "input_image", "image") for kind in _part_types(_messages(request))),
        batch=batch or request.get("service_tier") in ("flex", "batch"),
        streams=request.get("stream") is True,
        request=request,
        marked=marked,
    )


def _messages(request: dict[str, Any]) -> list[Any]:
    messages = request.get("messages") or request.get("input")
    return messages if isinstance(messages, list) else []


def _session(request: dict[str, Any]) -> str:
    metadata = request.get("metadata")
    about = metadata if isinstance(metadata, dict) else {}
    named = [request.get(key) for key in ("session_id", "prompt_cache_key", "user")]
    for value in (*named, about.get("user_id")):
        if isinstance(value, str) and value:
            return value[:200]
    return ""


def _prefixes(request: dict[str, Any], messages: list[Any]) -> list[bytes]:
    """The longest first. Each name covers the tools, the system's words and all turns up to one."""
    chain = hashlib.blake2b(digest_size=16)
    head = [request.get(key) for key in ("tools", "system", "instructions")]
    chain.update(_encode(head))
    prompt = request.get("prompt")
    if not messages and isinstance(prompt, str):
        whole = len(prompt) - len(prompt) % BLOCK
        pieces = [
            prompt[start : start + BLOCK].encode(errors="surrogatepass") for start in range(0, whole, BLOCK)
        ]
    else:
        pieces = [_encode(message) for message in messages]
    names: list[bytes] = []
    for piece in pieces:
        chain.update(len(piece).to_bytes(8) + piece)
        names.append(chain.digest())
    return names[: -MAX_PREFIXES - 1 : -1]


def _lasting(request: dict[str, Any]) -> dict[str, Any]:
    """As `request` would be without its marks, with which goes the form that only they need."""

    def unmarked(value: Any, depth: int = _DEPTH) -> Any:
        if depth == 0 or not isinstance(value, dict | list):
            return value
        if isinstance(value, list):
            return [unmarked(inner, depth - 1) for inner in value]
        kept = {key: unmarked(inner, depth - 1) for key, inner in value.items() if key != MARK}
        match kept.get("content"):
            case [{"type": "text", "text": str(text), **others}] if not others:
                kept["content"] = text
        return kept

    cleaned: dict[str, Any] = unmarked(request)
    return cleaned


def _part_types(messages: list[Any], depth: int = 2) -> Iterator[str]:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else []
        for part in parts:
            if isinstance(part, dict):
                yield str(part.get("type"))
        if depth > 1:  # what a tool returned
            yield from _part_types(parts, depth - 1)


def _guess(request: dict[str, Any]) -> int:
    said = [request.get(key) for key in ("prompt", "system", "instructions", "messages", "input")]
    characters, shown = _weigh(said, _DEPTH)
    if request.get("tools"):
        characters += len(_encode(request["tools"]))
    return characters // CHARACTERS_PER_TOKEN + shown * _PICTURE_TOKENS


def _weigh(value: object, depth: int) -> tuple[int, int]:
    """Characters of text, and parts that are none. A number is a token."""
    if isinstance(value, str):
        return len(value), 0
    if depth == 0 or not isinstance(value, dict | list):
        return 0, 0
    if isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str) and kind in _SHOWN:
            return 0, 1
        value = [inner for key, inner in value.items() if key not in _NAMES]
    characters = shown = 0
    for inner in value:
        if type(inner) is int:
            characters += CHARACTERS_PER_TOKEN
            continue
        more, parts = _weigh(inner, depth - 1)
        characters, shown = characters + more, shown + parts
    return characters, shown


_SORTED = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def _encode(value: object) -> bytes:
    try:
        return _SORTED(value).encode(errors="surrogatepass")
    except RecursionError:  # it was read where less of the stack was in use
        return b""
