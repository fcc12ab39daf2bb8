"""Streams whose first byte takes long: their clients are kept, and read what comes as if they had not waited."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
from libmesh_node.http import waiting

from tests.http.conftest import asking, call, read_comments, running_node
from tests.http.test_dying import PATH, PLAIN, STREAM, WHOLE, hesitating_server, model, scripts, whole


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SILENCE", 0.05)
    monkeypatch.setattr(waiting, "SAY_EVERY", 0.05)


def events(body: bytes) -> list[bytes]:
    """What a reader of events makes of it."""
    return [line for line in body.splitlines() if line.startswith(b"data: ")]


@pytest.mark.parametrize("tools", [False, True])
def test_client_of_a_slow_server_is_told_once_why_and_reads_the_whole(tools: bool) -> None:
    told = threading.Event()
    request = STREAM | ({"tools": [{"type": "function"}]} if tools else {})
    with (
        hesitating_server(WHOLE, told) as server,
        running_node(replace(model(), servers=(server,))) as node,
        asking(node.api_port, PATH, request) as answer,
    ):
        body = read_comments(answer, 3)
        told.set()
        body += answer.read()
    headers = answer.headers
    comments = [line for line in body.splitlines() if line.startswith(b":")]
    assert (answer.status, headers["Content-Type"]) == (200, "text/event-stream")
    assert headers["X-Request-Id"]
    assert [line for line in comments if line.strip() != b":"] == [
        b": the server computes the prompt, or others go before"
    ]
    assert (body.count(b"Hello"), len(events(body)), events(body)[-1]) == (1, 3, b"data: [DONE]")


def test_client_that_waited_is_told_who_answers_when_it_is_another_than_the_headers_say() -> None:
    told = threading.Event()
    with (
        hesitating_server(b"", told) as dying,
        scripts(second=[WHOLE]) as (good,),
        running_node(replace(model(), servers=(dying,))) as node,
    ):
        moved = replace(model(), servers=(good.server, dying))
        with asking(node.api_port, PATH, STREAM) as answer:
            body = read_comments(answer, 1)
            node.publish(moved)
            told.set()
            body += answer.read()
    headers = answer.headers
    assert (answer.status, headers["X-Libmesh-Node"], headers["X-Libmesh-Attempts"]) == (200, "hesitant", "1")
    assert b": X-Libmesh-Node: second; X-Libmesh-Attempts: " in body
    assert events(body)[-1] == b"data: [DONE]"


@pytest.mark.parametrize("path", [PATH, "/v1/messages"])
def test_refusal_after_the_wait_is_an_event(path: str) -> None:
    with running_node(model()) as node:
        status, _, body = call(node.api_port, "POST", path, STREAM)
    error = json.loads(events(body)[-1].removeprefix(b"data: "))["error"]
    assert status == 200
    assert error.get("code") == "no_server" or error["type"] == "overloaded_error"
    assert body.startswith(b": no server has room yet; waiting up to 300 s ")


def test_servers_own_refusal_after_the_wait_is_an_event() -> None:
    told = threading.Event()
    refusal = whole("400 Bad Request", b'{"error":{"message":"too long"}}')
    with (
        hesitating_server(refusal, told) as server,
        running_node(replace(model(), servers=(server,))) as node,
        asking(node.api_port, PATH, STREAM) as answer,
    ):
        read_comments(answer, 1)
        told.set()
        body = answer.read()
    assert answer.status == 200
    assert "too long" in json.loads(events(body)[-1].removeprefix(b"data: "))["error"]["message"]


def test_nobody_is_told_anything_who_asked_for_no_stream() -> None:
    with running_node(model()) as node:
        assert call(node.api_port, "POST", PATH, PLAIN)[0] == 503


def test_stream_that_comes_in_time_has_no_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SILENCE", 60.0)
    with scripts(first=[WHOLE]) as (quick,), running_node(model(quick)) as node:
        body = call(node.api_port, "POST", PATH, STREAM)[2]
    assert not any(line.startswith(b":") for line in body.splitlines())
