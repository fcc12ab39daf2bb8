"""The console's port: what it tells, what it does, and for whom."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from libmesh_node.bridge import CommandFailed
from libmesh_node.http import console
from libmesh_node.http.console import MAX_WATCHERS

from tests.http.conftest import PATIENCE, Node, call, get_json, running_node, wait_until

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as made:
        yield made


def command(node: Node, path: str, body: object, **headers: str) -> tuple[int, dict[str, object]]:
    status, _, answer = call(node.console_port, "POST", path, body, {**JSON, **headers})
    return status, json.loads(answer)


def test_status_is_told(node: Node) -> None:
    document = get_json(node.console_port, "/api/status")
    assert isinstance(document, dict)
    assert document["node_id"] == "me"
    assert document["token"] == "an-invite"
    assert document["node_status"] == "Idle"


def test_events_tell_at_once_and_on_change(node: Node) -> None:
    with socket.create_connection(("127.0.0.1", node.console_port), timeout=PATIENCE) as opened:
        opened.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        for expected in (b'"notices":[]', b'"notices":["one"]', b'"notices":["two"]'):
            while expected not in received:
                received += opened.recv(1 << 16)
            node.publish(notices=("two",) if b"one" in received else ("one",))
    assert b"Content-Type: text/event-stream" in received


def test_event_streams_are_limited_and_end_with_their_clients(node: Node) -> None:
    opened = []
    for _ in range(MAX_WATCHERS):
        watcher = socket.create_connection(("127.0.0.1", node.console_port), timeout=PATIENCE)
        watcher.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert watcher.recv(100).startswith(b"HTTP/1.1 200")
        opened.append(watcher)
    assert call(node.console_port, "HEAD", "/api/events")[0] == 503
    for watcher in opened:
        watcher.close()
    wait_until(lambda: call(node.console_port, "HEAD", "/api/events")[0] == 200)


def test_commands_reach_the_node(node: Node) -> None:
    assert command(node, "/api/join", {"token": " t \n"}) == (200, {"ok": True, "mesh_id": "0" * 32})
    status, answer = command(node, "/api/invite", {"scope": "worker", "ttl_s": 60})
    assert status == 200
    assert answer == {"ok": True, "token": "token-for-worker", "scope": "worker", "expires_unix": 1.9e9}
    expose = {"direction": "expose", "name": "ssh", "target": "[::1]:22", "scope": "worker"}
    assert command(node, "/api/tunnels", expose) == (200, {"ok": True, "port": 22})
    connect = {"direction": "connect", "peer": "p", "name": "ssh"}
    assert command(node, "/api/tunnels", connect) == (200, {"ok": True, "port": 40_000})
    model = {"ok": True, "model": "m"}
    assert command(node, "/api/runtime/models", {"model": "m"}) == (
        200,
        model | {"status": "loading", "alone": True},
    )
    unload = {"model": "m", "forget": True}
    answered, _, answer = call(node.console_port, "DELETE", "/api/runtime/models", unload, JSON)
    assert (answered, json.loads(answer)) == (200, model | {"wanted": False})
    assert command(node, "/api/stop", {}) == (200, {"ok": True})
    assert node.commands.calls == [
        ("join", "t"),
        ("invite", "worker", 60),
        ("expose", "ssh", "::1", 22, "worker"),
        ("connect", "p", "ssh", 0),
        ("load", "m"),
        ("unload", "m", True),
        ("stop",),
    ]
    assert get_json(node.console_port, "/api/tunnels") == {"tunnels": []}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/join", {}),
        ("/api/join", {"token": ""}),
        ("/api/join", {"token": 5}),
        ("/api/join", {"token": "x" * 40_000}),
        ("/api/join", b"{"),
        ("/api/join", b"[]"),
        ("/api/join", b"\xff"),
        ("/api/invite", {"scope": "king"}),
        ("/api/invite", {"ttl_s": 0}),
        ("/api/invite", {"ttl_s": -5}),
        ("/api/invite", {"ttl_s": 1e12}),
        ("/api/invite", {"ttl_s": True}),
        ("/api/invite", b'{"ttl_s": NaN}'),
        ("/api/invite", b'{"ttl_s": Infinity}'),
        ("/api/tunnels", {"direction": "sideways", "name": "x"}),
        ("/api/tunnels", {"direction": "expose", "name": "x", "target": "nowhere"}),
        ("/api/tunnels", {"direction": "expose", "name": "x", "target": "h:99999"}),
        ("/api/tunnels", {"direction": "connect", "name": "x", "peer": "p", "port": 1.5}),
    ],
)
def test_senseless_arguments_never_reach_the_node(node: Node, path: str, body: object) -> None:
    status, answer = command(node, path, body)
    assert status == 400
    assert answer["ok"] is False
    assert answer["code"] == "invalid"
    assert answer["error"]
    assert node.commands.calls == []


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (CommandFailed("denied", "no"), 403),
        (CommandFailed("invalid", "no"), 400),
        (CommandFailed("unreachable", "no"), 502),
        (CommandFailed("never-heard-of", "no"), 500),
        (ZeroDivisionError(), 500),
    ],
)
def test_failures_of_the_node_have_a_status_and_a_word(node: Node, failure: Exception, status: int) -> None:
    node.commands.fail_with = failure
    answered, answer = command(node, "/api/stop", {})
    assert answered == status
    assert answer["ok"] is False
    assert answer["code"] == getattr(failure, "code", "internal")


def test_command_ends_when_its_caller_leaves(node: Node) -> None:
    node.commands.hold = True
    with socket.create_connection(("127.0.0.1", node.console_port)) as opened:
        opened.sendall(
            b"POST /api/stop HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        )
        wait_until(lambda: node.commands.calls == [("stop",)])
    wait_until(lambda: node.commands.cancelled == 1)


def test_command_under_way_is_told_that_the_node_stops(node: Node) -> None:
    node.commands.hold = True
    with socket.create_connection(("127.0.0.1", node.console_port), timeout=PATIENCE) as opened:
        opened.sendall(
            b'POST /api/join HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"token":"t"}'
        )
        wait_until(lambda: bool(node.commands.calls))
        node.end()
        answer = opened.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"stopping"' in answer


STRANGERS = [
    ({"Host": "evil.example"}, 403),
    ({"Host": "127.0.0.1.evil.example:3131"}, 403),
    ({"Host": "localhost:1@evil.example"}, 403),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "http://localhost:1"}, 403),
    ({"Origin": "null"}, 403),
    ({"Content-Type": "text/plain"}, 415),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content-Type": ""}, 415),
]


@pytest.mark.parametrize(("headers", "status"), STRANGERS)
def test_strangers_pages_command_nothing(node: Node, headers: dict[str, str], status: int) -> None:
    answered, answer = command(node, "/api/stop", {}, **headers)
    assert answered == status
    assert answer["ok"] is False
    assert node.commands.calls == []


def test_consoles_own_page_may_command(node: Node) -> None:
    own = f"localhost:{node.console_port}"
    assert command(node, "/api/stop", {}, Host=own, Origin=f"http://{own}")[0] == 200


def test_strangers_name_for_this_machine_shows_nothing(node: Node) -> None:
    for path in ("/", "/api/status", "/api/events", "/v1/models"):
        assert call(node.console_port, "GET", path, headers={"Host": "evil.example"})[0] == 403
    for host in (
        "localhost",
        "127.0.0.1:99",
        "[::1]:99",
        "box",
        "box.local",
        "box.example.net",
        "BOX.example.net:1",
    ):
        assert call(node.console_port, "GET", "/api/status", headers={"Host": host})[0] == 200


def test_listening_on_all_addresses_shows_no_invite_under_a_foreign_name() -> None:
    with running_node(listen_all=True) as node:
        status, _, body = call(node.console_port, "GET", "/api/status", headers={"Host": "gpu.example"})
        assert status == 200
        assert json.loads(body)["token"] == ""
        assert command(node, "/api/stop", {}, Host="gpu.example")[0] == 403
        assert command(node, "/api/stop", {})[0] == 200


def test_page_and_its_parts_are_there_and_load_nothing_from_elsewhere(node: Node) -> None:
    for path, kind in {
        "/": "html",
        "/console.js": "javascript",
        "/console.css": "css",
        "/favicon.svg": "svg",
    }.items():
        status, headers, body = call(node.console_port, "GET", path)
        assert status == 200
        assert kind in headers["content-type"]
        assert headers["x-frame-options"] == "DENY"
        assert len(body) > 200
        assert b"https://" not in body
        assert b"http://" not in body.replace(b"http://www.w3.org", b"").replace(b"http://localhost:", b"")


def test_what_is_not_there_is_not_found(node: Node) -> None:
    for method, path in [
        ("GET", "/nope"),
        ("GET", "/api"),
        ("POST", "/api/nope"),
        ("GET", "/static/../console.py"),
    ]:
        assert call(node.console_port, method, path)[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/api/status", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("GET", "/api/join", "POST"),
        ("DELETE", "/api/join", "POST"),
        ("PUT", "/api/runtime/models", "GET, HEAD, POST, DELETE"),
        ("OPTIONS", "/api/stop", "POST"),
    ],
)
def test_another_method_is_told_which_there_are(node: Node, method: str, path: str, allowed: str) -> None:
    status, headers, body = call(node.console_port, method, path, None if method == "GET" else {})
    assert status == 405
    assert headers["allow"] == allowed
    assert json.loads(body)["error"] == f"{path} takes {allowed} only."


def test_a_command_that_does_not_arrive_is_given_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "BODY_LIMIT", 0.05)
    with socket.create_connection(("127.0.0.1", node.console_port), timeout=PATIENCE) as client:
        head = "POST /api/stop HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        client.sendall(f"{head}\r\n{{".encode())
        with client.makefile("rb") as answer:
            assert answer.read().startswith(b"HTTP/1.1 408 ")  # to the end: the connection is closed


def test_long_command_is_refused(node: Node) -> None:
    assert command(node, "/api/join", {"token": "x" * 100_000})[0] == 413


def test_api_is_reached_through_the_console(node: Node) -> None:
    assert call(node.console_port, "GET", "/v1/models")[0] == 200
    assert call(node.console_port, "POST", "/v1/completions", {"model": "x"})[0] == 503
