"""What a client was sent of one streamed answer, so that another server of the same weights can go on with it. Pure.

A language model's state after n tokens is a function of the prompt and those n tokens. So a stream that broke off is
continued by a completion whose prompt is the first one's and then the very tokens that were generated: with temperature
0 the joined text is that of an unbroken run. To know the tokens and not only their text, the server is asked for token
probabilities, of which its events then carry the ids; they are taken out again before the client sees them. An event tells one
token, and its text may be that of several: of the bytes of one character, or of what might have become a stop string
(llama.cpp, tools/server: `process_token`). So the next server is asked what the tokens spell before it goes on with them. Plain
talk in other protocols than OpenAI's completions is put into these and back (`dialects.py`, `voices.py`).

Where this is not provably right, nothing is continued: answers to requests that ask for more than text (`plain.py`), and
answers with reasoning, whose marks' tokens are not told. Some of these can be given again from their beginning (`replay.py`,
`retelling.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from libmesh_node.http.retelling import Diverged, Retelling
from libmesh_node.http.sse import EventReader, decode_json, encode_json, event_data
from libmesh_node.http.voices import Chunks, Voice

Json = dict[str, Any]

_ONLY_CHAT = ("messages", "stream_options", "max_tokens", "max_completion_tokens", "n_predict", "n_probs")


class BrokenOff(Exception):
    """The server's answer ended before it was complete."""


Told = tuple[tuple[int, ...], str]
"""Tokens as a server told them, and the text that came with the last of them."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Text of which not all tokens are known: at most the `last`."""

    text: str
    last: int | None = None


class KeptAnswer(ABC):
    """One streamed answer: `feed` it what servers send, and pass on what it returns.

    Attributes:
        endpoint: where a server is asked for it, if that is another path than the client's.
        finished: the answer is complete; nothing that comes after is missed.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = endpoint
        self.finished = False
        self._hear_another()

    def _hear_another(self) -> None:
        """What is fed next is another server's, from its beginning."""
        self._reader = EventReader()
        self._failure: BrokenOff | Diverged | None = None

    def feed(self, data: bytes) -> bytes:
        """What of `data` the client is to be sent: whole events only.

        Raises `BrokenOff` if the server itself says that it cannot go on, `Diverged`, and `sse.EventTooLong`; but where
        good events came before, these are returned, and it is the next call that raises. So call it once more with
        nothing.
        """
        if self._failure is not None:
            raise self._failure
        sent: list[bytes] = []
        for event in self._reader.feed(data):
            if self.finished:
                break
            try:
                sent.append(self._event(event))
            except (BrokenOff, Diverged) as exc:
                self._failure = exc
                if not any(sent):
                    raise
                break
        return b"".join(sent)

    @abstractmethod
    def _event(self, event: bytes) -> bytes:
        """What of one event the client is to be sent. Raises `BrokenOff` and `Diverged`."""


