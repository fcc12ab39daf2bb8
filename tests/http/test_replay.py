"""An answer given again by another server: what the client reads is one answer, or an error, never a guess."""

from __future__ import annotations

import http.client
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http import replay as replaying
from libmesh_node.http.relay import MAX_BARREN
from libmesh_node.http.replay import Replay, follow
from libmesh_node.http.retelling import Diverged
from libmesh_node.http.sse import EventReader, comment, data_event, event_data
from libmesh_node.http.transcript import BrokenOff, Transcript

from tests.http.conftest import Node, call, running_node
from tests.http.test_dying import HEAD, PATH, STREAM, WHOLE, model, scripts
from tests.http.test_dying import chunk as piece
from tests.http.test_dying import event as said

Json = dict[str, Any]

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
ASK: Json = {"stream": True, "temperature": 0, "messages": [{"role": "user", "content": "Hi"}]}
TOOLS: Json = {"tools": [{"type": "function", "function": {"name": "f"}}]}
DONE = b"data: [DONE]\n\n"


def followed(path: str, request: Json) -> Transcript | Replay | None:
    return follow(path, request, json.dumps(request).encode())


def asked(path: str = CHAT, **changes: object) -> Replay:
    found = followed(path, ASK | TOOLS | changes)
    assert isinstance(found, Replay)
    return found


def chat(name: str, words: list[str], calls: int = 1) -> list[bytes]:
    """An answer of the server `name`: words, and then calls, which it gives names of its own."""

    def chunk(delta: Json, reason: str | None = None, **more: object) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return data_event({"id": f"of-{name}", "created": len(name), "choices": [choice], **more})

    said = [
        chunk({"content": word}, logprobs={"content": [{"id": 7, "logprob": len(name)}]}) for word in words
    ]
    for index in range(calls):
        call = {"index": index, "id": f"call-{index}-of-{name}", "function": {"name": "f", "arguments": ""}}
        more = {"index": index, "function": {"arguments": "{}"}}
        said += [chunk({"tool_calls": [call]}), chunk({"tool_calls": [more]})]
    return [chunk({"role": "assistant"}), *said, chunk({}, "tool_calls", usage={"n": len(name)}), DONE]


def names(sent: bytes) -> list[str]:
    return [
        json.loads(data)["id"]
        for e in EventReader().feed(sent)
        if (data := event_data(e)) not in (b"", b"[DONE]")
    ]


def without_own(sent: bytes) -> list[object]:
    """What is left of a stream of this file's servers without their names, times and rounding."""
    found: list[object] = []
    for event in EventReader().feed(sent):
        if (data := event_data(event)) != b"[DONE]":
            value = json.loads(data)
            choice = value["choices"][0]
            text, calls = choice["delta"].get("content"), choice["delta"].get("tool_calls")
            found.append((text, calls and calls[0]["function"], choice["finish_reason"]))
    return found


@given(
    st.lists(st.sampled_from(["a", " b", "c"]), max_size=5),
    st.integers(0, 3),
    st.lists(st.integers(1, 900), max_size=4),
    st.integers(1, 80),
)
def test_broken_anywhere_any_number_of_times_it_reads_as_one_answer(
    words: list[str], calls: int, cuts: list[int], size: int
) -> None:
    answer, sent = asked(), b""
    for number, cut in enumerate([*cuts, 10**6]):
        stream = b"".join(chat(str(number) * (number + 1), words, calls))[:cut]
        for start in range(0, len(stream), size):
            sent += answer.feed(stream[start : start + size])
        if answer.finished:
            break
        assert answer.restart() == answer.body
    assert sent.endswith(DONE)
    assert without_own(sent) == without_own(b"".join(chat("x", words, calls)))
    assert len(set(names(sent))) == 1


def test_name_of_a_call_that_the_client_has_stays_and_a_later_one_is_the_new_servers() -> None:
    answer = asked()
    answer.feed(b"".join(chat("one", ["a"], 2)[:3]))
    answer.restart()
    rest = answer.feed(b"".join(chat("other", ["a"], 2)))
    assert (b"of-one" in rest, b"call-1-of-other" in rest) == (True, True)
    assert b"call-0" not in rest
    assert b'"id":"of-other"' not in rest


def test_events_keep_their_kinds_and_what_refers_to_an_item_knows_it_by_its_name() -> None:
    def stream(name: str) -> list[bytes]:
        added = {"type": "response.output_item.added", "item": {"id": name, "call_id": f"c-{name}"}}
        delta = {"type": "response.function_call_arguments.delta", "item_id": name, "delta": "{"}
        done = {"type": "response.completed", "response": {"output": [{"id": name, "call_id": f"c-{name}"}]}}
        return [f"event: {event['type']}\n".encode() + data_event(event) for event in (added, delta, done)]

    answer = asked("/v1/responses")
    assert answer.feed(stream("one")[0]) == stream("one")[0]
    answer.restart()
    assert answer.feed(b"".join(stream("other"))) == b"".join(stream("one")[1:])
    assert answer.finished


