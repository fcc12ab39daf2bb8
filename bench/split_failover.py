"""How long a split is silent when a part of it dies: from kill -9 to the next answer, less the time to load the model.

    python bench/split_failover.py                  three nodes with 0.4 GB each, a model of 506 MB
    python bench/split_failover.py --rounds 3

Killed in turn, each in the middle of an answer: the worker's rpc-server, the worker's node, the host's llama-server, the
host's node. Asked is a node that stays. Who died is started again before the next.
The peer program is the same llama-server, asked how long it takes to load the model anew: as its node logs it, from its
start to its first sign of health, in the very recovery that is measured. What is left is ours: to notice, to agree on
a placement, to ask the workers, to route.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libmesh_node.models.demo import MEDIUM, write_model

from tests.node.nodes import Json, Machine, Node

LIMIT = 120.0


def say(text: str) -> None:
    print(text, flush=True)


def ask(node: Node, tokens: int) -> bool:
    """Whether a node answers for the model now."""
    body = {"model": "medium", "max_tokens": tokens, "messages": [{"role": "user", "content": "Once"}]}
    try:
        return httpx.post(f"{node.api}/v1/chat/completions", json=body, timeout=LIMIT).status_code == 200
    except httpx.HTTPError:
        return False


class Town:
    """Three nodes, whichever of them are alive."""

    def __init__(self, machine: Machine, model: Path) -> None:
        self._machine, self._flags = machine, ("--model", str(model), "--max-vram", "0.4", "--verbose")
        first = machine.node(*self._flags).up()
        self._token = first.invite("--scope", "worker")
        self.nodes = [first, *[machine.node(*self._flags, "--join", self._token).up() for _ in range(2)]]
        self.ready()

    def ready(self) -> None:
        """Wait until all nodes answer, and one of them is the host."""
        for node in self.nodes:
            node.sees("medium", limit=LIMIT)
        while not all(ask(node, 1) for node in self.nodes):
            time.sleep(0.5)
        time.sleep(2)

    def of(self, status: str) -> Node:
        """The node that is in this state."""
        return next(node for node in self.nodes if node.status()["node_status"] == status)

    def replace(self, node: Node) -> None:
        """A node that was killed comes back with its data."""
        self.nodes.remove(node)
        self.nodes.append(self._machine.node(*self._flags, name=node.folder.name).up())


def process_of(node: Node, name: str) -> int:
    found: list[Json] = [entry for entry in node.status()["processes"] if entry["name"] == name]
    return int(next(entry["pid"] for entry in found if entry["pid"]))


VICTIMS: dict[str, tuple[str, str]] = {
    "the worker's rpc-server": ("Worker (split)", "rpc-server"),
    "the worker's node": ("Worker (split)", ""),
    "the host's llama-server": ("Serving (split)", "llama-server"),
    "the host's node": ("Serving (split)", ""),
}


def measure(town: Town, status: str, name: str) -> tuple[float, float]:
    """Seconds from the death to the next answer, and of these how long the llama-server that gave it had loaded."""
    victim = town.of(status)
    other = next(node for node in town.nodes if node is not victim)
    victim.note_family()
    threading.Thread(target=ask, args=(other, 2000), daemon=True).start()
    time.sleep(1.0)
    loading = Loading([node for node in town.nodes if name or node is not victim])
    killed = time.monotonic()
    os.kill(process_of(victim, name) if name else victim.pid, signal.SIGKILL)
    with loading:
        while not (loading.over and ask(other, 1)):
            assert time.monotonic() - killed < LIMIT, f"no answer after {LIMIT:g} s"
            time.sleep(0.02)
        silent = time.monotonic() - killed
    if not name:
        victim.process.wait(LIMIT)
        victim.leaves_nobody()
        town.replace(victim)
    town.ready()
    return silent, loading.seconds


class Loading:
    """Watches for the llama-server that is new, from its first moment until it is healthy."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes, self._ended = nodes, threading.Event()
        self._before = {pid for node in nodes for pid in _servers(node)}
        self._began: dict[int, float] = {}
        self._healthy: dict[int, float] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Loading:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            for node in self._nodes:
                with suppress(httpx.HTTPError):
                    for entry in node.status()["processes"]:
                        if entry["name"] != "llama-server" or entry["pid"] in (None, *self._before):
                            continue
                        seen = self._healthy if entry["status"] == "ready" else self._began
                        seen.setdefault(entry["pid"], time.monotonic())

    @property
    def over(self) -> bool:
        """Whether another llama-server than before is healthy."""
        return bool(self._healthy)

    @property
    def seconds(self) -> float:
        """How long it loaded, as far as that was seen."""
        return min(
            (at - self._began[pid] for pid, at in self._healthy.items() if pid in self._began), default=0.0
        )


def main() -> None:
    """Print a line for each way to die."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "medium.gguf"
        write_model(model, MEDIUM, 7)
        machine = Machine(Path(folder))
        try:
            town = Town(machine, model)
            for what, (status, name) in VICTIMS.items():
                found = [measure(town, status, name) for _ in range(rounds)]
                silent, load = (statistics.median(column) for column in zip(*found, strict=True))
                ratio = f", {silent / load:.1f} times the load" if load else ""
                say(f"{what:24} killed: silent for {silent:5.2f} s, of which loading {load:5.2f} s{ratio}")
            say(f"llama-servers now: {sum(len(_servers(node)) for node in town.nodes)}")
        finally:
            _quietly(machine.close)


def _servers(node: Node) -> list[int]:
    children = psutil.Process(node.pid).children(recursive=True)
    return [child.pid for child in children if child.name() == "llama-server"]


def _quietly(close: Callable[[], None]) -> None:
    """Without what the nodes said."""
    with Path(os.devnull).open("w") as nowhere:
        said, sys.stdout = sys.stdout, nowhere
        try:
            close()
        finally:
            sys.stdout = said


if __name__ == "__main__":
    main()