class Transcript(KeptAnswer):
    """An answer that another server goes on with where it broke off."""

    def __init__(
        self, request: Json, *, chat: bool, voice: Voice | None = None, endpoint: str | None = None
    ) -> None:
        super().__init__(endpoint)
        self._request, self._chat = request, chat
        self._voice = voice or Chunks()
        self._parts: list[int | Told | Gap] = []
        self._untold: list[int] = []  # tokens that came without text, since some came
        self._ends: list[int] = []  # characters of `_text` after each part
        self._text = self._thought = ""
        self._shell: Json = {}  # of the first event: id, created, model and so on
        self._strange = self._tangled = False  # not only text; not even reasoning and then text
        self._again: Retelling | None = None
        self._stopped = False
        self._resumed: _Resumed | None = None

    # ── what goes to servers ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def body(self) -> bytes:
        """The request for the first server, which asks for the tokens, too."""
        timed = {"timings_per_token": True} if self._voice.timed else {}
        return encode_json({**self._request, **timed, "n_probs": 1, "post_sampling_probs": True})

    @property
    def begun(self) -> bool:
        """Whether an event was passed on; comments count for nothing."""
        return bool(self._shell)

    @property
    def can_resume(self) -> bool:
        """Whether another server may go on from here, or from the beginning."""
        return self.begun and not (
            self._strange and (self._tangled or not self._chat or not self._is_certain)
        )

    @property
    def starts_over(self) -> bool:
        """Whether it must give the whole answer: nothing was sent, or its tokens are not known."""
        return not self.begun or self._strange

    @property
    def template_request(self) -> bytes | None:
        """The body for `/apply-template`, whose answer is the prompt; `None` if the request itself has the prompt."""
        return encode_json(self._request) if self._chat else None

    @property
    def told(self) -> list[Told]:
        """What is to be asked of the next server: whether these tokens spell these texts. Each once."""
        return list(dict.fromkeys(part for part in self._parts if isinstance(part, tuple)))

    def doubt(self, wrong: Collection[Told]) -> None:
        """Of what was `told`, these tokens spell something else: others came before them, whose text was held back.

        Or a token was told whose text the client has not been sent: a mark, of thinking or of a channel. So ask for `starts_over`
        and `can_resume` again.
        """
        self._strange = self._strange or any(len(tokens) > 1 for tokens, _ in wrong)
        self._parts = [
            Gap(part[1], part[0][-1]) if isinstance(part, tuple) and part in wrong else part
            for part in self._parts
        ]

    @property
    def gaps(self) -> tuple[str, ...]:
        """Texts to have tokenised for `resume`."""
        return tuple(part.text for part in self._parts if isinstance(part, Gap))

    def restart(self) -> bytes:
        """The body for another server's whole answer. Only if it `starts_over`."""
        if self.begun:
            self._again, self._resumed = Retelling(self._thought, self._text), None
            self._parts, self._ends, self._untold = [], [], []
        self._hear_another()
        return self.body

    def resume(self, prompt: str, spelled: Mapping[str, tuple[list[int], str]]) -> bytes:
        """The body for the next server's `/completion`.

        Args:
            prompt: from `/apply-template`; ignored if the request has its own.
            spelled: for each of `gaps` its tokens, and the text that these spell.
        """
        tokens: list[int] = []
        kept = len(self._parts)
        for index, part in enumerate(self._parts):
            if isinstance(part, int):
                tokens.append(part)
                continue
            if isinstance(part, tuple):
                tokens += part[0]
                continue
            ids, text = spelled[part.text]
            is_sure = text == part.text and part.last in (None, *ids[-1:])
            if not is_sure and self._is_greedy:
                kept = index  # from here it is generated once more, and held against what was sent
                break
            tokens += ids
        known = self._ends[kept - 1] if kept else 0
        self._resumed = _Resumed(base=len(tokens), repeated=self._text[known:])
        self._parts = list(tokens)
        self._ends = [known] * len(tokens)
        self._untold = []
        self._hear_another()
        head = prompt if self._chat else self._request["prompt"]
        body = {key: value for key, value in self._request.items() if key not in _ONLY_CHAT}
        body["prompt"] = [*([head] if isinstance(head, str) else head), *tokens]
        body["return_tokens"] = True
        limit = 0 if self._stopped else self._limit
        if limit is not None:
            body["n_predict"] = max(limit - len(tokens), 0)
        return encode_json(body)

    @property
    def _is_greedy(self) -> bool:
        return self._request.get("temperature") == 0

    @property
    def _is_certain(self) -> bool:
        seed = self._request.get("seed")
        return self._is_greedy or (type(seed) is int and seed >= 0)

    @property
    def _limit(self) -> int | None:
        for key in ("max_completion_tokens", "max_tokens", "n_predict"):
            value = self._request.get(key)
            if isinstance(value, int) and value >= 0:
                return value
        return None

    # ── what comes from servers ──────────────────────────────────────────────────────────────────────────────────

    def _event(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data:
            return event
        if data == b"[DONE]":
            if self._again is not None:
                self._again.end()
            self.finished = True
            return self._voice.end()
        try:
            value = decode_json(data)
        except (ValueError, RecursionError):
            raise BrokenOff("it sent an event that is no JSON") from None
        if not isinstance(value, dict):
            raise BrokenOff("it sent an event that is no object")
        if "error" in value and "choices" not in value:
            raise BrokenOff(str(value["error"])[:300])
        try:
            return self._own(value) if self._resumed is None else self._others(value, self._resumed)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise BrokenOff("it sent an event that is none of its protocol") from None

    def _own(self, value: Json) -> bytes:
        """An event of the server that began the answer, or that gives it again."""
        if self._again is not None and not self._is_fresh(value, self._again):
            return b""
        if not self._shell:
            self._shell = {key: value[key] for key in value if key not in ("choices", "usage", "timings")}
        for choice in value.get("choices") or ():
            told = choice.pop("logprobs", None)
            if not self._chat:
                choice["logprobs"] = None
            delta = choice.get("delta") if self._chat else {"content": choice.get("text")}
            self._note(delta or {}, ((told or {}).get("content") or [None])[-1])
            self._stopped = self._stopped or choice.get("finish_reason") is not None
        return self._voice.say(value)

    def _is_fresh(self, value: Json, again: Retelling) -> bool:
        """Whether there is something in an event that the client has not; what it has is taken from it."""
        value |= self._shell
        fresh = "usage" in value
        for choice in value.get("choices") or ():
            fresh = again.trim(choice["delta"]) or fresh
            if choice.get("finish_reason"):
                again.end()
                fresh = fresh or not self._stopped
        return fresh

    def _note(self, delta: Json, told: Json | None) -> None:
        text = delta.get("content")
        if thought := delta.get("reasoning_content"):
            self._strange, self._tangled = True, self._tangled or bool(self._text)
            self._thought += thought
        if delta.get("tool_calls"):
            self._strange = self._tangled = True
        if told is not None:
            part = self._tell(told["id"], text)
            if part is not None and text:
                self._append(part, text)
        elif text:
            self._append(Gap(text), text)

    def _tell(self, token: int, text: str | None) -> Told | None:
        """A token came, and its text if it was not held back. Raises `TypeError`."""
        self._untold.append(token + 0)
        if not text:
            return None
        told, self._untold = (tuple(self._untold), text), []
        return told

    def _append(self, part: Told | Gap, text: str) -> None:
        self._text += text
        self._parts.append(part)
        self._ends.append(len(self._text))

    def _others(self, value: Json, resumed: _Resumed) -> bytes:
        """An event of `/completion`, put as the first server would have said it."""
        text = str(value.get("content") or "")
        count = int(value.get("tokens_predicted") or 0)
        resumed.evaluated = int(value.get("tokens_evaluated") or resumed.evaluated)
        if value.get("stop"):
            tail = self._piece(resumed.fresh(text)) if text else b""
            reason = "length" if value.get("stop_type") == "limit" else "stop"
            resumed.predicted = count
            return tail + self._end(reason)
        told = value.get("tokens") or []
        new = resumed.fresh(text)
        if len(told) == 1 and count == resumed.predicted + 1:
            if (part := self._tell(told[0], text)) is not None:
                self._extend(part, text, new)
        elif text:
            self._untold = []
            self._extend(Gap(text), text, new)
        resumed.predicted = count
        return self._piece(new)

    def _extend(self, part: Told | Gap, text: str, new: str) -> None:
        self._text += new
        self._parts.append(part)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(text))

    def _piece(self, text: str) -> bytes:
        if not text:
            return b""
        if self._chat:
            return self._chunk([{"finish_reason": None, "index": 0, "delta": {"content": text}}])
        return self._chunk([{"text": text, "index": 0, "logprobs": None, "finish_reason": None}])

    def _end(self, reason: str) -> bytes:
        self.finished = True
        end: Json = {"finish_reason": reason, "index": 0}
        if self._chat:
            end["delta"] = {}
        else:
            end |= {"text": "", "logprobs": None}
        # The first server may have ended its text and died before it had said all else.
        events = b"" if self._stopped else self._chunk([end])
        if (self._request.get("stream_options") or {}).get("include_usage") and self._resumed is not None:
            base, predicted = self._resumed.base, self._resumed.predicted
            prompt = max(self._resumed.evaluated - base, 0)
            usage = {
                "completion_tokens": base + predicted,
                "prompt_tokens": prompt,
                "total_tokens": prompt + base + predicted,
            }
            events += self._chunk([], usage=usage)
        return events + self._voice.end()

    def _chunk(self, choices: list[Json], **more: object) -> bytes:
        return self._voice.say({"choices": choices, **self._shell, **more})


@dataclass(slots=True)
class _Resumed:
    """What is counted of the answer of a server that goes on.

    Attributes:
        base: tokens of the answer that were in its prompt.
        repeated: text that it will generate and the client has.
    """

    base: int
    repeated: str
    evaluated: int = 0
    predicted: int = 0

    def fresh(self, text: str) -> str:
        """What of `text` the client has not been sent. Raises `Diverged`."""
        known = min(len(text), len(self.repeated))
        if text[:known] != self.repeated[:known]:
            raise Diverged
        self.repeated = self.repeated[known:]
        return text[known:]
