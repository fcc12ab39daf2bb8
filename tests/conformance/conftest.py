"""A peer of ours, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from libmesh.testing.conformance import Target, read_target


@pytest.fixture(scope="session")
def conformance_peer() -> Iterator[tuple[str, str]]:
    """The multiaddr of a running peer, and an invite of its mesh."""
    command = [sys.executable, "-m", "tests.conformance.peer"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture(scope="session")
def conformance_target(conformance_peer: tuple[str, str]) -> Target:
    return read_target(*conformance_peer)
