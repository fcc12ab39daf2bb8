"""A request's id, its line in the log, and what of it passes through."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from libmesh_node.http.api import request_id
from libmesh_node.logs import JsonFormatter
from libmesh_node.snapshot import Model, Server

from tests.http.conftest import Llama, Node, call, running_node

pytestmark = pytest.mark.llama

BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "stream": True}


def test_client_may_name_its_request(two_models: Node) -> None:
    port = two_models.api_port
    for path, body in (("/v1/completions", BODY), ("/v1/models", None)):
        method = "GET" if body is None else "POST"
        _, headers, _ = call(port, method, path, body, headers={"X-Request-Id": "mine-1"})
        assert headers["x-request-id"] == "mine-1"


def test_every_answer_has_an_id_of_its_own(two_models: Node) -> None:
    port = two_models.api_port
    asked = (
        ("GET", "/v1/models"),
        ("GET", "/v1/models/nope"),
        ("PUT", "/x"),
        ("OPTIONS", "/v1/models"),
        ("GET", "/health"),
    )
    ids = {call(port, method, path)[1]["x-request-id"] for method, path in asked}
    assert len(ids) == len(asked)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/models/nope", None, 404),
        ("OPTIONS", "/v1/models", None, 204),
        ("PUT", "/x", None, 405),
        ("POST", "/v1/completions", BODY | {"model": "nope"}, 404),
        ("POST", "/v1/completions", BODY | {"model": "auto", "tools": [{"type": "function"}]}, 400),
    ],
)
def test_answer_that_no_server_gave_names_this_node_and_nobody_tried(
    two_models: Node, method: str, path: str, body: object, status: int
) -> None:
    said, headers, _ = call(two_models.api_port, method, path, body)
    assert (said, headers["x-libmesh-attempts"]) == (status, "0")
    assert headers["x-libmesh-node"] == two_models.bridge.snapshot.node_id


def test_page_may_read_the_id(two_models: Node) -> None:
    _, headers, _ = call(two_models.api_port, "GET", "/v1/models", headers={"Origin": "http://localhost:1"})
    assert "X-Request-Id" in headers["access-control-expose-headers"]


@pytest.mark.parametrize("asked", ["", "a b", "x" * 129, "a\x1b[2J", "é"])
def test_name_that_garbles_a_log_is_replaced(asked: str) -> None:
    assert request_id(asked).startswith("req-")
    assert request_id(asked) != request_id(asked)


def test_log_line_tells_all_of_a_request(llamas: dict[str, Llama], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "libmesh_node.http.access")
    with running_node(llamas["tiny"].served()) as node:
        call(node.api_port, "POST", "/v1/completions", BODY, headers={"X-Request-Id": "mine-2"})
    (record,) = [each for each in caplog.records if each.name == "libmesh_node.http.access"]
    assert record.getMessage().startswith("POST /v1/completions 200 ")
    assert record.getMessage().endswith(" model=tiny node=peer-a attempts=1 id=mine-2")
    line = json.loads(JsonFormatter().format(record))
    assert (line["id"], line["status"], line["model"], line["tokens"]) == ("mine-2", 200, "tiny", 4)
    assert 0 < line["first_byte_seconds"] <= line["seconds"]
    assert line["received"] > 0


@contextmanager
def compressing_server(body: bytes) -> Iterator[tuple[Server, list[bytes]]]:
    """Answers one request with `body` in gzip, as llama-server behind a compressing front does; keeps what was asked."""
    asked: list[bytes] = []
    packed = gzip.compress(body)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as opened:
                while b"\r\n\r\n" not in b"".join(asked):
                    asked.append(opened.recv(1 << 16))
                opened.sendall(head.encode() + packed)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        port = listening.getsockname()[1]
        yield Server(peer="packer", base_url=f"http://127.0.0.1:{port}", local=True), asked
        thread.join(60)


def test_gzip_passes_through_as_it_is() -> None:
    body = b'{"text": "' + b"again and " * 500 + b'"}'
    with compressing_server(body) as (server, asked):
        model = Model(name="m", digest="d", size_bytes=1, context_length=1, servers=(server,))
        with running_node(model) as node:
            status, headers, got = call(
                node.api_port, "GET", "/props?model=m", headers={"Accept-Encoding": "gzip"}
            )
    assert status == 200
    assert headers["content-encoding"] == "gzip"
    assert len(got) < len(body)
    assert gzip.decompress(got) == body
    assert b"accept-encoding: gzip" in b"".join(asked).lower()
