"""Processes on the lab's hosts that answer each line of JSON with one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.netlab.lab import Host

ROOT = Path(__file__).parents[2]


class Child:
    """A process that answers each line of JSON with one."""

    def __init__(self, host: Host, *argv: str, cwd: Path) -> None:
        self._process = host.popen(
            *argv,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.hello = self._line()

    def _line(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, "it ended"
        value: dict[str, Any] = json.loads(line)
        assert "error" not in value, value
        return value

    def do(self, what: str, **how: Any) -> dict[str, Any]:
        self._process.stdin.write(f"{json.dumps({'do': what, **how})}\n")
        self._process.stdin.flush()
        return self._line()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def ours(host: Host, seed: int, **options: Any) -> Iterator[Child]:
    wish = json.dumps({"seed": seed, **options})
    child = Child(host, sys.executable, "-W", "ignore", "-m", "tests.netlab.bare", wish, cwd=ROOT)
    try:
        yield child
    finally:
        child.end()
