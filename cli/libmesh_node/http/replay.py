"""A streamed answer that no server can go on with from its middle, and that one can give again from its beginning. Pure.

Tool calls, constrained grammars, probabilities, pictures: a server that were to go on with such an answer would need a state
that is not told to anybody (`transcript.py`). But where the request leaves nothing to chance, by temperature 0 or by a seed,
another server with the same weights generates the same events. So it is asked for the whole answer, each event is held against
what the client has, and only what comes after is passed on. If one differs, the answer ends with an error, as it would have at
once: what is passed on is never a guess. It takes as long as the answer had taken until then, as the client's own retry would.

Events differ in what a server makes up: ids, which are replaced by those that the client knows, and times, which are not.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

from libmesh_node.http.plain import track
from libmesh_node.http.retelling import Diverged
from libmesh_node.http.sse import data_event, decode_json, event_data
from libmesh_node.http.transcript import BrokenOff, KeptAnswer, Transcript

Json = dict[str, Any]

PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/responses",
    }
)

MAX_EVENTS = 65_536
"""Events of which an answer may consist to be given again: some 16 MB to remember. A longer one ends with an error."""

_OWN = frozenset(
    {
        *("created", "created_at", "completed_at", "system_fingerprint", "timings", "usage"),
        *("logprob", "prob", "top_logprobs", "top_probs", "prompt_progress"),
    }
)
"""Fields in which servers of the same weights differ: of the moment, of their caches, and of how they round."""

_NAMES = frozenset({"id", "item_id", "call_id"})
_LAST = frozenset({"message_stop", "response.completed", "response.incomplete", "response.failed"})
_SEVERAL = ("n", "n_cmpl", "best_of")


class Replay(KeptAnswer):
    """An answer that another server gives once more; what the client has already is not returned again.

    Attributes:
        body: the request for every server.
    """

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.body = body
        self._sent: list[tuple[bytes, tuple[str, ...]]] = []
        self._next = 0  # the event of the present server that comes next
        self._known: dict[str, str] = {}  # the present server's names for what the client knows by others

    @property
    def begun(self) -> bool:
        """Whether an event was passed on; comments count for nothing."""
        return bool(self._sent)

    @property
    def can_resume(self) -> bool:
        """Whether another server may give it again."""
        return self.begun and len(self._sent) < MAX_EVENTS

    @property
    def starts_over(self) -> bool:
        """Whether the next server must give the whole answer."""
        return True

    def restart(self) -> bytes:
        """The body for the next server, whose answer is fed from its beginning."""
        self._hear_another()
        self._next, self._known = 0, {}
        return self.body

    def _event(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data:
            return event
        if data == b"[DONE]":
            self._expect_new()
            self.finished = True
            return event
        try:
            value = decode_json(data)
            if not isinstance(value, dict):
                raise TypeError
            if event.startswith(b"event: error") or ("error" in value and "choices" not in value):
                raise BrokenOff(str(value.get("error") or value.get("message"))[:300])
            names: list[str] = []
            shape = json.dumps(_shape(value, names), sort_keys=True).encode()
        except (ValueError, TypeError, RecursionError):
            raise BrokenOff("it sent an event that is none of its protocol") from None
        mark = blake2b(shape, digest_size=16).digest()
        if self._next < len(self._sent):
            self._match(mark, names)
            return b""
        self._next += 1
        if len(self._sent) < MAX_EVENTS:
            self._sent.append((mark, tuple(self._known.get(name, name) for name in names)))
        self.finished = value.get("type") in _LAST
        if not any(name in self._known for name in names):
            return event
        head = b"".join(line + b"\n" for line in event.splitlines() if line.startswith(b"event:"))
        return head + data_event(_renamed(value, self._known))

    def _match(self, mark: bytes, names: list[str]) -> None:
        known, called = self._sent[self._next]
        if mark != known or len(names) != len(called):
            raise Diverged
        self._known.update({own: name for own, name in zip(names, called, strict=True) if own != name})
        self._next += 1

    def _expect_new(self) -> None:
        if self._next < len(self._sent):
            raise Diverged


def follow(path: str, request: Json, body: bytes) -> Transcript | Replay | None:
    """How the streamed answer to `request` is kept, so that another server can take it over; `None` if it cannot.

    `body` is what `request` was read from. Both are kept, and must not be changed any more.
    """
    return track(path, request) or _replay(path, request, body)


def _replay(path: str, request: Json, body: bytes) -> Replay | None:
    if path not in PATHS or request.get("stream") is not True:
        return None
    if any(request.get(key) not in (None, 1) for key in _SEVERAL):  # their events come in any order
        return None
    seed = request.get("seed") if path != "/v1/messages" else None  # there, llama-server leaves it out
    is_seeded = type(seed) is int and seed >= 0
    return Replay(body) if request.get("temperature") == 0 or is_seeded else None


def _shape(value: Any, names: list[str]) -> Any:
    """`value` without what is a server's own; the names in it are appended to `names`."""
    if isinstance(value, list):
        return [_shape(inner, names) for inner in value]
    if not isinstance(value, dict):
        return value
    found: Json = {}
    for key, inner in sorted(value.items()):
        if key in _OWN:
            continue
        if key in _NAMES and isinstance(inner, str):
            names.append(inner)
            inner = None
        found[key] = _shape(inner, names)
    return found


def _renamed(value: Any, known: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(inner, known) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: known.get(inner, inner) if key in _NAMES and isinstance(inner, str) else _renamed(inner, known)
        for key, inner in value.items()
    }
