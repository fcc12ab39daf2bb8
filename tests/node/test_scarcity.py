"""What a node does when it runs out of room: for services, for files, on its disk. It goes on serving."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from tests.node.nodes import PATIENCE, Machine, Node, chat, wait_for

pytestmark = pytest.mark.llama


def _expose(node: Node, name: str) -> int:
    body = {"direction": "expose", "name": name, "target": "127.0.0.1:1", "scope": "client"}
    return node.post("/api/tunnels", body).status_code


def _starve(node: Node) -> tuple[int, int]:
    """Leave no file descriptor to the node; returns the limit that it had."""
    used = max(int(name) for name in os.listdir(f"/proc/{node.pid}/fd"))
    limit = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (used // 2, limit[1]))
    return limit


def test_exposed_services_leave_room_for_the_models(machine: Machine) -> None:
    """They are refused while there is room for as many again; a model that comes back is offered as before."""
    node = machine.serving()
    answers = [_expose(node, f"{number:03}" + "x" * 247) for number in range(130)]
    assert answers == [200] * 128 + [503] * 2
    old = node.llama_pid()
    os.kill(old, signal.SIGKILL)
    node.until(lambda status: status["processes"][0]["pid"] not in (None, old), what="another llama-server")
    node.ready()
    assert machine.joining("--client").sees("demo")


def test_node_without_file_descriptors_lives_and_recovers(machine: Machine) -> None:
    """The tunnel to a model that comes back is opened as soon as there is a port for it again."""
    server = machine.serving()
    client = machine.joining("--client").sees("demo")
    limit = _starve(client)
    os.kill(server.llama_pid(), signal.SIGKILL)
    wait_for(lambda: "no way to demo" in client.words, PATIENCE, "the lack is told")
    time.sleep(6)  # the interfaces are looked at again
    assert client.pid
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, limit)
    client.sees("demo")
    assert chat(client).status_code == 200


def test_full_disk_does_not_end_a_node(machine: Machine, tmp_path: Path) -> None:
    """A folder in the file's place stands for it: the tests may run as root, whom no mode stops."""
    server = machine.serving()
    kept = server.folder / "mesh.json"
    kept.unlink()
    kept.mkdir()
    machine.joining().sees("demo")  # not a client: those only follow, and nobody remembers them
    wait_for(lambda: "Cannot write" in server.words, PATIENCE, "it is told")
    time.sleep(5)
    assert server.words.count("Cannot write") == 1
    answer = server.post("/api/invite", {"scope": "client", "ttl_s": 60})
    assert answer.json()["error"].startswith("Cannot write")
    kept.rmdir()
    wait_for(kept.is_file, PATIENCE, "it is written after all")
