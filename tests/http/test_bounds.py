"""Each bound of the HTTP side, and what happens when it is reached. The servers here only need to hang."""

from __future__ import annotations

import json
import select
import socket
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest
from libmesh_node.http import api, intake, server
from libmesh_node.http.intake import Intake
from libmesh_node.snapshot import Model, Server

from tests.http.conftest import PATIENCE, Node, call, running_node, wait_until

LIMIT = 64


@pytest.fixture
def silent() -> Iterator[Model]:
    """A model whose server takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Model(
            name="silent",
            digest="",
            size_bytes=0,
            context_length=0,
            servers=(Server(peer="p", base_url=url, local=True, slots=64),),
        )


def request(port: int, body: bytes, *, announced: int | None = None) -> socket.socket:
    opened = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    length = len(body) if announced is None else announced
    opened.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length + body
    )
    return opened


def under_way(node: Node) -> int:
    document = json.loads(call(node.console_port, "GET", "/api/status")[2])
    return int(document["inflight_requests"])


def test_one_connection_too_many_takes_the_place_of_the_oldest_without_a_request(
    monkeypatch: pytest.MonkeyPatch, silent: Model
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", LIMIT)
    with running_node(silent) as node, ExitStack() as stack:
        busy = stack.enter_context(request(node.api_port, b"{}"))
        wait_until(lambda: under_way(node) == 1)
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", node.api_port), timeout=PATIENCE))
            for _ in range(LIMIT - 1)
        ]
        assert call(node.api_port, "GET", "/v1/models")[0] == 200
        assert idle[0].recv(1) == b""
        assert call(node.api_port, "GET", "/v1/models")[0] == 200
        idle[-1].settimeout(0)
        with pytest.raises(BlockingIOError):
            idle[-1].recv(1)
        busy.settimeout(0)
        with pytest.raises(BlockingIOError):
            busy.recv(1)


def test_burst_of_connections_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are accepted in one go are told to the server before the first that it closes is gone."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", LIMIT)
    with running_node() as node, ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection(("127.0.0.1", node.api_port), timeout=PATIENCE))
            for _ in range(300)
        ]

        def still_open() -> int:
            return len(opened) - len(select.select(opened, [], [], 0)[0])

        wait_until(lambda: still_open() <= LIMIT)
        assert call(node.api_port, "GET", "/v1/models")[0] == 200


def test_when_all_connections_have_a_request_the_next_is_told_to_come_back(
    monkeypatch: pytest.MonkeyPatch, silent: Model
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", LIMIT)
    with running_node(silent) as node, ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(request(node.api_port, b"{}"))
        wait_until(lambda: under_way(node) == LIMIT)
        status, headers, body = call(node.api_port, "GET", "/v1/models")
        assert status == 503
        assert headers["retry-after"] == "1"
        assert json.loads(body)["error"]["code"] == "node_busy"
        stack.close()
        wait_until(lambda: under_way(node) == 0)
        assert call(node.api_port, "GET", "/v1/models")[0] == 200


@pytest.mark.parametrize("start", [b"", b"GET /v1/mod", b"GET / HTTP/1.1\r\nX-Slow: "])
def test_connection_without_a_request_is_closed_in_time(
    monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(server, "IDLE_TIMEOUT", 0.1)
    with (
        running_node() as node,
        socket.create_connection(("127.0.0.1", node.api_port), timeout=PATIENCE) as opened,
    ):
        opened.sendall(start)
        assert opened.recv(1) == b""


def test_body_that_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch, silent: Model) -> None:
    monkeypatch.setattr(intake, "SILENCE", 0.1)
    with running_node(silent) as node, request(node.api_port, b"{", announced=100) as opened:
        answer = opened.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_too_slow" in answer


def test_bodies_are_bounded_all_together_and_their_room_is_given_back(
    monkeypatch: pytest.MonkeyPatch, silent: Model
) -> None:
    monkeypatch.setattr(api, "Intake", partial(Intake, limit=1000, total=2500))
    body = b'{"x":"' + b"y" * 990 + b'"}'
    with running_node(silent) as node:
        with request(node.api_port, body), request(node.api_port, body):
            wait_until(lambda: under_way(node) == 2)
            status, headers, answer = call(node.api_port, "POST", "/v1/completions", body)
            assert status == 503
            assert json.loads(answer)["error"]["code"] == "node_busy"
            assert headers["retry-after"] == "1"
            assert call(node.api_port, "POST", "/v1/completions", body + bytes(9))[0] == 413
        wait_until(lambda: under_way(node) == 0)
        with request(node.api_port, body), request(node.api_port, body):
            wait_until(lambda: under_way(node) == 2)


def test_compressed_bomb_is_as_large_as_it_unpacks(silent: Model, caplog: pytest.LogCaptureFixture) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    assert len(bomb) < 1 << 20
    with running_node(silent) as node:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        assert call(node.api_port, "POST", "/v1/completions", bomb, headers)[0] == 413
        assert call(node.api_port, "POST", "/v1/completions", b"no gzip", headers)[0] == 400
        for encoding in ("compress", "br"):
            headers["Content-Encoding"] = encoding
            assert call(node.api_port, "POST", "/v1/completions", b"{}", headers)[0] == 415
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
