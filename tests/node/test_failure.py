"""kill -9 of any process at any time: no orphan, the others go on, and what is told of it is true."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from tests.node.conftest import HeldServer
from tests.node.nodes import Json, Machine, Node, chat, peer, served

pytestmark = [pytest.mark.llama]

"""Seconds until a death is told at the latest, as issue 2 has it."""


class Watcher:
    """Follows a node's `/api/events` and remembers which models were served, in order."""

    def __init__(self, node: Node) -> None:
        self.seen: list[set[str]] = []
        self._url = f"{node.console}/api/events"
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            with httpx.stream("GET", self._url, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.seen.append(served(json.loads(line.removeprefix("data: "))))
        except httpx.HTTPError:
            pass


def test_llama_server_that_is_killed_comes_back(machine: Machine, held_server: HeldServer) -> None:
    held_server.open()
    server = machine.serving("--bin-dir", str(held_server.folder))
    client = machine.joining("--client").sees("demo")
    watcher = Watcher(client)
    client.until(lambda status: watcher.seen, what="the first event")
    before = server.llama_pid()
    held_server.shut()
    os.kill(before, signal.SIGKILL)
    client.until(lambda status: set() in watcher.seen and not served(status), what="the client sees it gone")
    held_server.open()
    refused = chat(client)
    assert refused.status_code in (200, 502, 503)
    client.sees("demo")
    assert chat(client).status_code == 200
    after = server.status()["processes"][0]
    assert after["pid"] != before
    assert after["restarts"] == 1
    assert after["status"] == "ready"
    client.until(lambda status: watcher.seen[-1] == {"demo"}, what="the last event")


@pytest.mark.slow
def test_node_that_is_killed_comes_back_by_itself(machine: Machine) -> None:
    server = machine.serving(name="server")
    client = machine.joining("--client").sees("demo")
    server_id = server.node_id
    server.kill()
    refused = chat(client)
    assert refused.status_code in (502, 503)
    assert refused.headers["Retry-After"].isdigit()
    client.until(lambda status: peer(status, server_id).get("state") in (None, "dead"), what="its death")
    refused = chat(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_server")
    assert refused.headers["Retry-After"].isdigit()
    assert client.status()["notices"]

    again = machine.node("--model", "demo", name="server").ready()
    assert again.node_id == server_id
    client.sees("demo")
    assert chat(client).headers["X-Libmesh-Node"] == server_id
    assert client.status()["notices"] == []


@pytest.mark.slow
def test_joined_server_that_is_killed_rejoins_without_a_token(machine: Machine, small_model: Path) -> None:
    first = machine.serving()
    second = machine.joining("--model", str(small_model), name="second").ready()
    first.sees("demo", "second")
    second_id, mesh_id = second.node_id, second.status()["mesh_id"]
    second.kill()
    first.until(lambda status: served(status) == {"demo"}, what="its death")
    assert chat(first).status_code == 200
    refused = chat(first, "second")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_server")
    again = machine.node("--model", str(small_model), name="second").ready()
    assert (again.node_id, again.status()["mesh_id"]) == (second_id, mesh_id)
    first.sees("demo", "second")
    assert chat(first, "second").status_code == 200
    assert chat(again, "demo").status_code == 200


@pytest.mark.slow
def test_client_that_is_killed_is_told_dead(machine: Machine) -> None:
    server = machine.serving()
    client = machine.joining("--client").sees("demo")
    client_id = client.node_id

    def state(status: Json) -> object:
        return peer(status, client_id).get("state")

    server.until(lambda status: state(status) == "alive")
    client.kill()
    server.until(lambda status: state(status) in (None, "dead"), what="its death")
    assert chat(server).status_code == 200


@pytest.mark.slow
def test_stream_from_a_node_that_is_killed_does_not_end_as_if_complete(machine: Machine) -> None:
    server = machine.serving()
    client = machine.joining("--client").sees("demo")
    body = {"model": "demo", "max_tokens": 8000, "stream": True, "prompt": "Once"}
    received = b""
    with httpx.stream("POST", f"{client.api}/v1/completions", json=body, timeout=30) as response:
        try:
            for part in response.iter_raw():
                if not received:
                    server.kill()
                received += part
        except httpx.RemoteProtocolError:
            pass
    assert b"[DONE]" not in received
    assert b'"error"' in received
