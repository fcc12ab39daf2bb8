"""How a streamed chat completion is told in the protocol that the client speaks: chunks in, events out. Pure.

Sources: Anthropic API reference, "Streaming Messages"; OpenAI API reference, "Responses streaming events".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from libmesh_node.http.sse import data_event

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"


class Voice(Protocol):
    """Says one answer in a client's protocol.

    Attributes:
        timed: whether the first server must tell with each token what it has computed so far.
    """

    timed: bool

    def say(self, chunk: Json) -> bytes:
        """The events that tell of a chunk of a chat completion; maybe none yet.

        Raises `ValueError`, `TypeError`, `KeyError` or `AttributeError` if it is none of plain talk.
        """

    def end(self) -> bytes:
        """The events that end the answer. Never raises."""


class Chunks:
    """OpenAI's completions: the chunks themselves."""

    timed = False

    def say(self, chunk: Json) -> bytes:
        """See `Voice`."""
        return data_event(chunk)

    def end(self) -> bytes:
        """See `Voice`."""
        return DONE


def _spoken(chunk: Json) -> Iterator[tuple[str, str]]:
    """The kinds, and the pieces of text, of a chunk."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if delta.get("tool_calls"):
            raise ValueError
        for kind, key in (("thinking", "reasoning_content"), ("text", "content")):
            if text := delta.get(key):
                yield kind, text + ""


def _ended(chunk: Json) -> str | None:
    return next(
        (choice["finish_reason"] for choice in chunk.get("choices") or () if choice.get("finish_reason")),
        None,
    )


def _count(told: object, *keys: str) -> int:
    """A number of tokens, by its way into what was told; 0 if it is not there."""
    for key in keys:
        told = told.get(key) if isinstance(told, dict) else None
    return told if type(told) is int else 0


class MessageEvents:
    """Anthropic's events: a message of blocks, first of thinking, if there is any, and then of text.

    How long the prompt is, they tell at the beginning: so the server is asked to say it with its first token.
    """

    timed = True

    def __init__(self) -> None:
        self._last: Json = {}
        self._begun = self._counted = False
        self._block, self._kind = -1, ""
        self._reason = "end_turn"
        self._usage: object = None

    def say(self, chunk: Json) -> bytes:
        """See `Voice`."""
        self._last, self._usage = chunk, chunk.get("usage") or self._usage
        if (reason := _ended(chunk)) is not None:
            self._reason = "max_tokens" if reason == "length" else "end_turn"
        events = [self._piece(kind, text) for kind, text in _spoken(chunk)]
        if not self._begun and (events or "timings" in chunk):
            events.insert(0, self._begin())
        return b"".join(events)

    def _begin(self) -> bytes:
        self._begun = True
        timings = self._last.get("timings")
        self._counted = isinstance(timings, dict)
        cached, read = _count(timings, "cache_n"), _count(timings, "prompt_n")
        message: Json = {
            "id": self._last.get("id"),
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self._last.get("model"),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"cache_read_input_tokens": cached, "input_tokens": read, "output_tokens": 0},
        }
        return _named("message_start", message=message)

    def _piece(self, kind: str, text: str) -> bytes:
        events = b""
        if kind != self._kind:
            events = self._close()
            self._block, self._kind = self._block + 1, kind
            events += _named("content_block_start", index=self._block, content_block={"type": kind, kind: ""})
        return events + self._delta({"type": f"{kind}_delta", kind: text})

    def _delta(self, delta: Json) -> bytes:
        return _named("content_block_delta", index=self._block, delta=delta)

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        # Clients expect thinking to be signed; a server of one's own has nothing to sign with.
        signed = (
            self._delta({"type": "signature_delta", "signature": ""}) if self._kind == "thinking" else b""
        )
        return signed + _named("content_block_stop", index=self._block)

    def end(self) -> bytes:
        """See `Voice`."""
        begun = b"" if self._begun else self._begin()
        usage = {"output_tokens": _count(self._usage, "completion_tokens")}
        if not self._counted:
            cached = _count(self._usage, "prompt_tokens_details", "cached_tokens")
            read = _count(self._usage, "prompt_tokens") - cached
            usage |= {"input_tokens": read, "cache_read_input_tokens": cached}
        delta = {"stop_reason": self._reason, "stop_sequence": None}
        ending = _named("message_delta", delta=delta, usage=usage) + _named("message_stop")
        return begun + self._close() + ending


class ResponseEvents:
    """OpenAI's events of a response: its items, reasoning first, if there is any, and each event numbered."""

    timed = False

    def __init__(self) -> None:
        self._number = 0
        self._shell: Json = {}
        self._output: list[Json] = []
        self._kind = self._text = ""
        self._usage: object = None

    def say(self, chunk: Json) -> bytes:
        """See `Voice`."""
        events = b"" if self._shell else self._begin(chunk)
        self._usage = chunk.get("usage") or self._usage
        return events + b"".join([self._piece(kind, text) for kind, text in _spoken(chunk)])

    def _begin(self, chunk: Json) -> bytes:
        self._shell = {
            "id": "resp_" + str(chunk.get("id")).removeprefix("chatcmpl-"),
            "object": "response",
            "created_at": chunk.get("created"),
            "model": chunk.get("model"),
        }
        started = {**self._shell, "status": "in_progress", "output": []}
        return self._event("response.created", response=started) + self._event(
            "response.in_progress", response=started
        )

    def _event(self, kind: str, **fields: object) -> bytes:
        event = _named(kind, sequence_number=self._number, **fields)
        self._number += 1
        return event

    def _of_item(self, kind: str, **fields: object) -> bytes:
        """An event about the text of the item that is being said."""
        index = len(self._output) - 1
        return self._event(
            kind, item_id=self._output[index]["id"], output_index=index, content_index=0, **fields
        )

    def _piece(self, kind: str, text: str) -> bytes:
        events = b""
        if kind != self._kind:
            events = self._close() + self._open(kind)
        self._text += text
        if kind == "thinking":
            return events + self._of_item("response.reasoning_text.delta", delta=text)
        return events + self._of_item("response.output_text.delta", delta=text, logprobs=[])

    def _open(self, kind: str) -> bytes:
        self._kind, self._text = kind, ""
        index, name = len(self._output), self._shell["id"].removeprefix("resp_")
        item: Json = {"id": f"msg_{name}", "type": "message", "role": "assistant"}
        if kind == "thinking":
            item = {"id": f"rs_{name}", "type": "reasoning", "summary": [], "encrypted_content": ""}
        self._output.append(item)
        started = {**item, "status": "in_progress", "content": []}
        events = self._event("response.output_item.added", output_index=index, item=started)
        if kind == "text":
            events += self._of_item("response.content_part.added", part=_part(""))
        return events

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        item, events = self._output[-1], b""
        if self._kind == "thinking":
            item["content"] = [{"type": "reasoning_text", "text": self._text}]
        else:
            item["content"] = [_part(self._text)]
            events += self._of_item("response.output_text.done", text=self._text, logprobs=[])
            events += self._of_item("response.content_part.done", part=_part(self._text))
        item["status"] = "completed"
        index = len(self._output) - 1
        return events + self._event("response.output_item.done", output_index=index, item=item)

    def end(self) -> bytes:
        """See `Voice`."""
        begun = b"" if self._shell else self._begin({})
        closed = self._close()
        read, predicted = _count(self._usage, "prompt_tokens"), _count(self._usage, "completion_tokens")
        usage = {
            "input_tokens": read,
            "output_tokens": predicted,
            "total_tokens": read + predicted,
            "input_tokens_details": {
                "cached_tokens": _count(self._usage, "prompt_tokens_details", "cached_tokens")
            },
        }
        # llama-server says so of answers that reached their limit, too.
        whole = {**self._shell, "status": "completed", "output": self._output, "usage": usage}
        return begun + closed + self._event("response.completed", response=whole)


def _part(text: str) -> Json:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _named(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\n".encode() + data_event({"type": kind, **fields})
