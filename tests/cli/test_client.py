from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from libmesh_node import client as client_module
from libmesh_node.client import NodeClient, find_node
from libmesh_node.datadir import DataDir, NodeInfo, held_data_dir
from libmesh_node.errors import NodeError, NodeNotRunning, NodeRefused

from tests.cli.conftest import FakeConsole


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answering(data: bytes) -> int:
    """The port of something that answers one connection with `data`, whatever it was asked, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def test_answers_come_back_as_they_are_and_bodies_arrive_as_json(console: FakeConsole) -> None:
    console.answers = {"GET /api/status": (200, {"node_id": "x"}), "POST /api/stop": (200, {"ok": True})}
    node = NodeClient(console.port)
    assert node.get("/api/status") == {"node_id": "x"}
    assert node.post("/api/stop", {"a": 1}) == {"ok": True}
    assert console.requests == [("GET /api/status", None), ("POST /api/stop", {"a": 1})]


@pytest.mark.parametrize(
    ("answer", "text", "code"),
    [
        ({"ok": False, "error": "No scope.", "code": "denied"}, "No scope.", "denied"),
        ({"error": {"message": "Busy.", "type": "x"}}, "Busy.", ""),
        ({"error": 3, "code": 4}, "The node answered 403 Forbidden.", ""),
        (b"<html>", "The node answered 403 Forbidden.", ""),
    ],
)
def test_a_refusal_carries_the_nodes_own_words(
    console: FakeConsole, answer: object, text: str, code: str
) -> None:
    console.answers = {"POST /api/invite": (403, answer)}
    with pytest.raises(NodeRefused) as refused:
        NodeClient(console.port).post("/api/invite", {})
    assert (str(refused.value), refused.value.code, refused.value.status) == (text, code, 403)


def test_nobody_there_is_not_running() -> None:
    with pytest.raises(NodeNotRunning, match="refused"):
        NodeClient(free_port()).get("/api/status")
    with pytest.raises(NodeNotRunning, match="refused"):
        list(NodeClient(free_port()).events())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\xff" * 1000,
    ],
)
def test_whatever_answers_that_is_no_node_is_an_error_in_words(data: bytes) -> None:
    with pytest.raises(NodeError) as error:
        NodeClient(answering(data)).get("/api/status")
    assert str(error.value).endswith(".")


def test_a_node_that_hangs_is_given_up_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ANSWER_TIMEOUT", 0.02)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(NodeError, match="did not answer within"),
    ):
        NodeClient(silent.getsockname()[1]).get("/api/status")


def test_events_are_told_one_by_one_without_the_keepalives(console: FakeConsole) -> None:
    console.events = [
        {"n": 1},
        b": keepalive\n\n",
        {"n": 2},
        b"event: x\ndata: {\ndata: }\n\n",
        b'data: {"cut": of',
    ]
    assert list(NodeClient(console.port).events()) == [{"n": 1}, {"n": 2}, {}]


def test_events_that_cannot_be_had_are_refused(console: FakeConsole) -> None:
    with pytest.raises(NodeRefused, match="nothing here"):
        list(NodeClient(console.port).events())


def test_a_node_is_found_by_its_data_folder_or_by_its_console_port(tmp_path: Path) -> None:
    with held_data_dir(tmp_path) as folder:
        with pytest.raises(NodeNotRunning, match="still starting"):
            find_node(folder, None)
        folder.write_info(NodeInfo(pid=1, api_port=2, console_port=4321, version="", started_unix=0))
        assert find_node(folder, None).port == 4321
        assert find_node(folder, 1234).port == 1234
    with pytest.raises(NodeNotRunning, match="Start one with `libmesh-node`"):
        find_node(DataDir(tmp_path), None)
