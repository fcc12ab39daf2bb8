"""Which requests are plain talk: another server can go on with the answer in its middle (`transcript.py`). Pure."""

from __future__ import annotations

from typing import Any

from libmesh_node.http.dialects import TRANSLATED, translate
from libmesh_node.http.transcript import Transcript
from libmesh_node.http.voices import Voice

_CHAT = ("/v1/chat/completions", "/chat/completions")
_TEXT = ("/v1/completions",)

_CHANGES_THE_ANSWER = {
    "tools": ([],),
    "functions": ([],),
    "grammar": ("",),
    "json_schema": ({},),
    "response_format": ({"type": "text"},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "n": (1,),
    "n_cmpl": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "lora": ([],),
    "return_progress": (False,),
    "timings_per_token": (False,),
    "return_tokens": (False,),
}
"""Fields with which nothing is continued, and the values at which they change nothing. Null never does."""


def track(path: str, request: dict[str, Any]) -> Transcript | None:
    """A transcript for a request whose answer could be continued; `None` for every other."""
    if path not in _CHAT + _TEXT + TRANSLATED or request.get("stream") is not True:
        return None
    voice: Voice | None = None
    if path in TRANSLATED:
        if (translation := translate(path, request)) is None:
            return None
        request, voice = translation.request, translation.voice
    for key in _CHANGES_THE_ANSWER.keys() & request.keys():
        if request[key] is not None and request[key] not in _CHANGES_THE_ANSWER[key]:
            return None
    chat = path not in _TEXT
    if chat and not _is_plain_talk(request.get("messages")):
        return None
    if not chat and not _is_prompt(request.get("prompt")):
        return None
    return Transcript(request, chat=chat, voice=voice, endpoint=_CHAT[0] if voice else None)


def _is_plain_talk(messages: object) -> bool:
    """Whether messages consist of text: pictures and sound are not part of a rendered prompt."""
    if not isinstance(messages, list):
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else message
        parts = content if isinstance(content, list) else []
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            return False
        if content is not None and not isinstance(content, str | list):
            return False
    return True


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
