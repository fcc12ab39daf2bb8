"""Requests of Anthropic's Messages and OpenAI's Responses, as chat completions. Pure.

llama-server makes chat completions of both itself, but tells in neither which tokens it generated, and without them no other
server can go on with an answer (`transcript.py`). So a request of plain talk is put into a chat completion here, as llama-server
would (tools/server/server-chat.cpp, `server_chat_convert_anthropic_to_oai`, `server_chat_convert_responses_to_chatcmpl`), and
the events of the answer are put into the client's protocol again (`voices.py`). All others go to the server as they are: with
tools, pictures, thinking or stop sequences, and with fields of which it is not known here what llama-server makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from libmesh_node.http.voices import MessageEvents, ResponseEvents, Voice

Json = dict[str, Any]

TRANSLATED = ("/v1/messages", "/v1/responses", "/responses")


@dataclass(frozen=True, slots=True)
class Translation:
    """A chat completion, and how its answer is told to the client."""

    request: Json
    voice: Voice


def translate(path: str, request: Json) -> Translation | None:
    """What `request` for one of the paths `TRANSLATED` is as a chat completion; `None` if that is not certain."""
    if path == "/v1/messages":
        chat = _from_messages(request)
        return None if chat is None else Translation(chat, MessageEvents())
    chat = _from_responses(request)
    return None if chat is None else Translation(chat, ResponseEvents())


_TAKEN = ("model", "temperature", "top_p", "top_k")
"""Fields of a message request that llama-server takes as they are."""

_WITHOUT_EFFECT = frozenset({"metadata", "service_tier", "cache_control", "user", "session_id"})
_READ = frozenset({*_TAKEN, *_WITHOUT_EFFECT, "messages", "system", "max_tokens", "stream"})
_EMPTY = {"tools": ([],), "stop_sequences": ([],), "thinking": ({"type": "disabled"},)}
"""Fields of a message request with which it is no plain talk, and the values at which it is."""

_NO_TALK = (
    "tools",
    "previous_response_id",
    "conversation",
    "prompt",
    "background",
    "reasoning",
    "include",
    "messages",
)
_PLAIN_TEXT: tuple[Json, ...] = ({}, {"format": {"type": "text"}})

MAX_TOKENS = 4096
"""Of an answer to a message request that says nothing, at llama-server."""

_BILLED = "x-anthropic-billing-header:"
"""With which Claude Code begins a system prompt, and which llama-server edits."""


def _from_messages(request: Json) -> Json | None:
    for key, value in request.items():
        if key not in _READ and not (key in _EMPTY and (value is None or value in _EMPTY[key])):
            return None
    messages = request.get("messages")
    if not isinstance(messages, list):
        return None
    turns = [_turn(message) for message in messages]
    if (system := request.get("system")) is not None:
        parts = [system] if isinstance(system, str) else _texts(system, ("text",))
        if parts is None or any(part.startswith(_BILLED) for part in parts):
            return None
        turns.insert(0, {"role": "system", "content": "".join(parts)})
    if None in turns:
        return None
    taken = {key: request[key] for key in _TAKEN if key in request}
    limit = request.get("max_tokens", MAX_TOKENS)
    return {**taken, "messages": turns, "max_tokens": limit, **_STREAMED}


def _turn(message: object) -> Json | None:
    match message:
        case {"role": str(role), "content": str(text), **others} if not others:
            return {"role": role, "content": text}
        case {"role": str(role), "content": list(parts), **others} if not others:
            return _said(role, _texts(parts, ("text",)))
    return None


def _from_responses(request: Json) -> Json | None:
    if any(request.get(key) for key in _NO_TALK) or (request.get("text") or {}) not in _PLAIN_TEXT:
        return None
    asked = request.get("input")
    if isinstance(asked, str):
        turns: list[Json | None] = [{"role": "user", "content": asked}]
    elif isinstance(asked, list):
        turns = [_item(item) for item in asked]
    else:
        return None
    if "instructions" in request:
        words = request["instructions"]
        turns.insert(0, {"role": "system", "content": words} if isinstance(words, str) else None)
    roles = [None if turn is None else turn["role"] for turn in turns]
    merged = any(first == second == "assistant" for first, second in pairwise(roles))
    if None in turns or merged:
        return None
    chat = {key: value for key, value in request.items() if key not in _REPLACED}
    if "max_output_tokens" in request:
        chat["max_tokens"] = request["max_output_tokens"]
    return {**chat, "messages": turns, **_STREAMED}


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_REPLACED = frozenset({*_NO_TALK, "input", "instructions", "max_output_tokens", "text"})
_OF_ITEM = frozenset({"type", "role", "content", "id", "status"})
"""Fields of a message with which it is plain talk. Others, a name, reasoning or calls of tools, llama-server passes on."""


def _item(item: object) -> Json | None:
    if not isinstance(item, dict) or item.get("type", "message") != "message" or item.keys() - _OF_ITEM:
        return None
    role, content = item.get("role"), item.get("content")
    kinds: tuple[str, ...] = ("input_text",)
    if role == "assistant" and "type" in item:
        kinds += ("output_text",)
    elif role not in ("user", "system", "developer"):
        return None
    return _said(role, [content] if isinstance(content, str) else _texts(content, kinds))


def _texts(parts: object, kinds: tuple[str, ...]) -> list[str] | None:
    """The texts of parts of these kinds; `None` if one is of another."""
    if not isinstance(parts, list):
        return None
    found: list[str] = []
    for part in parts:
        match part:
            case {"type": kind, "text": str(text)} if kind in kinds:
                found.append(text)
            case _:
                return None
    return found


def _said(role: str, texts: list[str] | None) -> Json | None:
    if not texts:
        return None
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}