@pytest.mark.parametrize(
    "other",
    [["b"], ["a", "c"], [], ["a"]],
    ids=["another word", "another one later", "nothing", "an early end"],
)
def test_server_that_says_something_else_is_found_out(other: list[str]) -> None:
    answer = asked()
    answer.feed(b"".join(chat("one", ["a", "b"])[:3]))
    answer.restart()
    with pytest.raises(Diverged):
        answer.feed(b"".join(chat("other", other, calls=0)))


def test_early_end_of_the_next_server_is_none_of_the_answer() -> None:
    answer = asked()
    answer.feed(chat("one", ["a"])[0] + chat("one", ["a"])[1])
    answer.restart()
    with pytest.raises(Diverged):
        answer.feed(chat("one", ["a"])[0] + DONE)


@pytest.mark.parametrize(
    "event",
    [
        b"data: {\n\n",
        b"data: 5\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
        b'data: {"error":{"message":"lost a worker"}}\n\n',
        b'event: error\ndata: {"code":500,"message":"lost a worker","type":"server_error"}\n\n',
    ],
)
def test_error_in_mid_stream_is_a_break(event: bytes) -> None:
    answer = asked()
    first = chat("one", ["a"])[0]
    assert answer.feed(first + event) == first
    with pytest.raises(BrokenOff):
        answer.feed(b"")
    assert answer.can_resume


def test_comments_pass_and_are_not_held_against_anybody() -> None:
    answer = asked()
    assert answer.feed(comment("x")) == comment("x")
    assert not answer.begun


def test_answer_of_too_many_events_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "MAX_EVENTS", 3)
    answer = asked()
    for number, event in enumerate(chat("one", ["a"] * 5)[:5]):
        assert answer.feed(event) == event
        assert answer.can_resume is (number < 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.1},
        {"temperature": None},
        {"temperature": 0.5, "seed": -1},
        {"stream": False},
        {"n": 2},
    ],
)
def test_request_that_leaves_something_to_chance_is_left_as_it_is(changes: Json) -> None:
    assert followed(CHAT, ASK | TOOLS | changes) is None


def test_seed_leaves_nothing_to_chance_where_llama_server_takes_it() -> None:
    seeded = {"temperature": 0.5, "seed": 3}
    assert asked(**seeded).body == json.dumps(ASK | TOOLS | seeded).encode()
    assert followed(MESSAGES, ASK | TOOLS | seeded) is None


@pytest.mark.parametrize("path", ["/v1/embeddings", "/completion", "/v1/messages/count_tokens"])
def test_other_endpoints_are_left_as_they_are(path: str) -> None:
    assert followed(path, ASK | TOOLS) is None


def test_what_can_be_gone_on_with_is_not_given_again() -> None:
    assert isinstance(followed(CHAT, ASK), Transcript)


# ── through a node ───────────────────────────────────────────────────────────────────────────────────────────────────

GREEDY: Json = STREAM | TOOLS | {"temperature": 0}
CUT = HEAD + piece(said("Hello"))


def test_client_reads_on_from_another_server_and_nothing_twice() -> None:
    with scripts(first=[CUT], second=[WHOLE]) as (dying, good), running_node(model(dying, good)) as node:
        status, headers, body = call(node.api_port, "POST", PATH, GREEDY)
        metrics = call(node.console_port, "GET", "/metrics")[2]
    assert (status, headers["x-libmesh-node"]) == (200, "first")
    assert (body.count(b"Hello"), body.count(b"data: "), b"error" in body) == (1, 3, False)
    assert body.endswith(DONE)
    assert b"libmesh_streams_resumed_total 1\n" in metrics


def broken_off(node: Node) -> bytes:
    """What a client reads of a stream that has no end."""
    with pytest.raises(http.client.IncompleteRead) as caught:
        call(node.api_port, "POST", PATH, GREEDY)
    return caught.value.partial


def test_client_is_told_if_the_other_server_says_something_else() -> None:
    other = HEAD + piece(said("Howdy")) + piece(DONE) + piece(b"")
    with scripts(first=[CUT], second=[other]) as (dying, liar), running_node(model(dying, liar)) as node:
        body = broken_off(node)
    assert (b"Hello" in body, b"Howdy" in body, b"server_failed" in body) == (True, False, True)


def test_request_that_kills_its_servers_at_the_same_word_does_not_kill_them_all() -> None:
    names = [f"server{index}" for index in range(8)]
    with scripts(**{name: [CUT] for name in names}) as dying, running_node(model(*dying)) as node:
        assert b"server_failed" in broken_off(node)
    assert sum(one.asked for one in dying) == 1 + MAX_BARREN


@pytest.mark.parametrize("digest", ["", "another"])
def test_server_whose_weights_are_others_or_not_known_is_not_asked(digest: str) -> None:
    with scripts(first=[CUT], second=[WHOLE]) as (dying, other):
        servers = (replace(dying.server, digest=digest and "d"), replace(other.server, digest=digest))
        with running_node(replace(model(dying, other), servers=servers)) as node:
            assert b"server_failed" in broken_off(node)
        assert other.asked == 0
