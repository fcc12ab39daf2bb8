"""Looking at processes and HTTP servers from outside."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio


def is_running(pid: int) -> bool:
    """Whether the process exists and is not merely waiting to be reaped."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until_gone(pid: int, limit: float = 60.0) -> None:
    """Wait until the process has ended; fails the test after `limit` seconds."""
    start = time.monotonic()
    while is_running(pid):
        waited = time.monotonic() - start
        assert waited < limit, f"process {pid} still runs after {waited:.1f} s"
        time.sleep(0.005)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def eventually(holds: Callable[[], bool], limit: float = 60.0) -> None:
    """Wait for what another process does; fails the test after `limit`."""
    with trio.fail_after(limit):
        while not await trio.to_thread.run_sync(holds):  # noqa: ASYNC110 - nobody in this process sets an event
            await trio.sleep(0.01)


def request(url: str, body: Any = None, timeout: float = 60.0) -> Any:
    """The JSON answer to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=timeout) as answer:
        return json.load(answer)
