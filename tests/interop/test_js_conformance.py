"""The js peer of the examples keeps every rule of the conformance suite, as a member that invited nobody.

It was let in by a peer of ours, and the suite's own peers come with an invite of the same mesh.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from libmesh.testing.conformance import Target, read_target
from libmesh.testing.conformance.cases import test_rule

__all__ = ["test_rule"]

pytestmark = pytest.mark.slow

Lines = subprocess.Popen[str]


@pytest.fixture(scope="session")
def conformance_target(js_peer_command: list[str]) -> Iterator[Target]:
    founder = [sys.executable, "-m", "tests.conformance.peer"]
    with subprocess.Popen(founder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            _, token = _line(process), _line(process)
            command = [*js_peer_command, token, "--expose-to-workers", "for workers=127.0.0.1:9"]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as js:
                try:
                    while not (line := _line(js)).startswith("you are"):
                        pass
                    yield read_target(line.split()[-1], token)
                finally:
                    js.kill()
        finally:
            process.kill()


def _line(process: Lines) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "it ended"
    return line.strip()
