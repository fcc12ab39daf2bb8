"""Nodes for the tests of this folder. They all need the real llama-server."""

from __future__ import annotations

import shlex
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


@dataclass(frozen=True)
class HeldServer:
    """The real llama-server behind a gate: it starts to load its model when `open` is called, however fast it loads."""

    folder: Path
    """To be given with `--bin-dir`."""

    def open(self) -> None:
        (self.folder / "open").touch()

    def shut(self) -> None:
        """Whichever is started next is held again."""
        (self.folder / "open").unlink()


@pytest.fixture
def held_server(tmp_path: Path, engine: Engine) -> HeldServer:
    held = HeldServer(tmp_path / "held")
    held.folder.mkdir()
    script = held.folder / "llama-server"
    real = shlex.quote(str(engine.require_llama_server().path))
    script.write_text(f"""#!/bin/sh
case " $* " in *" --model "*) while [ ! -e {shlex.quote(str(held.folder / "open"))} ]; do sleep 0.05; done ;; esac
exec {real} "$@"
""")
    script.chmod(0o755)
    return held
