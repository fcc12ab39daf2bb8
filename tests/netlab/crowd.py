"""Members of one mesh on hosts of the lab, each a process (`peer.py`), and what they answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.netlab.lab import PORT, Host

PATIENCE = 90.0
"""Seconds for anything to happen on a busy machine."""

_ROOT = Path(__file__).resolve().parents[2]


class Forks:
    """A process that has libmesh loaded and forks peers. A context manager; peers that still run end with their stdin."""

    def __init__(self) -> None:
        self._near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.netlab.peer", str(far.fileno())],
                pass_fds=[far.fileno()],
                cwd=_ROOT,
                start_new_session=True,
            )
        self._lock = threading.Lock()

    def fork(self, order: dict[str, Any], files: list[int]) -> int:
        """Have a peer started; its pid."""
        with self._lock:
            socket.send_fds(self._near, [json.dumps(order).encode()], files)
            return int(self._near.recv(64))

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._near.close()
        self._process.kill()
        self._process.wait()


class LabPeer:
    """One member. Threads may give it orders at the same time."""

    def __init__(
        self, forks: Forks, host: Host, folder: Path, *, invite: str = "", port: int = PORT, **options: Any
    ) -> None:
        self.host = host
        self.id, self.invite = "", ""
        self._log = folder / f"{host.name}.{time.monotonic_ns()}.log"
        self._lock = threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self._orders = 0
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self._stdin, self._stdout = os.fdopen(ours_out, "w"), os.fdopen(ours_in)
        order = {"port": port, **options, **({"invite": invite} if invite else {})}
        with self._log.open("wb") as said:
            files = [theirs_in, theirs_out, said.fileno()]
            self.pid = forks.fork({"namespace": host.namespace.file, "options": order}, files)
        os.close(theirs_in)
        os.close(theirs_out)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def up(self) -> LabPeer:
        """Wait until it has said who it is."""
        wait_for(lambda: self.id, f"{self.host.name} to start", self.words)
        return self

    def words(self) -> str:
        """What it logged."""
        return self._log.read_text(errors="replace")

    def _read(self) -> None:
        for line in self._stdout:
            answer = json.loads(line)
            with self._lock:
                if "peer" in answer:
                    self.invite, self.id = answer["invite"], answer["peer"]
                else:
                    self._answers[answer["id"]] = answer
                self._lock.notify_all()

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order; the answer."""
        with self._lock:
            self._orders += 1
            number = self._orders
            self._stdin.write(f"{json.dumps({'id': number, 'do': do, **order})}\n")
            self._stdin.flush()
            if not self._lock.wait_for(lambda: number in self._answers, PATIENCE):
                raise AssertionError(f"{self.host.name} did not {do} {order}:\n{self.words()}")
            return self._answers.pop(number)

    def until(self, do: str, holds: Callable[[dict[str, Any]], Any], **order: Any) -> dict[str, Any]:
        """The first answer for which `holds`."""
        last: dict[str, Any] = {}

        def look() -> bool:
            nonlocal last
            last = self.ask(do, **order)
            return bool(holds(last))

        wait_for(look, f"{self.host.name}: {do} {order}", lambda: f"{last}\n{self.words()}", pause=0.1)
        return last

    def close(self) -> None:
        """Kill it."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._reader.join(10)
        self._stdout.close()
        with suppress(BrokenPipeError):
            self._stdin.close()


def wait_for(holds: Callable[[], Any], what: str, words: Callable[[], str], pause: float = 0.02) -> None:
    """Ask `holds` until it is true; fails after `PATIENCE`, with `words`."""
    start = time.monotonic()
    while not holds():
        if time.monotonic() - start > PATIENCE:
            raise AssertionError(f"{what}: not within {PATIENCE:g} s\n{words()}")
        time.sleep(pause)
