"""Wherever a stream breaks off, and however often: the client reads what an unbroken one would have said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http.plain import track
from libmesh_node.http.retelling import Diverged
from libmesh_node.http.sse import MAX_EVENT, EventReader, EventTooLong, comment, data_event, event_data
from libmesh_node.http.transcript import BrokenOff, Transcript
from libmesh_node.http.voices import DONE

Json = dict[str, Any]

CHAT = "/v1/chat/completions"
ASK: Json = {
    "stream": True,
    "temperature": 0,
    "messages": [{"role": "user", "content": "Hi"}],
    "stream_options": {"include_usage": True},
}
SHELL = {"created": 1, "id": "chatcmpl-1", "model": "demo", "object": "chat.completion.chunk"}

HALVES = "é".encode()
VOCABULARY: list[str | bytes] = ["a", " b", "c d", "\n", HALVES[:1], HALVES[1:], "end", '"', "data:"]
PROMPT_TOKENS = 7


def asked(**changes: object) -> Transcript:
    transcript = track(CHAT, ASK | changes)
    assert transcript is not None
    return transcript


class Llama:
    """What llama-server would send for a given generation: of a character in halves it tells the last token only."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def chat(self) -> list[bytes]:
        events = [chunk({"role": "assistant", "content": None})]
        for token, text in self._said(self.tokens):
            told = {"id": token, "token": text, "bytes": list(text.encode()), "prob": 1.0, "top_probs": []}
            events.append(chunk({"content": text}, logprobs={"content": [told]}))
        usage = self._usage(len(self.tokens))
        return [
            *events,
            chunk({}, finish_reason="stop"),
            data_event({"choices": [], **SHELL, "usage": usage}),
            DONE,
        ]

    def completion(self, body: bytes) -> list[bytes]:
        asked = json.loads(body)
        known = asked["prompt"][1:]
        assert known == self.tokens[: len(known)]
        left = self.tokens[len(known) :]
        if "n_predict" in asked:
            left = left[: asked["n_predict"]]
        evaluated = PROMPT_TOKENS + len(known)
        events, count = [], 0
        for token, text in self._said(left):
            count = self._count(left, count, token)
            events.append(
                native(content=text, tokens=[token], tokens_predicted=count, tokens_evaluated=evaluated)
            )
        ended = "limit" if "n_predict" in asked else "eos"
        last: Json = {
            "stop": True,
            "stop_type": ended,
            "tokens_predicted": len(left),
            "tokens_evaluated": evaluated,
        }
        return [*events, native(content="", tokens=[], **last)]

    @staticmethod
    def _count(tokens: list[int], before: int, token: int) -> int:
        return next(i + 1 for i in range(before, len(tokens)) if tokens[i] == token)

    @staticmethod
    def _said(tokens: list[int]) -> list[tuple[int, str]]:
        said, held = [], b""
        for token in tokens:
            held += piece(token)
            try:
                said.append((token, held.decode()))
            except UnicodeDecodeError:
                continue
            held = b""
        return said

    @staticmethod
    def _usage(count: int) -> Json:
        return {
            "completion_tokens": count,
            "prompt_tokens": PROMPT_TOKENS,
            "total_tokens": PROMPT_TOKENS + count,
        }


def chunk(delta: Json, finish_reason: str | None = None, **more: object) -> bytes:
    return data_event(
        {"choices": [{"finish_reason": finish_reason, "index": 0, "delta": delta, **more}], **SHELL}
    )


def native(**fields: object) -> bytes:
    return data_event({"index": 0, "stop": False, **fields})


def piece(token: int) -> bytes:
    spelled = VOCABULARY[token]
    return spelled if isinstance(spelled, bytes) else spelled.encode()


def spelled(transcript: Transcript) -> dict[str, tuple[list[int], str]]:
    """What a tokeniser says that knows `é` as the two tokens it was made of, once it has said what the tokens spell."""
    transcript.doubt([told for told in transcript.told if b"".join(map(piece, told[0])) != told[1].encode()])
    known = {"é": ([4, 5], "é")}
    return {text: known.get(text, ([], "")) for text in transcript.gaps}


def read(sent: bytes) -> tuple[str, list[str], Json | None, bytes]:
    """The text, finish reasons, usage and ids that a client finds in a stream."""
    text, reasons, usage, ids = "", [], None, set()
    roles = 0
    for event in EventReader().feed(sent):
        data = event_data(event)
        if not data or data == b"[DONE]":
            continue
        value = json.loads(data)
        ids.add(value["id"])
        usage = value.get("usage") or usage
        for choice in value["choices"]:
            roles += "role" in choice["delta"]
            text += choice["delta"].get("content") or ""
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            assert "logprobs" not in choice
    assert len(ids) == roles == 1
    return text, reasons, usage, sent[-len(DONE) :]


