"""Servers that live, and say nothing, or nothing but comments: before their first event, and in the middle of an answer."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from libmesh_node.http import balance, proxy, upstream
from libmesh_node.http.sse import comment, skip_comments
from libmesh_node.snapshot import Server

from tests.http.conftest import call, running_node
from tests.http.test_dying import HEAD, PATH, STREAM, WHOLE, chunk, event, model, scripts, sockets_served

TOOLS = STREAM | {"tools": [{"type": "function"}]}
SURE = TOOLS | {"temperature": 0}


@contextmanager
def hanging_server(start: bytes, *, pings: bool) -> Iterator[Server]:
    """Begins each answer with `start`, and then sends a comment every 20 ms or nothing until the end. It is asked first."""
    ended = threading.Event()

    def serve(accepted: socket.socket) -> None:
        if not accepted.recv(1 << 16):
            return
        accepted.sendall(start)
        while not ended.wait(0.02):
            if pings:
                accepted.sendall(chunk(comment("")))

    with sockets_served("hanging", serve) as server:
        try:
            yield server
        finally:
            ended.set()


def test_comments_are_not_taken_for_a_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "FIRST_BYTE", 0.05)
    monkeypatch.setattr(balance, "DOUBT", 0.0)
    monkeypatch.setattr(proxy, "LOOK", 0.05)
    with (
        hanging_server(HEAD, pings=True) as hanging,
        scripts(second=[WHOLE]) as (good,),
        running_node(replace(model(good), servers=(hanging, good.server))) as node,
    ):
        status, headers, body = call(node.api_port, "POST", PATH, STREAM)
    assert (status, headers["x-libmesh-node"], headers["x-libmesh-attempts"]) == (200, "second", "2")
    assert b"Hello" in body


@pytest.mark.parametrize("pings", [False, True])
def test_server_that_hangs_in_the_middle_is_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch, pings: bool
) -> None:
    """What another one can give again, goes on; of the rest the client is told."""
    monkeypatch.setattr(upstream, "ONLY_COMMENTS" if pings else "STALL", 0.5)
    with (
        hanging_server(HEAD + chunk(event("Hello")), pings=pings) as hanging,
        scripts(second=[WHOLE]) as (good,),
        running_node(replace(model(good), servers=(hanging,))) as node,
    ):
        with pytest.raises(http.client.IncompleteRead) as caught:
            call(node.api_port, "POST", PATH, TOOLS)
        node.publish(replace(model(good), servers=(hanging, good.server)))
        whole = call(node.api_port, "POST", PATH, SURE)[2]
    assert caught.value.partial.count(b'"error"') == 1
    assert (whole.count(b"Hello"), whole.count(b"[DONE]"), whole.count(b'"error"')) == (1, 1, 0)


def test_comments_before_the_first_event_are_skipped_and_no_others() -> None:
    assert skip_comments(b":\n\n: x\n\ndata: 1\n\n:\n\n") == b"data: 1\n\n:\n\n"
    assert skip_comments(b":\n\n: not yet") == b": not yet"
    assert skip_comments(b"") == b""
