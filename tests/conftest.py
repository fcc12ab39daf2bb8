"""What tests of every folder share: the real llama.cpp programs, and the demo model."""

from __future__ import annotations

import signal
from pathlib import Path

import hypothesis
import pytest
import trio
from libmesh_node.llama.build import BuildProgress, install
from libmesh_node.llama.engine import Engine, find_engine
from libmesh_node.models.demo import demo_model

# No test fails for being slow: a machine may have other things to do.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# A shell that runs the suite in the background has it ignore Ctrl-C, and all that it starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup, the same goes for SIGHUP. The suite itself still goes on when its terminal is closed.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Engine:
    """Real llama-server and rpc-server: found, or else built into the user's cache, which takes minutes once."""
    found = find_engine()
    if found.complete:
        return found
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    terminal = pytestconfig.pluginmanager.getplugin("terminalreporter")

    said = ""

    def report(progress: BuildProgress) -> None:
        nonlocal said
        tenths = f" {progress.done * 10 // progress.total}0 %" if progress.total else ""
        if said != (said := progress.message + tenths):
            with capture.global_and_fixture_disabled():
                terminal.write_line(said)

    return trio.run(lambda: install(report=report))


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model, in the user's cache."""
    return demo_model()