characters = st.one_of(st.sampled_from([0, 1, 2, 3, 6, 7, 8]).map(lambda token: [token]), st.just([4, 5]))
generations = st.lists(characters, min_size=1, max_size=12).map(
    lambda parts: [t for part in parts for t in part]
)


@given(generations, st.lists(st.integers(1, 400), max_size=4), st.integers(1, 60))
def test_broken_anywhere_any_number_of_times_it_reads_as_if_unbroken(
    tokens: list[int], cuts: list[int], size: int
) -> None:
    llama, transcript = Llama(tokens), asked()
    stream, sent = b"".join(llama.chat()), b""
    for cut in cuts:
        for start in range(0, len(stream[:cut]), size):
            sent += transcript.feed(stream[:cut][start : start + size])
        if transcript.finished:
            break
        if transcript.can_resume:
            stream = b"".join(llama.completion(transcript.resume("prompt", spelled(transcript))))
        else:
            assert sent == b""
            transcript = asked()
    if not transcript.finished:
        sent += transcript.feed(stream)
    assert transcript.finished
    whole = read(asked().feed(b"".join(llama.chat())))
    text, reasons, usage, end = read(sent)
    assert text == whole[0]
    assert (usage, end) == whole[2:]
    assert reasons in (["stop"], ["length"])
    assert len(reasons) == 1


def test_first_server_is_asked_for_tokens_and_the_client_sees_none() -> None:
    transcript = asked()
    assert json.loads(transcript.body) == ASK | {"n_probs": 1, "post_sampling_probs": True}
    sent = transcript.feed(b"".join(Llama([0, 1]).chat()))
    assert b"logprobs" not in sent


def test_limit_of_tokens_counts_those_of_all_servers() -> None:
    llama, transcript = Llama([0, 1, 2, 3]), asked(max_tokens=4)
    transcript.feed(b"".join(llama.chat()[:4]))
    body = json.loads(transcript.resume("prompt", {}))
    assert body["prompt"] == ["prompt", 0, 1, 2]
    assert body["n_predict"] == 1
    assert "max_tokens" not in body


def test_text_that_was_ended_is_not_gone_on_with() -> None:
    llama, transcript = Llama([0, 1]), asked()
    sent = transcript.feed(b"".join(llama.chat()[:4]))
    again = transcript.resume("prompt", {})
    assert json.loads(again)["n_predict"] == 0
    sent += transcript.feed(b"".join(llama.completion(again)))
    assert read(sent)[:2] == ("a b", ["stop"])


def test_gap_that_cannot_be_spelled_is_generated_again_and_compared() -> None:
    llama, transcript = Llama([0, 4, 5, 1]), asked()
    sent = transcript.feed(b"".join(llama.chat()[:4]))
    spelled(transcript)
    body = transcript.resume("prompt", {"é": ([9], " é")})
    assert json.loads(body)["prompt"] == ["prompt", 0]
    sent += transcript.feed(b"".join(llama.completion(body)))
    assert read(sent)[0] == "aé b"


def test_spelling_that_does_not_end_with_the_token_that_was_told_is_not_believed() -> None:
    transcript = asked()
    transcript.feed(b"".join(Llama([0, 4, 5, 1]).chat()[:4]))
    spelled(transcript)
    assert json.loads(transcript.resume("prompt", {"é": ([9], "é")}))["prompt"] == ["prompt", 0]


def told(text: str | None, token: int, **more: object) -> bytes:
    return chunk({"content": text, **more}, logprobs={"content": [{"id": token, "bytes": []}]})


def test_token_whose_text_was_held_back_is_known_where_it_was_told() -> None:
    """As of the first one, with which the role comes: it may be the beginning of a stop string."""
    transcript = asked()
    transcript.feed(told(None, 0, role="assistant") + told("a b", 1))
    assert transcript.told == [((0, 1), "a b")]
    body = transcript.resume("prompt", spelled(transcript))
    assert json.loads(body)["prompt"] == ["prompt", 0, 1]


def test_server_that_generates_something_else_is_found_out() -> None:
    transcript = asked()
    transcript.feed(b"".join(Llama([0, 4, 5]).chat()[:3]))
    spelled(transcript)
    transcript.resume("prompt", {"é": ([9], " é")})
    with pytest.raises(Diverged):
        transcript.feed(native(content="x", tokens=[3], tokens_predicted=1))


