"""A split that changes hands while it is asked: real nodes, real llama.cpp. Who asks notices a pause at the most."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from libmesh_node.hardware import memory_bandwidth
from libmesh_node.llama.engine import Engine
from libmesh_node.llama.rpc.working import ENDED
from libmesh_node.models.demo import SMALL, write_model

from tests.node.nodes import PATIENCE, Machine, Node, wait_for
from tests.node.test_chaos import ask
from tests.node.test_splits import host_of, named, servers_running, working

pytestmark = [pytest.mark.llama, pytest.mark.slow]

TOKENS = 32
SLOW, FAST = 1e7, 1e10
"""Bytes per second that the nodes take for their memory's speed: what a split takes is compute then, and no round trip."""

Start = Callable[..., Node]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MB; with its cache it takes 69."""
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_model(path, SMALL, 7)
    return path


@pytest.fixture
def start(
    machine: Machine, model: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Start:
    """Starts a node with the model whose memory is that fast."""

    def start(speed: float, *flags: str) -> Node:
        cache = tmp_path / f"cache{speed:g}"
        measured = cache / "libmesh" / "hardware.json"
        memory_bandwidth(measured)
        measured.write_text(json.dumps(dict.fromkeys(json.loads(measured.read_text()), speed)))
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        engine_at = ("--bin-dir", str(engine.require_llama_server().path.parent))
        return machine.node("--model", str(model), "--max-rtt", "5000", "--verbose", *engine_at, *flags).up()

    return start


def one_split(nodes: list[Node]) -> bool:
    return servers_running(nodes) == len(working(nodes)) == 1


def test_a_better_host_takes_over_and_every_answer_is_whole(start: Start) -> None:
    """The host has most of the layers: there is no other placement that is as good as with the fast one as the host.

    Each machine has room for both splits, so the new one starts beside the old.
    """
    flags = "--split", "--tensor-split", "1,3", "--max-vram", "0.3"
    first = start(SLOW, *flags)
    token = first.invite("--scope", "worker")
    second = start(SLOW, *flags, "--join", token).sees("small", limit=2 * PATIENCE)
    wait_for(lambda: one_split([first, second]), PATIENCE, "one split")
    (worker,) = working([first, second])
    stop = threading.Event()
    answers: list[str] = []

    def go_on_asking() -> None:
        while not stop.is_set():
            began = time.monotonic()
            answers.append(ask(worker, "small", 1, TOKENS))
            stop.wait(1 + time.monotonic() - began)  # or its server would never be idle

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(go_on_asking)
        try:
            better = start(FAST, *flags, "--join", token)
            nodes = [first, second, better]
            better.until(lambda status: status["node_status"] == "Serving (split)", 3 * PATIENCE, "its turn")
            before = len(answers)
            wait_for(lambda: asking.done() or len(answers) > before + 1, 3 * PATIENCE, "answers")
        finally:
            stop.set()
        asking.result()
    wait_for(lambda: one_split(nodes), PATIENCE, "one split only")
    assert host_of(nodes) is better


def test_an_answer_goes_on_when_the_worker_dies_under_it(start: Start) -> None:
    """What its share needs is had elsewhere, too. The answer is long: it must not be over before the worker is dead."""
    nodes = [start(SLOW, "--max-vram", "0.05")]
    token = nodes[0].invite("--scope", "worker")
    nodes += [start(SLOW, "--max-vram", "0.05", "--join", token) for _ in range(2)]
    for node in nodes:
        node.sees("small", limit=2 * PATIENCE)
    wait_for(lambda: one_split(nodes), PATIENCE, "one split only")
    (worker,), host = working(nodes), host_of(nodes)
    asked = next(node for node in nodes if node is not worker and node is not host)
    (process,) = named(worker.status(), "rpc-server")

    def kill(count: int, _server: str) -> None:
        if count == 10:
            os.kill(process["pid"], signal.SIGKILL)

    ask(asked, "small", 1, 32 * TOKENS, kill)
    assert "looking for a server that goes on" in asked.words
    assert ENDED in host.words
