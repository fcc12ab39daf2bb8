"""A model that no node can hold, served by several: real nodes, real llama.cpp, kill -9."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import trio
from libmesh_node.llama.engine import Engine
from libmesh_node.models.demo import MEDIUM, write_model

from tests.llama.rpc import ends
from tests.node.nodes import PATIENCE, Json, Machine, Node, wait_for

pytestmark = [pytest.mark.llama, pytest.mark.slow]

TOKENS = 16


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """506 MB; with its cache it takes 640."""
    path = tmp_path_factory.mktemp("models") / "medium.gguf"
    write_model(path, MEDIUM, 7)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def alone(engine: Engine, medium: Path) -> str:
    """What one machine says."""

    async def ask() -> str:
        async with ends.llama_server(engine, medium) as (port, _):
            return await trio.to_thread.run_sync(say, f"http://127.0.0.1:{port}")

    return trio.run(ask)


def say(api: str, tokens: int = TOKENS) -> str:
    body = {"model": "medium", "max_tokens": tokens, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "Once upon a time"}]
    answer = httpx.post(f"{api}/v1/chat/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def together(machine: Machine, model: Path, *gigabytes: str) -> list[Node]:
    """Nodes with so much memory each, in one mesh, that serve the model."""
    flags = ("--model", str(model), "--verbose")
    first = machine.node(*flags, "--max-vram", gigabytes[0]).up()
    token = first.invite("--scope", "worker")
    nodes = [first]
    nodes += [machine.node(*flags, "--max-vram", each, "--join", token).up() for each in gigabytes[1:]]
    for node in nodes:
        node.sees("medium", limit=2 * PATIENCE)
    return nodes


def host_of(nodes: list[Node]) -> Node:
    """The one whose llama-server answers."""
    return next(node for node in nodes if node.status()["node_status"] == "Serving (split)")


def working(nodes: list[Node]) -> list[Node]:
    """Those that lend their memory to it."""
    return [node for node in nodes if node.status()["node_status"] == "Worker (split)"]


def named(status: Json, name: str) -> list[Json]:
    return [process for process in status["processes"] if process["name"] == name and process["pid"]]


def servers_running(nodes: list[Node]) -> int:
    children = [child for node in nodes for child in node.note_family() if child.is_running()]
    return sum(child.name() == "llama-server" for child in children if child.status() != psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("memory", [("0.4", "0.4"), ("0.3", "0.3", "0.3")], ids=["two", "three"])
def test_every_node_answers_as_one_machine_would(
    machine: Machine, medium: Path, alone: str, memory: tuple[str, ...]
) -> None:
    nodes = together(machine, medium, *memory)
    assert [say(node.api) for node in nodes] == [alone] * len(nodes)
    statuses = [node.status() for node in nodes]
    assert sorted(status["node_status"] for status in statuses) == [
        "Serving (split)",
        *["Worker (split)"] * (len(nodes) - 1),
    ]
    assert [len(named(status, "llama-server")) for status in statuses].count(1) == 1
    assert sum(len(named(status, "rpc-server")) for status in statuses) == len(nodes) - 1


def test_a_killed_worker_is_replaced_and_a_killed_host_too(
    machine: Machine, medium: Path, alone: str
) -> None:
    nodes = together(machine, medium, "0.4", "0.4", "0.4")
    # The last to come may make another split the better one while the first is loading.
    wait_for(lambda: servers_running(nodes) == 1 and len(working(nodes)) == 1, PATIENCE, "one split only")
    host, workers = host_of(nodes), working(nodes)
    idle = next(node for node in nodes if node is not host and node not in workers)
    threading.Thread(target=_ignore, args=(host.api,), daemon=True).start()  # in mid-generation
    workers[0].kill()
    left = [host, idle]
    wait_for(lambda: _answers(left, alone), 2 * PATIENCE, "an answer without the worker")
    wait_for(lambda: servers_running(left) == 1, PATIENCE, "one split only")
    back = machine.node("--model", str(medium), "--max-vram", "0.4", name=workers[0].folder.name).up()
    host = host_of(left)
    host.kill()
    left = [node for node in (back, *left) if node is not host]
    wait_for(lambda: _answers(left, alone), 2 * PATIENCE, "an answer without the host")


def test_a_killed_rpc_server_is_replaced(machine: Machine, medium: Path, alone: str) -> None:
    nodes = together(machine, medium, "0.4", "0.4")
    (worker,) = [node for node in nodes if node.status()["node_status"] == "Worker (split)"]
    (process,) = named(worker.status(), "rpc-server")
    os.kill(process["pid"], signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(process["pid"]), PATIENCE, "its end")
    wait_for(lambda: _answers(nodes, alone), 2 * PATIENCE, "an answer after all")
    wait_for(lambda: servers_running(nodes) == 1, PATIENCE, "one split only")


def test_a_plan_says_who_would_serve_and_starts_nothing(machine: Machine, medium: Path) -> None:
    first = machine.node("--model", str(medium), "--max-vram", "0.4", "--min-peers", "9").up()
    token = first.invite("--scope", "worker")
    second = machine.node(
        "--model", str(medium), "--max-vram", "0.4", "--min-peers", "9", "--join", token
    ).up()
    third = machine.node("--max-vram", "4", "--join", token).up()
    third.until(lambda status: sum(bool(peer["models"]) for peer in status["peers"]) == 2, what="both peers")
    wait_for(lambda: len(_plan(third, medium)["peers"]) == 2, PATIENCE, "both known by their digest")
    plan = _plan(third, medium)
    assert plan["possible"]
    assert [member["layers"] for member in plan["members"]] == [6]
    assert plan["host"] == plan["this_node"] == third.node_id

    def refused() -> bool:
        done = second.run("plan", str(medium))
        assert done.returncode == 1
        return "waiting for 9 peers with the model, there are 1" in done.stdout

    wait_for(refused, PATIENCE, "the first one known to the second")
    assert not named(first.status(), "llama-server")


def _plan(node: Node, model: Path) -> Json:
    done = node.run("plan", str(model), "--json")
    assert done.returncode in (0, 1), done.stderr
    plan: Json = json.loads(done.stdout)
    return plan


def test_too_little_is_told_exactly(machine: Machine, medium: Path) -> None:
    node = machine.node("--model", str(medium), "--max-vram", "0.4").up()
    status = node.until(lambda status: status["notices"], what="a notice")
    assert status["notices"] == ["medium is not served: need 0.64 GB, have 0.40 GB from 0 peers."]


def _answers(nodes: list[Node], text: str) -> bool:
    try:
        return all(say(node.api) == text for node in nodes)
    except (AssertionError, httpx.HTTPError):
        return False


def _ignore(api: str) -> None:
    try:
        say(api, 2000)
    except (AssertionError, httpx.HTTPError):
        return
