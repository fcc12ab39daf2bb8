"""Whatever a node is doing, a signal or `stop` ends it within 3 s, with 0, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.node.conftest import HeldServer, Pair
from tests.node.nodes import PATIENCE, Machine, Node, command, peer, wait_for

pytestmark = pytest.mark.llama


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "stop"])
def test_serving_node_ends(machine: Machine, how: int | str) -> None:
    node = machine.serving()
    assert len(node.note_family()) >= 2  # the guard and the llama-server
    node.ends((lambda: node.run("stop")) if isinstance(how, str) else how)
    assert not (node.folder / "node.json").exists()
    assert "Traceback" not in node.words


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2, 0.5])
def test_node_ends_while_it_starts(machine: Machine, how: int, delay: float) -> None:
    """At each moment of its start, from when it listens for signals on."""
    node = machine.node()
    wait_for(lambda: "node " in node.words, PATIENCE, "its first line")
    time.sleep(delay)
    node.ends(how)


def test_node_ends_while_its_model_loads(
    machine: Machine, small_model: Path, held_server: HeldServer
) -> None:
    node = machine.node("--model", str(small_model), "--bin-dir", str(held_server.folder)).up()
    status = node.until(lambda status: status["processes"] and status["processes"][0]["pid"])
    assert status["llama_ready"] is False
    node.ends(signal.SIGINT)


def test_both_nodes_end_while_a_stream_runs(machine: Machine) -> None:
    server = machine.serving()
    client = machine.joining("--client").sees("demo")
    body = {"model": "demo", "max_tokens": 8000, "stream": True, "prompt": "Once"}
    streams: list[Iterator[bytes]] = []
    with ExitStack() as stack:
        for node in (client, client, server):
            stream = httpx.stream("POST", f"{node.api}/v1/completions", json=body, timeout=PATIENCE)
            streams.append(stack.enter_context(stream).iter_raw())  # kept: a response ends with its iterator
            next(streams[-1])
        client.ends(signal.SIGINT)
        server.ends(signal.SIGTERM)


@pytest.fixture
def blackhole() -> Iterator[int]:
    """A port at which connecting hangs: its queue is full, so the kernel drops what comes."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.fixture
def silence() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("kind", ["blackhole", "silence"])
def test_node_ends_while_it_joins_a_mesh_that_does_not_answer(
    machine: Machine, kind: str, request: pytest.FixtureRequest
) -> None:
    port = request.getfixturevalue(kind)
    founder = machine.node("--announce-addr", f"/ip4/127.0.0.1/tcp/{port}").up()
    founder.until(lambda status: status["mesh_id"])
    token = founder.invite()
    founder.kill()
    joiner = machine.node("--client", "--join", token).up()
    joiner.until(lambda status: status["mesh_id"])
    assert joiner.status()["peers"] == []
    time.sleep(0.5)  # so that it is waiting for an answer
    assert joiner.process.poll() is None
    joiner.ends(signal.SIGTERM)


def test_clean_leave_is_no_death(machine: Machine, pair: Pair) -> None:
    guest = machine.node("--client", "--join", pair.server.invite()).sees("demo")
    guest_id = guest.node_id
    pair.server.until(lambda status: peer(status, guest_id).get("state") == "alive")
    guest.ends(signal.SIGTERM)
    gone = pair.server.until(
        lambda status: peer(status, guest_id).get("state") in (None, "left", "dead"), what="the leave"
    )
    assert peer(gone, guest_id).get("state") != "dead"


def test_second_node_on_the_same_folder_names_the_first(pair: Pair, machine: Machine) -> None:
    done = command("--data-dir", str(pair.server.folder), "--port", "0", "--console", "0")
    assert done.returncode == 1
    assert f"pid {pair.server.pid}" in done.stderr
    assert "--data-dir" in done.stderr


@pytest.mark.parametrize("flag", ["--port", "--console", "--bind-port", "--bind-ws"])
def test_port_that_is_taken_names_the_flag(machine: Machine, flag: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        node: Node = machine.node(flag, str(taken.getsockname()[1]))
        assert flag in node.fails()


def test_second_signal_ends_the_node_at_once_and_still_leaves_nobody(machine: Machine) -> None:
    node = machine.serving()
    node.note_family()
    os.kill(node.pid, signal.SIGINT)
    wait_for(lambda: "once more" in node.words, PATIENCE, "the first signal is taken")
    node.process.send_signal(signal.SIGINT)
    code = node.process.wait(PATIENCE)
    assert code in (130, 0, -signal.SIGINT)  # the latter two if it was all but over before the second came
    node.leaves_nobody()
