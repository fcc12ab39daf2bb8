"""What the API costs: through a node's API against the same llama-server asked directly, interleaved in one run.

    python bench/proxy.py                 through two real nodes: the API of a client node, the models on the other
    python bench/proxy.py --direct-proxy  through the HTTP side of one node only, without a mesh

Beside it, over the same llama-servers: nginx, and LiteLLM's proxy, which is installed into the cache for that. Prints
added time to first token (p50 and p99, one request at a time, the smallest model), and the ratio of requests per second
at 1, 8 and 32 parallel streams, also of a larger model, which keeps its server as busy as one does that is of use. Every
number compares rounds that alternate, so that a noisy machine hits all alike. Where the cores are taken, each way costs the
server as much as it uses of them: so with each rate stands the CPU time of a request in every process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from libmesh_node.models.demo import SMALL, TINY, write_model
from proxy_ends import KEY, Machine, litellm, llama_server, nginx, only_proxy, quantile
from proxy_load import Load, Tally, cpu_seconds, serving

SERVER = "llama-server"
MORE = 64
"""Tokens of a longer answer, to tell what one more costs."""


@dataclass(frozen=True)
class Way:
    """One way to the servers.

    Attributes:
        url: where to ask.
        stations: the processes on the way, by what they are; those of nginx and LiteLLM with their children.
    """

    url: str
    stations: dict[str, psutil.Process] = field(default_factory=dict)


def main() -> None:
    """Set up what is compared, and compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--direct-proxy", action="store_true", help="only the proxy of one node, without a mesh"
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds per figure (default 6)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per answer (default 16)")
    parser.add_argument("--without", action="append", default=[], choices=["nginx", "LiteLLM"])
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="libmesh-bench-")))
        tiny, small = folder / "tiny.gguf", folder / "small.gguf"
        write_model(tiny, TINY, 1)
        write_model(small, SMALL, 2)
        if options.direct_proxy:
            direct = {"tiny": stack.enter_context(llama_server(tiny))[0]}
            url = stack.enter_context(only_proxy(tiny, [direct["tiny"]]))
            ways = {"API": Way(url, {"node": serving(url)})}
        else:
            machine = Machine(folder, stack)
            machine.start("host", "--model", str(tiny), "--model", str(small))
            url = machine.start("client", "--client")
            for name in ("tiny", "small"):
                machine.wait_for_servers("client", name, 1)
            direct = machine.llama_urls("host")
            nodes = {f"{name} node": serving(machine.apis[name]) for name in ("client", "host")}
            ways = {"API": Way(url, nodes)}
        if "nginx" not in options.without and (found := stack.enter_context(nginx([direct["tiny"]]))):
            ways["nginx"] = Way(found, {"nginx": serving(found)})
        if "LiteLLM" not in options.without and (found := stack.enter_context(litellm(direct))):
            ways["LiteLLM"] = Way(found, {"LiteLLM": serving(found)})
        measure(direct, ways, options.rounds, options.tokens)


def measure(direct: dict[str, str], others: dict[str, Way], rounds: int, tokens: int) -> None:
    """Print every figure of `others` against `direct` (base URLs by model)."""
    ways = {"direct": Way(direct["tiny"])} | others
    tiny = {way: Asked(one, direct["tiny"], "tiny", tokens) for way, one in ways.items()}
    for asked in tiny.values():
        asked.run(streams=4, requests=16)
    first: dict[str, list[float]] = {way: [] for way in tiny}
    for _ in range(rounds):
        for way, asked in tiny.items():
            first[way] += asked.run(streams=1, requests=30).first
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        plain = quantile(first["direct"], share) * 1000
        print(f"time to first token {name}: direct {plain:.2f} ms", end="")
        for way in others:
            taken = quantile(first[way], share) * 1000
            print(f"; {way} {taken:.2f}, added {taken - plain:.2f}", end="")
        print(flush=True)
    for streams in (1, 8, 32):
        compare(f"requests/s of the tiny model at {streams:2} streams", tiny, streams, rounds)
    longer = {way: Asked(one, direct["tiny"], "tiny", MORE) for way, one in ways.items() if way != "direct"}
    for asked in [*tiny.values(), *longer.values()]:
        asked.forget()
    for _ in range(rounds):
        for way in longer:
            for asked in (tiny[way], longer[way]):
                asked.run(streams=8, requests=64)
    said = [f"{way} {(longer[way].cpu - tiny[way].cpu) / (MORE - tokens) * 1e6:.0f}" for way in longer]
    print(f"CPU µs of each token more: {', '.join(said)}", flush=True)
    if "small" in direct:
        # nginx knows one server; what it costs is above
        larger = {"direct": Way(direct["small"])} | {way: others[way] for way in others if way != "nginx"}
        small = {way: Asked(one, direct["small"], "small", tokens) for way, one in larger.items()}
        compare("requests/s of the small model at 32 streams", small, 32, max(2, rounds // 2))


def compare(what: str, asked: dict[str, Asked], streams: int, rounds: int) -> None:
    """Print the median rate of each, and what a request cost."""
    rates: dict[str, list[float]] = {way: [] for way in asked}
    for one in asked.values():
        one.forget()
    for _ in range(rounds):
        for way, one in asked.items():
            began, count = time.perf_counter(), max(40, 2 * streams)
            one.run(streams=streams, requests=count)
            rates[way].append(count / (time.perf_counter() - began))
    plain = statistics.median(rates["direct"])
    print(f"{what}: direct {plain:.1f}", end="")
    for way in [way for way in asked if way != "direct"]:
        rate = statistics.median(rates[way])
        print(f"; {way} {rate:.1f}, ratio {rate / plain:.2f}", end="")
    print(
        "\n    CPU ms of a request:",
        "; ".join(f"{way} {one.costs}" for way, one in asked.items()),
        flush=True,
    )


class Asked:
    """Requests for `tokens` tokens of `model`, whose server is at `server`, on one way; and what they cost."""

    def __init__(self, way: Way, server: str, model: str, tokens: int) -> None:
        messages = [{"role": "user", "content": "The mesh"}]
        request = {"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens}
        self._load = Load(way.url, request, KEY)
        self._stations = way.stations | {SERVER: serving(server)}
        self.forget()

    def forget(self) -> None:
        """Count the costs anew."""
        self._requests = 0
        self._used: defaultdict[str, float] = defaultdict(float)

    def run(self, *, streams: int, requests: int) -> Tally:
        """Make `requests` in `streams` parallel lines. Exits if one of them fails: it would cost less."""
        before = self._read()
        tally = self._load.lanes(streams, requests=requests)
        if tally.statuses[200] != requests:
            raise SystemExit(f"not all were answered: {dict(tally.statuses)}")
        for name, used in self._read().items():
            self._used[name] += used - before[name]
        self._requests += requests
        return tally

    def _read(self) -> dict[str, float]:
        families = ("nginx", "LiteLLM")  # a node's children are its llama-servers
        return {name: cpu_seconds(one, family=name in families) for name, one in self._stations.items()}

    @property
    def cpu(self) -> float:
        """Seconds that a request took of the processes on the way, beside its server."""
        return sum(used for name, used in self._used.items() if name != SERVER) / self._requests

    @property
    def costs(self) -> str:
        """Of each process, in words."""
        return " + ".join(f"{name} {used / self._requests * 1000:.2f}" for name, used in self._used.items())


if __name__ == "__main__":
    main()
