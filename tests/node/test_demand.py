"""Models go where they are asked for: real nodes, some with nothing to do but a file on their disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.node.nodes import Json, Machine, Node, chat

pytestmark = pytest.mark.llama


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
