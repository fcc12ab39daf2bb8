"""Garbage, floods and half-open connections on every port that a node opens: it serves on."""

from __future__ import annotations

import random
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from tests.node.conftest import Pair
from tests.node.nodes import PATIENCE, Node, chat, dial, p2p_port, peer

pytestmark = [pytest.mark.llama]

HALF_OPEN = 1000

GARBAGE = [
    b"\x00" * 4096,
    b"\xff" * 65536,
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
    b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff\xff" + b"\x01" * 70000,
    b"\x13/multistream/1.0.0\n" * 2000,
    random.Random(7).randbytes(1 << 20),
]


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _ports(node: Node) -> dict[str, int]:
    return {"p2p": p2p_port(node), "api": node.api_port, "console": node.console_port}


def _still_fine(pair: Pair) -> None:
    """Both nodes know each other, neither has fallen over, and a request goes all the way."""
    for node in (pair.server, pair.client):
        assert node.process.poll() is None
        assert "Traceback" not in node.words, node.words
    server_id = pair.server.node_id
    pair.client.until(lambda status: peer(status, server_id).get("state") == "alive", what="still together")
    assert chat(pair.client).status_code == 200
    assert chat(pair.server).status_code == 200


@pytest.mark.parametrize("which", ["p2p", "api", "console"])
def test_garbage_changes_nothing(pair: Pair, which: str) -> None:
    for node in (pair.server, pair.client):
        port = _ports(node)[which]
        for garbage in GARBAGE:
            with suppress(OSError), dial(port) as connection:
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
    _still_fine(pair)


def test_garbage_on_a_model_tunnel_stays_between_it_and_the_server(pair: Pair) -> None:
    """The loopback port of the client node that leads to the other node's llama-server."""
    ports = [
        connection.laddr.port
        for connection in _listeners(pair.client)
        if connection.laddr.port not in _ports(pair.client).values()
    ]
    assert len(ports) >= 1
    for garbage in GARBAGE:
        with suppress(OSError), dial(ports[0]) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
    _still_fine(pair)


def _listeners(node: Node) -> list:  # type: ignore[type-arg]
    import psutil

    connections = psutil.Process(node.pid).net_connections("tcp4")
    return [one for one in connections if one.status == psutil.CONN_LISTEN and one.laddr.ip == "127.0.0.1"]


@pytest.mark.parametrize("announced", [True, False])
def test_body_of_100_megabytes_is_refused(pair: Pair, announced: bool) -> None:
    piece = b'"' + b"x" * ((1 << 20) - 1)

    def body() -> Iterator[bytes]:
        for _ in range(100):
            yield piece

    headers = {"Content-Type": "application/json"} | ({"Content-Length": str(100 << 20)} if announced else {})
    for path in (f"{pair.client.api}/v1/chat/completions", f"{pair.client.console}/api/join"):
        try:
            answer = httpx.post(path, content=body(), headers=headers, timeout=PATIENCE)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            continue  # it was refused while we were still sending
        assert answer.status_code == 413
    _still_fine(pair)


def test_100_megabytes_are_refused_in_so_many_words(pair: Pair) -> None:
    """A client that waits for the answer before it sends gets it in OpenAI's shape."""
    with dial(pair.client.api_port) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 104857600\r\n\r\n"
        )
        answer = b""
        while not answer.endswith(b"}"):
            data = connection.recv(1 << 16)
            assert data
            answer += data
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"error"' in answer
    _still_fine(pair)


@pytest.mark.parametrize(
    "start", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: lo"], ids=["silent", "begun"]
)
@pytest.mark.parametrize("which", ["p2p", "api", "console"])
def test_thousand_half_open_connections_leave_room(pair: Pair, which: str, start: bytes) -> None:
    with ExitStack() as stack:
        port = _ports(pair.server)[which]
        for _ in range(HALF_OPEN):
            with suppress(OSError):
                connection = stack.enter_context(dial(port))
                connection.sendall(start)
        _still_fine(pair)
    _still_fine(pair)
