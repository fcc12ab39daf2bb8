"""Messages and Responses by way of chat completions: which requests, and what their clients read, whole or broken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http.plain import track
from libmesh_node.http.sse import EventReader, data_event, event_data
from libmesh_node.http.transcript import BrokenOff, Transcript
from libmesh_node.http.voices import MessageEvents, ResponseEvents

from tests.http.test_transcript import SHELL, Llama, chunk, generations, spelled

Json = dict[str, Any]

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HELLO: Json = {"role": "user", "content": "Hi"}
ASKS: dict[str, Json] = {
    MESSAGES: {"model": "m", "max_tokens": 99, "stream": True, "messages": [HELLO]},
    RESPONSES: {"model": "m", "max_output_tokens": 99, "stream": True, "input": "Hi"},
}


def tracked(path: str, **changes: object) -> Transcript | None:
    asked = {key: value for key, value in (ASKS[path] | changes).items() if value is not ...}
    return track(path, asked)


def asked(path: str, **changes: object) -> Json:
    transcript = tracked(path, **changes)
    assert transcript is not None
    assert transcript.endpoint == "/v1/chat/completions"
    body: Json = json.loads(transcript.body)
    assert body.pop("stream_options") == {"include_usage": True}
    assert (body.pop("stream"), body.pop("n_probs"), body.pop("post_sampling_probs")) == (True, 1, True)
    return body


def text(*texts: str, kind: str = "text") -> list[Json]:
    return [{"type": kind, "text": one} for one in texts]


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_message_request_becomes_the_chat_that_llama_server_makes_of_it() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}, *text("b")]},
        {"role": "assistant", "content": "c"},
    ]
    body = asked(MESSAGES, system=text("x", "y"), messages=turns, temperature=0, top_k=4, metadata={})
    assert body == {
        "model": "m",
        "max_tokens": 99,
        "temperature": 0,
        "top_k": 4,
        "timings_per_token": True,
        "messages": [
            {"role": "system", "content": "xy"},
            {"role": "user", "content": text("a", "b")},
            {"role": "assistant", "content": "c"},
        ],
    }
    assert asked(MESSAGES, system="x", max_tokens=...)["max_tokens"] == 4096
    assert asked(MESSAGES, tools=[], thinking={"type": "disabled"}, stop_sequences=None)["messages"] == [
        HELLO
    ]


def test_response_request_becomes_the_chat_that_llama_server_makes_of_it() -> None:
    items = [
        {"role": "user", "content": text("a", "b", kind="input_text"), "type": "message"},
        {
            "role": "assistant",
            "type": "message",
            "content": text("c", kind="output_text"),
            "status": "completed",
        },
        {"role": "developer", "content": "d"},
    ]
    body = asked(RESPONSES, instructions="x", input=items, temperature=0, user="u", text={})
    assert body == {
        "model": "m",
        "max_tokens": 99,
        "temperature": 0,
        "user": "u",
        "messages": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": text("a", "b")},
            {"role": "assistant", "content": text("c")},
            {"role": "developer", "content": text("d")},
        ],
    }
    assert asked(RESPONSES)["messages"] == [HELLO]
    assert "max_tokens" not in asked(RESPONSES, max_output_tokens=...)


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"name": "f", "input_schema": {}}]},
        {"thinking": {"type": "enabled", "budget_tokens": 100}},
        {"stop_sequences": ["x"]},
        {"some_new_field": 1},
        {"stream": False},
        {"messages": ...},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        {"messages": [{"role": "user"}]},
        {"messages": ["Hi"]},
        {"system": 5},
        {"system": [{"type": "image"}]},
        {"system": "x-anthropic-billing-header: cch=a5145;"},
    ],
)
def test_message_request_of_more_than_plain_talk_is_left_as_it_is(changes: Json) -> None:
    assert tracked(MESSAGES, **changes) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"type": "function", "name": "f", "parameters": {}}]},
        {"reasoning": {"effort": "high"}},
        {"previous_response_id": "resp_1"},
        {"text": {"format": {"type": "json_schema", "schema": {}}}},
        {"include": ["message.output_text.logprobs"]},
        {"top_logprobs": 2},
        {"instructions": None},
        {"stream": False},
        {"input": ...},
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
        {"input": [{"role": "user", "content": []}]},
        {"input": [{"role": "user", "content": "a", "name": "b"}]},
        {"input": [{"role": "assistant", "content": "a"}]},
        {"input": [{"role": "assistant", "type": "message", "content": "a"}] * 2},
        {"input": ["Hi"]},
    ],
)
def test_response_request_of_more_than_plain_talk_is_left_as_it_is(changes: Json) -> None:
    assert tracked(RESPONSES, **changes) is None


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/v1/responses/input_tokens", "/v1/messages/"])
def test_other_endpoints_of_the_two_protocols_are_left_as_they_are(path: str) -> None:
    body = ASKS[MESSAGES] | ASKS[RESPONSES]
    assert track(path, body) is None


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def events(sent: bytes) -> list[Json]:
    found = []
    for event in EventReader().feed(sent):
        if data := event_data(event):
            value = json.loads(data)
            assert event.startswith(b"event: " + value["type"].encode() + b"\n")
            found.append(value)
    return found


def read_message(sent: bytes) -> Json:
    """What a client makes of the events; fails if they are in no right order."""
    first, *others, delta, stop = events(sent)
    message: Json = first["message"]
    assert (first["type"], message["content"], stop["type"]) == ("message_start", [], "message_stop")
    open_block: int | None = None
    for event in others:
        match event["type"]:
            case "content_block_start":
                assert (open_block, event["index"]) == (None, len(message["content"]))
                open_block = event["index"]
                message["content"].append(event["content_block"])
            case "content_block_delta":
                assert event["index"] == open_block
                for key, value in event["delta"].items():
                    if key != "type":
                        block = message["content"][open_block]
                        block[key] = block.get(key, "") + value
            case "content_block_stop":
                assert event["index"] == open_block
                open_block = None
            case other:
                raise AssertionError(other)
    assert (open_block, delta["type"]) == (None, "message_delta")
    message["usage"] |= delta["usage"]
    return message | delta["delta"]


def read_response(sent: bytes) -> Json:
    found = events(sent)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    items: list[Json] = []
    said: list[str] = []
    for event in found[2:-1]:
        kind = event["type"].removeprefix("response.")
        match kind:
            case "output_item.added":
                assert event["output_index"] == len(items)
                items.append(event["item"])
                said.append("")
                continue
            case "output_text.delta" | "reasoning_text.delta":
                said[-1] += event["delta"]
            case "output_text.done":
                assert event["text"] == said[-1]
            case "content_part.done":
                assert event["part"]["text"] == said[-1]
            case "output_item.done":
                assert event["item"]["content"][0]["text"] == said[-1]
                items[-1] = event["item"]
                assert event["item"]["id"]
        assert event["output_index"] == len(items) - 1
        assert event.get("item_id", items[-1]["id"]) == items[-1]["id"]
    response: Json = found[-1]["response"]
    assert (found[-1]["type"], response["output"]) == ("response.completed", items)
    assert response["id"] == found[0]["response"]["id"]
    return response


READ = {MESSAGES: read_message, RESPONSES: read_response}


def chat(llama: Llama) -> list[bytes]:
    """With the timings that a server tells with each token when it is asked for them."""
    role, *others = llama.chat()
    first = json.loads(event_data(others[0]))
    timed = data_event(first | {"timings": {"cache_n": 2, "prompt_n": 5}})
    return [role, timed, *others[1:]]


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@given(tokens=generations, cuts=st.lists(st.integers(1, 400), max_size=4), size=st.integers(1, 60))
def test_broken_anywhere_any_number_of_times_it_reads_as_if_unbroken(
    path: str, tokens: list[int], cuts: list[int], size: int
) -> None:
    def fresh() -> Transcript:
        transcript = tracked(path)
        assert transcript is not None
        return transcript

    llama, transcript, whole = Llama(tokens), fresh(), fresh().feed(b"".join(chat(Llama(tokens))))
    stream, sent = b"".join(chat(llama)), b""
    for cut in cuts:
        for start in range(0, len(stream[:cut]), size):
            sent += transcript.feed(stream[:cut][start : start + size])
        if transcript.finished:
            break
        if transcript.can_resume:
            stream = b"".join(llama.completion(transcript.resume("prompt", spelled(transcript))))
        else:
            assert sent == b""
            transcript = fresh()
    if not transcript.finished:
        sent += transcript.feed(stream)
    assert transcript.finished
    message, expected = READ[path](sent), READ[path](whole)
    message["stop_reason"] = expected["stop_reason"] = (
        None  # the fake of a server that goes on knows limits only
    )
    assert total(message.pop("usage")) == total(expected.pop("usage"))
    assert message == expected


def total(usage: Json) -> tuple[int, int]:
    """Tokens of the prompt, wherever they came from, and of the answer."""
    return usage["input_tokens"] + usage.get("cache_read_input_tokens", 0), usage["output_tokens"]


def test_message_tells_at_its_beginning_how_long_the_prompt_is_and_why_it_ended() -> None:
    transcript = tracked(MESSAGES)
    assert transcript is not None
    role, *others = chat(Llama([0, 1]))
    assert transcript.feed(role) == b""
    start = events(transcript.feed(others[0]))[0]["message"]
    assert start["usage"] == {"cache_read_input_tokens": 2, "input_tokens": 5, "output_tokens": 0}
    assert start["id"] == SHELL["id"]
    ending = events(transcript.feed(others[1] + chunk({}, finish_reason="length") + b"data: [DONE]\n\n"))
    assert ending[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_answer_without_a_word_is_well_formed(path: str) -> None:
    transcript = tracked(path)
    assert transcript is not None
    empty = READ[path](transcript.feed(chunk({}, finish_reason="stop") + b"data: [DONE]\n\n"))
    assert empty.get("content", empty.get("output")) == []


@pytest.mark.parametrize(("path", "kind"), [(MESSAGES, "thinking"), (RESPONSES, "reasoning")])
def test_thinking_goes_before_the_text_and_is_not_gone_on_with(path: str, kind: str) -> None:
    transcript = tracked(path)
    assert transcript is not None
    said = [chunk({"reasoning_content": "hm"}), chunk({"content": "So"}), chunk({"content": "."})]
    sent = transcript.feed(b"".join(said))
    assert not transcript.can_resume
    answer = READ[path](sent + transcript.feed(chunk({}, finish_reason="stop") + b"data: [DONE]\n\n"))
    blocks = answer.get("content") or answer["output"]
    assert [block["type"] for block in blocks] == [kind, "text" if path == MESSAGES else "message"]


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("delta", [{"tool_calls": [{"index": 0}]}, {"content": 5}, {"content": ["a"]}, 5])
def test_what_is_no_talk_breaks_the_answer_off(path: str, delta: Any) -> None:
    transcript = tracked(path)
    assert transcript is not None
    with pytest.raises(BrokenOff):
        transcript.feed(chunk(delta))


@pytest.mark.parametrize("kind", [MessageEvents, ResponseEvents])
@pytest.mark.parametrize(
    "usage", [5, [], {"prompt_tokens": "x"}, {"prompt_tokens_details": 5}, {"completion_tokens": None}]
)
def test_answer_ends_whatever_a_server_says_of_its_usage(
    kind: type[MessageEvents | ResponseEvents], usage: object
) -> None:
    voice = kind()
    voice.say({"choices": [], "usage": usage, "timings": usage})
    assert events(voice.end())[-1]["type"] in ("message_stop", "response.completed")