def test_text_completion_goes_on_from_a_prompt_of_its_own() -> None:
    request = {"stream": True, "prompt": "Once", "max_tokens": 3}
    transcript = track("/v1/completions", request)
    assert transcript is not None
    told = {"id": 0, "bytes": [97]}
    choice = {"text": "a", "index": 0, "logprobs": {"content": [told]}, "finish_reason": None}
    first = transcript.feed(data_event({"choices": [choice], **SHELL}))
    assert json.loads(event_data(first))["choices"][0]["logprobs"] is None
    assert transcript.template_request is None
    body = transcript.resume("", {})
    assert json.loads(body)["prompt"] == ["Once", 0]
    sent = transcript.feed(native(content=" b", tokens=[1], tokens_predicted=1))
    assert json.loads(event_data(sent))["choices"] == [
        {"text": " b", "index": 0, "logprobs": None, "finish_reason": None}
    ]


def test_prompt_of_tokens_stays_one() -> None:
    request = {"stream": True, "prompt": [1, 2, 3]}
    transcript = track("/v1/completions", request)
    assert transcript is not None
    assert json.loads(transcript.resume("", {}))["prompt"] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"type": "function"}]},
        {"n": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"grammar": "root ::= [a-z]"},
        {"stream": False},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        {"messages": None},
    ],
)
def test_requests_with_which_nothing_is_provable_are_left_as_they_are(changes: Json) -> None:
    assert track(CHAT, ASK | changes) is None


@pytest.mark.parametrize(
    "changes",
    [{"tools": []}, {"n": 1}, {"logprobs": False}, {"response_format": {"type": "text"}}, {"tools": None}],
)
def test_fields_that_change_nothing_do_no_harm(changes: Json) -> None:
    assert track(CHAT, ASK | changes) is not None


def test_other_endpoints_are_left_as_they_are() -> None:
    assert track("/v1/embeddings", ASK) is None


@pytest.mark.parametrize(
    "data", [b"data: {\n\n", b"data: 5\n\n", b'data: {"error":{"message":"lost a worker"}}\n\n']
)
def test_error_in_mid_stream_is_a_break(data: bytes) -> None:
    with pytest.raises(BrokenOff):
        asked().feed(data)


def test_comments_pass() -> None:
    assert asked().feed(comment("still here")) == b": still here\n\n"


def test_events_end_at_blank_lines_of_every_kind() -> None:
    assert EventReader().feed(b"data: 1\r\n\r\ndata: 2\n\ndata: 3") == [b"data: 1\r\n\r\n", b"data: 2\n\n"]
    assert event_data(b"event: x\ndata: 1\ndata:2\n\n") == b"1\n2"


def test_event_without_end_is_given_up() -> None:
    with pytest.raises(EventTooLong):
        EventReader().feed(b"x" * (MAX_EVENT + 1))


# ── what lying or dying servers send ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "garbage",
    [
        {"choices": [5]},
        {"choices": 7},
        {"choices": [{"delta": 3}]},
        {"choices": [{"delta": {"content": 3}}]},
        {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [{"bytes": [97], "id": "1"}]}}]},
        {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [{"bytes": [97], "id": [1]}]}}]},
        {"choices": [{"delta": {"content": "a"}, "logprobs": 4}]},
    ],
)
def test_event_of_no_protocol_breaks_the_answer_off(garbage: Json) -> None:
    with pytest.raises(BrokenOff):
        asked().feed(data_event(garbage))


@pytest.mark.parametrize("data", [b"[" * 100_000, b"{", b"\xff"])
def test_event_that_cannot_be_read_breaks_the_answer_off(data: bytes) -> None:
    with pytest.raises(BrokenOff):
        asked().feed(b"data: " + data + b"\n\n")


def test_number_where_bytes_belong_takes_no_memory() -> None:
    liar = {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [{"bytes": 10**13, "id": 1}]}}]}
    assert b'"a"' in asked().feed(data_event(liar))


def test_events_before_a_bad_one_are_passed_on_first() -> None:
    transcript = asked()
    good = {**SHELL, "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
    assert b'"a"' in transcript.feed(data_event(good) + data_event({"error": {"message": "dying"}}))
    with pytest.raises(BrokenOff, match="dying"):
        transcript.feed(b"")


def test_answer_that_has_not_begun_begins_anew_without_the_rest_of_an_event() -> None:
    transcript = asked()
    assert transcript.feed(comment("patience") + b'data: {"choi') == comment("patience")
    assert not transcript.begun
    assert transcript.restart() == transcript.body
    good = {**SHELL, "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
    assert b'"a"' in transcript.feed(data_event(good))


def test_half_a_character_passes_both_ways() -> None:
    transcript = track(CHAT, ASK | {"messages": [{"role": "user", "content": "\ud83d"}]})
    assert transcript is not None
    assert rb"\ud83d" in transcript.body
    assert rb"\ud83d" in transcript.feed(
        rb'data: {"id":"1","choices":[{"delta":{"content":"\ud83d"}}]}' + b"\n\n"
    )
