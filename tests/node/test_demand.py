"""Models go where they are asked for: real nodes, some with nothing to do but a file on their disk."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import httpx
import pytest

from tests.node.nodes import PATIENCE, Json, Machine, Node, chat, served

pytestmark = pytest.mark.llama

ROOM_FOR_ONE = "0.01"
"""GB: each of the two models takes 6.2 MB."""


def standing_by(machine: Machine, model: Path, *flags: str, name: str) -> Node:
    """A node without `--model` that has one in its folder, once the mesh knows of it."""
    folder = machine.root / name / "models"
    folder.mkdir(parents=True)
    shutil.copy(model, folder)
    node = machine.joining(*flags, name=name).up()
    node.until(lambda status: standbys(status, model.stem) > 0, what="the file is found")
    return node


def standbys(status: Json, name: str) -> int:
    """Nodes that would serve a model."""
    return sum(model["standbys"] for model in status["models"] if model["name"] == name)


@pytest.mark.slow
def test_model_whose_last_server_dies_is_served_by_a_standby(machine: Machine, small_model: Path) -> None:
    """And so is one that nobody has served yet, as soon as it is asked for; every node's API answers all the while."""
    first = machine.node("--model", str(small_model), "--invite-file", str(machine.invite_file)).ready()
    spare = standing_by(machine, small_model, name="spare")
    asking = machine.joining().sees("second")
    answer = chat(asking, "second")
    assert answer.headers["X-Libmesh-Node"] == first.node_id
    assert spare.status()["node_status"] == "Standby"
    first.kill()
    for node in (asking, spare):
        answer = chat(node, "second")
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Libmesh-Node"] == spare.node_id
    assert "nobody serves it" in spare.words


def test_loaded_model_gets_room_of_one_with_a_long_context(machine: Machine, small_model: Path) -> None:
    """There would be none: the first one has all that `--max-vram` leaves it."""
    node = machine.serving("--max-vram", "0.56")
    first = node.llama_pid()
    done = node.run("load", str(small_model))
    assert (done.returncode, done.stdout) == (0, "second is ready.\n"), done.stderr
    node.sees("demo", "second")
    assert node.llama_pid() != first
    assert "demo goes on with a cache of 14592 tokens, to make room" in node.words
    for name in ("demo", "second"):
        assert chat(node, name).status_code == 200


def test_models_are_loaded_and_unloaded_while_a_node_runs(machine: Machine, small_model: Path) -> None:
    """`unload` leaves what the operator named wanted by the mesh, `drop` does not."""
    node = machine.serving()
    other = machine.joining("--client").sees("demo")
    done = node.run("load", str(small_model))
    assert (done.returncode, done.stdout) == (0, "second is ready.\n"), done.stderr
    other.sees("demo", "second")
    assert chat(other, "second").status_code == 200
    assert {entry["name"]: entry["status"] for entry in local_models(node)} == {
        "demo": "ready",
        "second": "ready",
    }

    assert node.run("unload", "demo").returncode == 0
    status = other.until(lambda status: served(status) == {"second"}, what="demo is gone")
    assert [entry["name"] for entry in local_models(node)] == ["second"]
    assert node.run("unload", "demo").returncode == 1
    assert node.run("drop", "demo").returncode == 0
    assert node.run("load", "demo").returncode == 0
    other.sees("demo", "second")
    assert node.run("drop", "second").stdout == "second is not served by this node any more.\n"
    status = node.until(lambda status: len(status["processes"]) == 1)
    assert [model["name"] for model in status["models"]] == ["demo"]
    done = node.run("load", str(machine.root / "nothing.gguf"))
    assert done.returncode == 1
    assert "There is no file" in done.stderr


def local_models(node: Node) -> list[Json]:
    """What `/api/runtime/models` lists."""
    return list(httpx.get(f"{node.console}/api/runtime/models", timeout=PATIENCE).json()["models"])


@pytest.mark.slow
def test_idle_model_leaves_its_memory_and_comes_back_when_asked_from_anywhere(machine: Machine) -> None:
    node = machine.serving("--idle-unload", "3")
    member, client = machine.joining().up(), machine.joining("--client").up()
    for asking in (node, member, client):
        asking.until(lambda status: bool(status["models"]), what="the model is known, asleep or not")
        node.until(lambda status: not status["processes"], what="the server is ended")
        assert local_models(node)[0]["status"] == "asleep"
        answer = chat(asking, "auto" if asking is client else "demo")
        assert answer.status_code == 200, answer.text


@pytest.mark.slow
def test_joiner_without_a_model_serves_what_did_not_fit_where_it_was_named(
    machine: Machine, small_model: Path
) -> None:
    """Of several `--model` all that fit are served there; the mesh wants the rest, though nobody has asked for it."""
    first = machine.serving("--model", str(small_model), "--max-vram", ROOM_FOR_ONE)
    assert served(first.status()) == {"demo"}
    (waiting,) = [model for model in first.status()["models"] if model["name"] == "second"]
    assert (waiting["wanted"], waiting["standbys"]) == (True, 0)
    spare = standing_by(machine, small_model, name="spare")
    for node in (first, spare):
        node.sees("demo", "second")
        assert chat(node, "second").headers["X-Libmesh-Node"] == spare.node_id
    assert {model["name"]: model["named"] for model in local_models(spare)} == {"second": False}
    assert first.run("drop", "second").returncode == 0
    status = first.until(lambda status: not any(model["wanted"] for model in status["models"][1:]))
    assert served(status) == {"demo", "second"}, "what is no longer wanted stays until its memory is"


def unload(node: Node) -> None:
    httpx.request("DELETE", f"{node.console}/api/runtime/models", json={"model": "demo"}, timeout=PATIENCE)


@pytest.mark.slow
def test_answers_under_way_are_finished_before_a_model_is_unloaded(machine: Machine) -> None:
    """Those of other nodes, too."""
    node = machine.serving()
    client = machine.joining("--client").sees("demo")
    body: Json = {"model": "demo", "max_tokens": 1500, "stream": True, "prompt": "Once", "temperature": 0}
    for asking in (node, client):
        with httpx.stream("POST", f"{asking.api}/v1/completions", json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            unloading = threading.Thread(target=unload, args=(node,))  # no command: its start takes long
            unloading.start()
            node.until(lambda status: status["local_models"][0]["status"] == "unloading")
            assert list(filter(None, lines))[-1] == "data: [DONE]"
        unloading.join(PATIENCE)
        assert local_models(node) == []
        waiting = threading.Thread(target=node.run, args=("load", "demo"))
        waiting.start()
        client.sees("demo")
        waiting.join(PATIENCE)
