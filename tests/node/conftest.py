"""Nodes for the tests of this folder. They all need the real llama-server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from libmesh_node.llama.engine import Engine
from libmesh_node.models import demo

from tests.node.nodes import Machine, Node


@dataclass(frozen=True)
class Pair:
    """A node that serves the demo model, and a client that joined it with its invite file."""

    server: Node
    client: Node
    machine: Machine


@pytest.fixture
def machine(tmp_path: Path, engine: Engine) -> Iterator[Machine]:
    """Nodes of one test, all ended at its end."""
    machine = Machine(tmp_path)
    yield machine
    machine.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Pair]:
    """Shared by the tests that leave it as they found it."""
    machine = Machine(tmp_path_factory.mktemp("pair"))
    try:
        server = machine.serving(name="server")
        yield Pair(server, machine.joining("--client", name="client").sees("demo"), machine)
    finally:
        machine.close()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another small model, with another name and other weights."""
    path = tmp_path_factory.mktemp("models") / "second.gguf"
    demo.write_model(path, demo.TINY, seed=2, name="second")
    return path


@pytest.fixture(scope="session")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a gigabyte, which takes a llama-server a moment to load."""
    path = tmp_path_factory.mktemp("models") / "large.gguf"
    demo.write_model(path, demo.MEDIUM, seed=3, name="large")
    return path
