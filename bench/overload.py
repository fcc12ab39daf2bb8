"""What a node does when it is asked for ten times as much as its mesh can answer.

    python bench/overload.py              for a minute, by a client node, over the mesh, with the model on another node

First with as many requests as the server has slots: that is what it can do. Then ten times as many per second, whoever
waits or not. The same beside it through nginx over the same llama-server, which lets as many in as the node does (`limit_conn`)
and refuses the rest: what it loses is what the crowd itself takes of a machine that all share. Prints what came of
the requests by status, the rate of answers against that without the crowd, measured before and after, the time to the first
token of those let in, what each refusal cost, in CPU time, and the memory of both nodes. Only 200, 429 and 503 are right.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from libmesh_node.http.proxy import BACKLOG
from libmesh_node.http.queue import PER_SLOT
from libmesh_node.models.demo import SMALL, write_model
from proxy_ends import Machine, nginx, quantile
from proxy_load import Load, Tally, cpu_seconds, serving

CROWD = 10
SLOTS = 4
"""Of a llama-server, where nobody says otherwise."""

LOAD = "the load"

ALONE = 5.0
"""Seconds of each of the four measurements without a crowd."""


def main() -> None:
    """Set up two nodes, and ask for too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of the crowd (default 60)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per answer (default 32)")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="libmesh-bench-")))
        write_model(folder / "small.gguf", SMALL, 2)
        machine = Machine(folder, stack)
        machine.start("host", "--model", str(folder / "small.gguf"))
        url = machine.start("client", "--client")
        machine.wait_for_servers("client", "small", 1)
        server = machine.llama_urls("host")["small"]
        messages = [{"role": "user", "content": "Hello"}]
        request = {"model": "small", "messages": messages, "max_tokens": options.tokens}
        nodes = {f"{name} node": serving(machine.apis[name]) for name in ("client", "host")}
        ways = [Way("mesh", Load(url, request), nodes)]
        most = SLOTS + BACKLOG + PER_SLOT * SLOTS
        if found := stack.enter_context(nginx([server], most=most)):
            ways.append(Way("nginx", Load(found, request), {"nginx": serving(found)}))
        measure(ways, nodes, options.seconds)


def measure(ways: list[Way], nodes: dict[str, psutil.Process], seconds: float) -> None:
    """Print what came of both."""
    for _ in range(2):
        for way in ways:
            way.alone(min(ALONE, seconds))
    rate = CROWD * ways[0].usual
    before = memory(nodes)
    for way in ways:
        way.crowd(rate, seconds)
        if way is ways[0]:
            after = memory(nodes)
    for _ in range(2):
        for way in ways:
            way.alone(min(ALONE, seconds))
    for way in ways:
        print(way.told(rate, seconds))
    print(
        "memory: " + ", ".join(f"{name} {before[name]:.0f} to {after[name]:.0f} MB" for name in before),
        flush=True,
    )


@dataclass
class Way:
    """One way to the server: what was answered without and with the crowd, and what that cost the processes on it."""

    name: str
    load: Load
    stations: dict[str, psutil.Process]
    alone_seconds: float = 0.0
    alone_answers: int = 0
    alone_cpu: dict[str, float] = field(default_factory=dict)
    crowd_cpu: dict[str, float] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    in_time: int = 0

    @property
    def usual(self) -> float:
        """Answers a second without the crowd."""
        return self.alone_answers / self.alone_seconds

    def alone(self, seconds: float) -> None:
        """As many at a time as the server has slots."""
        before = self._read()
        tally = self.load.lanes(SLOTS, seconds=seconds)
        self.alone_cpu = {
            name: self.alone_cpu.get(name, 0.0) + used - before[name] for name, used in self._read().items()
        }
        self.alone_seconds += tally.seconds
        self.alone_answers += tally.statuses[200]

    def crowd(self, rate: float, seconds: float) -> None:
        """Far more."""
        before = self._read()
        self.tally = self.load.rate(rate, seconds)
        self.crowd_cpu = {name: used - before[name] for name, used in self._read().items()}
        self.in_time = sum(ended <= seconds for ended in self.tally.ended)

    def told(self, rate: float, seconds: float) -> str:
        """All of it, in words."""
        statuses = self.tally.statuses
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items(), key=str))
        wrong = sum(count for status, count in statuses.items() if status not in (200, 429, 503))
        crowded = self.in_time / seconds
        refused = statuses.total() - statuses[200]
        each = [
            f"{name} {(self.crowd_cpu[name] - used / self.alone_answers * statuses[200]) / max(refused, 1) * 1000:.2f}"
            for name, used in self.alone_cpu.items()
        ]
        return (
            f"{self.name}: alone {self.usual:.1f} answers/s; asked {rate:.0f} times a second for {seconds:g} s: "
            f"{counts}; wrong: {wrong}\n"
            f"    answers/s among the crowd {crowded:.1f}, ratio {crowded / self.usual:.2f}; "
            f"first token p50 {quantile(self.tally.first, 0.5):.1f} s; CPU ms of a refusal: {', '.join(each)}"
        )

    def _read(self) -> dict[str, float]:
        return {
            name: cpu_seconds(one, family=name == "nginx")
            for name, one in (self.stations | {LOAD: psutil.Process()}).items()
        }


def memory(nodes: dict[str, psutil.Process]) -> dict[str, float]:
    """Resident MB of each node's own process."""
    return {name: one.memory_info().rss / 1e6 for name, one in nodes.items()}


if __name__ == "__main__":
    main()
