"""What tests of every folder share: the real llama.cpp programs, and the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from libmesh_node.llama.build import BuildProgress, install
from libmesh_node.llama.engine import Engine, find_engine
from libmesh_node.models.demo import demo_model


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Engine:
    """Real llama-server and rpc-server: found, or else built into the user's cache, which takes minutes once."""
    found = find_engine()
    if found.complete:
        return found
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    terminal = pytestconfig.pluginmanager.getplugin("terminalreporter")

    def report(progress: BuildProgress) -> None:
        with capture.global_and_fixture_disabled():
            terminal.write(f"\r{progress.message} {progress.done or ''}/{progress.total or ''}\x1b[K")

    return trio.run(lambda: install(report=report))


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model, in the user's cache."""
    return demo_model()
