"""Real nodes as child processes: started, asked, told, killed, and looked at from outside.

Nothing here knows the inside of a node: what a test learns, it learns from the files, ports and exit codes that people
have too. Every wait has a limit, which is patience
and no promise: how fast a node is, `bench/` tells. What a node said on stderr is printed when its test is over, so that a failing test shows it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

Json = dict[str, Any]

PATIENCE = 60.0
"""Seconds to wait for whatever is bound to happen, however busy the machine is."""


def wait_for(holds: Callable[[], Any], limit: float, what: str) -> Any:
    """The first true value of `holds`, asked every 20 ms; fails the test after `limit` seconds."""
    start = time.monotonic()
    while not (value := holds()):
        assert time.monotonic() - start < limit, f"{what}: not within {limit:g} s"
        time.sleep(0.02)
    return value


def command(*arguments: str, limit: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run `libmesh-node` with `arguments` to its end."""
    argv = [sys.executable, "-m", "libmesh_node", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=limit, check=False)


class Node:
    """One `libmesh-node` process on the data folder `folder`. Started by `Machine.node`."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self.folder = folder
        self.said = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.stderr")
        argv = [sys.executable, "-m", "libmesh_node", "--port", "0", "--console", "0"]
        argv += [] if "--ephemeral" in flags else ["--data-dir", str(folder)]
        self.started = time.monotonic()
        with self.said.open("wb") as output:
            # Its own session, so that a signal sent to the node reaches the node alone.
            self.process = subprocess.Popen(
                [*argv, *flags],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._family: dict[int, psutil.Process] = {}
        self._info: Json = {}

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def words(self) -> str:
        return self.said.read_text(errors="replace")

    # ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────

    def up(self, limit: float = PATIENCE) -> Node:
        """Wait until its console and API listen."""
        wait_for(lambda: self._read_info() or self.process.poll() is not None, limit, "node.json")
        assert self.process.poll() is None, f"the node ended with {self.process.returncode}:\n{self.words}"
        return self

    def _read_info(self) -> bool:
        try:
            info = json.loads((self.folder / "node.json").read_text())
        except (OSError, ValueError):
            return False
        self._info = info if info["pid"] == self.pid else {}
        return bool(self._info)

    @property
    def api_port(self) -> int:
        return int(self._info["api_port"])

    @property
    def console_port(self) -> int:
        return int(self._info["console_port"])

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def console(self) -> str:
        return f"http://127.0.0.1:{self.console_port}"

    def status(self) -> Json:
        status: Json = httpx.get(f"{self.console}/api/status", timeout=PATIENCE).json()
        return status

    def post(self, path: str, body: Json, limit: float = PATIENCE) -> httpx.Response:
        """Give the console a command."""
        return httpx.post(self.console + path, json=body, timeout=limit)

    def until(self, holds: Callable[[Json], Any], limit: float = PATIENCE, what: str = "the status") -> Json:
        """The first status for which `holds`."""

        def look() -> Json | None:
            assert self.process.poll() is None, (
                f"the node ended with {self.process.returncode}:\n{self.words}"
            )
            try:
                status = self.status()
            except httpx.TransportError:  # it is busy, or ending; the next look tells
                return None
            return status if holds(status) else None

        found: Json = wait_for(look, limit, what)
        return found

    def ready(self) -> Node:
        """Wait until its own first model answers."""
        self.up().until(lambda status: status["llama_ready"], what="llama_ready")
        return self

    def sees(self, *models: str, limit: float = PATIENCE) -> Node:
        """Wait until all `models` are served somewhere, as far as it knows."""
        self.up().until(lambda status: set(models) <= served(status), limit, f"{models} served")
        return self

    @property
    def node_id(self) -> str:
        return str(self.status()["node_id"])

    @contextmanager
    def openai(self) -> Iterator[openai.OpenAI]:
        """The real client, without its own retries, which would hide ours."""
        with openai.OpenAI(
            base_url=f"{self.api}/v1", api_key="unused", max_retries=0, timeout=PATIENCE
        ) as client:
            yield client

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A `libmesh-node` command to this node."""
        return command(*arguments, "--data-dir", str(self.folder))

    def invite(self, *flags: str) -> str:
        """A token of this node's mesh; waits until it is in one."""
        self.until(lambda status: status["mesh_id"])
        done = self.run("invite", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    # ── what is done to it ───────────────────────────────────────────────────────────────────────────────────────

    def note_family(self) -> list[psutil.Process]:
        """All processes that it has started, whichever of them later lose their parent."""
        try:
            for child in psutil.Process(self.pid).children(recursive=True):
                self._family[child.pid] = child
        except psutil.NoSuchProcess:
            pass
        return list(self._family.values())

    def llama_pid(self) -> int:
        """The process of its first llama-server."""
        return int(self.status()["processes"][0]["pid"])

    def kill(self) -> None:
        """kill -9, and see that nothing that it started is left."""
        self.note_family()
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        self.leaves_nobody()

    def leaves_nobody(self) -> None:
        """Fail if a child of the ended node goes on running."""
        wait_for(lambda: not any(map(runs, self._family.values())), PATIENCE, "orphans gone")

    def ends(self, how: int | Callable[[], object]) -> None:
        """Send a signal, or call `how`, and see that it ends with 0 and leaves nobody."""
        self.note_family()
        if callable(how):
            how()
        else:
            os.kill(self.pid, how)
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the node still runs after {PATIENCE:g} s:\n{self.words}") from None
        self.leaves_nobody()
        assert code == 0, f"exit code {code}:\n{self.words}"

    def fails(self, limit: float = PATIENCE) -> str:
        """Wait until it gives up by itself with exit code 1; its last line."""
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the node still runs after {limit:g} s:\n{self.words}") from None
        assert code == 1, f"exit code {code}:\n{self.words}"
        assert "Traceback" not in self.words, self.words
        assert "Internal error" not in self.words, self.words
        return self.words.strip().splitlines()[-1]


class Machine:
    """The nodes of one test, each with a data folder under `root`. `close` ends those that still run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: list[Node] = []

    def node(self, *flags: str, name: str | None = None) -> Node:
        """Start a node. The same `name` again means the same data folder."""
        self.nodes.append(node := Node(self.root / (name or f"node{len(self.nodes)}"), flags))
        return node

    def serving(self, *flags: str, name: str | None = None) -> Node:
        """A ready node with the demo model, that writes its invite to a file."""
        node = self.node("--model", "demo", "--invite-file", str(self.invite_file), *flags, name=name)
        return node.ready()

    @property
    def invite_file(self) -> Path:
        return self.root / "invite"

    def joining(self, *flags: str, name: str | None = None) -> Node:
        """A node that joins with that file."""
        return self.node("--join", f"@{self.invite_file}", *flags, name=name)

    def close(self) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.note_family()
                node.process.terminate()
        for node in self.nodes:
            try:
                node.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait(5)
            for child in node.note_family():
                if runs(child):
                    child.kill()
            ending = f"ended with {node.process.returncode}, and said:"
            sys.stdout.write(f"── {node.folder.name} (pid {node.pid}) {ending}\n{node.words}\n")


def runs(process: psutil.Process) -> bool:
    """Whether it exists and is not merely waiting to be reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def served(status: Json) -> set[str]:
    """The models in a status that somebody serves now."""
    return {model["name"] for model in status["mesh_models"] if model["status"] == "warm"}


def peer(status: Json, node_id: str) -> Json:
    """What a status says of one peer; empty if it does not know it."""
    found: Json = next((entry for entry in status["peers"] if entry["id"] == node_id), {})
    return found


def chat(node: Node, model: str = "demo", tokens: int = 5, limit: float = PATIENCE) -> httpx.Response:
    """Ask a model over a node's API."""
    body = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": "Hello?"}]}
    return httpx.post(f"{node.api}/v1/chat/completions", json=body, timeout=limit)


def llama(node: Node, path: str) -> httpx.Response:
    """What its first llama-server itself says."""
    port = node.status()["processes"][0]["port"]
    return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE)


def tokens_made(node: Node) -> int:
    """How many its first llama-server has made for answers that it finished."""
    said = llama(node, "/metrics").text
    found = re.search(r"^llamacpp:tokens_predicted_total (\S+)$", said, re.MULTILINE)
    assert found is not None, said
    return int(float(found.group(1)))


def p2p_port(node: Node) -> int:
    """Where it accepts peers."""
    addresses = node.until(lambda status: status["addresses"])["addresses"]
    return int(addresses[0].split("/tcp/")[1].split("/")[0])


def dial(port: int) -> socket.socket:
    """A plain TCP connection to this machine, with a limit to each wait."""
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
