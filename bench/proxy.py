"""What the API costs: through a node's API against the same llama-server asked directly, interleaved in one run.

    python bench/proxy.py                 through two real nodes: the API of a client node, the models on the other
    python bench/proxy.py --apart         the same, with half of the cores for the host and its llama-servers, as on two machines
    python bench/proxy.py --direct-proxy  through the HTTP side of one node only, without a mesh

Beside it, over the same llama-servers: nginx, and LiteLLM's proxy, which is installed into the cache for that. Prints
added time to first token (p50 and p99, one request at a time), and the ratio of requests per second at 1, 8 and 32 parallel
streams: of a tiny model, which shows what a way costs; of one of 40 MB at 32 streams; and of one of 500 MB, the size from
which on models are of use. Every number compares rounds that alternate, so that a noisy machine hits all alike. Where the
cores are taken, each way costs the server as much as it uses of them: so with each rate stands the CPU time of a request in
every process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from libmesh_node.models.demo import MEDIUM, SMALL, TINY, write_model
from proxy_ends import KEY, Machine, litellm, llama_server, nginx, only_proxy, quantile
from proxy_load import Load, Tally, cpu_seconds, serving

MODELS = {"tiny": TINY, "small": SMALL, "medium": MEDIUM}
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
    parser.add_argument(
        "--apart",
        action="store_true",
        help="half of the cores for the host and its llama-servers, half for all else",
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds per figure (default 6)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per answer (default 16)")
    parser.add_argument("--without", action="append", default=[], choices=["nginx", "LiteLLM"])
    parser.add_argument("--only", action="append", choices=list(MODELS), help="only these models")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if options.apart and options.direct_proxy:
        parser.error("--apart is for two nodes, --direct-proxy for one")
    if options.apart and len(cores) < 2:
        parser.error("--apart needs two cores")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="libmesh-bench-")))
        files = {name: folder / f"{name}.gguf" for name in MODELS}
        for seed, (name, file) in enumerate(files.items(), 1):
            if name == "tiny" or not options.direct_proxy:
                write_model(file, MODELS[name], seed)
        if options.direct_proxy:
            direct = {"tiny": stack.enter_context(llama_server(files["tiny"]))[0]}
            url = stack.enter_context(only_proxy(files["tiny"], [direct["tiny"]]))
            api = Way(url, {"node": serving(url)})
        else:
            machine = Machine(folder, stack)
            if options.apart:  # what is started from now on inherits it
                os.sched_setaffinity(0, cores[: len(cores) // 2])
            machine.start("host", *(word for file in files.values() for word in ("--model", str(file))))
            if options.apart:
                os.sched_setaffinity(0, cores[len(cores) // 2 :])
            url = machine.start("client", "--client")
            for name in files:
                machine.wait_for_servers("client", name, 1)
            direct = machine.llama_urls("host")
            api = Way(url, {f"{name} node": serving(machine.apis[name]) for name in ("client", "host")})
        ways = {name: {"direct": Way(server), "API": api} for name, server in direct.items()}
        if "nginx" not in options.without:
            for name, server in direct.items():
                if found := stack.enter_context(nginx([server])):
                    ways[name]["nginx"] = Way(found, {"nginx": serving(found)})
        if "LiteLLM" not in options.without and (found := stack.enter_context(litellm(direct))):
            for each in ways.values():
                each["LiteLLM"] = Way(found, {"LiteLLM": serving(found)})
        asked = {
            name: {way: Asked(one, direct[name], name, options.tokens) for way, one in each.items()}
            for name, each in ways.items()
        }
        measure(asked, options.rounds, options.tokens, options.only or list(MODELS))


def measure(asked: dict[str, dict[str, Asked]], rounds: int, tokens: int, chosen: Collection[str]) -> None:
    """Print every figure of each way against `direct`, by model."""
    if "tiny" in chosen:
        measure_costs(asked["tiny"], rounds, tokens)
    for name in [name for name in ("small", "medium") if name in asked and name in chosen]:
        first_token(name, asked[name], rounds, 5)
        each = 64 if name == "small" else 32
        compare(f"requests/s of the {name} model at 32 streams", asked[name], 32, max(2, rounds // 2), each)


def measure_costs(tiny: dict[str, Asked], rounds: int, tokens: int) -> None:
    """Print what a way costs, by the model whose server does hardly anything."""
    first_token("tiny", tiny, rounds, 30)
    for streams in (1, 8, 32):
        compare(f"requests/s of the tiny model at {streams:2} streams", tiny, streams, rounds)
    longer = {way: one.longer(MORE) for way, one in tiny.items() if way != "direct"}
    for one in [*tiny.values(), *longer.values()]:
        one.forget()
    for _ in range(rounds):
        of_each(tiny, lambda one: one.run(streams=8, requests=64))
        of_each(longer, lambda one: one.run(streams=8, requests=64))
    longer = {way: one for way, one in longer.items() if way in tiny}
    said = [f"{way} {(longer[way].cpu - tiny[way].cpu) / (MORE - tokens) * 1e6:.0f}" for way in longer]
    print(f"CPU µs of each token more: {', '.join(said)}", flush=True)


def of_each(asked: dict[str, Asked], act: Callable[[Asked], Tally]) -> dict[str, Tally]:
    """What `act` does for each way. Another program that does not answer all is left out from then on; ours must."""
    told: dict[str, Tally] = {}
    for way, one in list(asked.items()):
        try:
            told[way] = act(one)
        except Unanswered as exc:
            if way in ("direct", "API"):
                raise SystemExit(f"{way}: {exc}") from None
            print(f"{way} is left out: {exc}", flush=True)
            del asked[way]
    return told


def first_token(model: str, asked: dict[str, Asked], rounds: int, requests: int) -> None:
    """Print how long each takes for the first token, `requests` a round, one at a time."""
    first: dict[str, list[float]] = {way: [] for way in asked}
    of_each(asked, lambda one: one.run(streams=4, requests=16))
    for _ in range(rounds):
        for way, tally in of_each(asked, lambda one: one.run(streams=1, requests=requests)).items():
            first[way] += tally.first
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        plain = quantile(first["direct"], share) * 1000
        print(f"time to first token of the {model} model, {name}: direct {plain:.2f} ms", end="")
        for way in [way for way in asked if way != "direct"]:
            taken = quantile(first[way], share) * 1000
            print(f"; {way} {taken:.2f}, added {taken - plain:.2f}", end="")
        print(flush=True)


def compare(what: str, asked: dict[str, Asked], streams: int, rounds: int, count: int = 64) -> None:
    """Print the median rate of each, in rounds of `count` requests, and what one cost."""
    rates: dict[str, list[float]] = {way: [] for way in asked}
    for one in asked.values():
        one.forget()
    for _ in range(rounds):
        for way, tally in of_each(asked, lambda one: one.run(streams=streams, requests=count)).items():
            rates[way].append(count / tally.seconds)
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


class Unanswered(Exception):
    """Not all requests were answered."""


class Asked:
    """Requests for `tokens` tokens of `model`, whose server is at `server`, on one way; and what they cost."""

    def __init__(self, way: Way, server: str, model: str, tokens: int) -> None:
        self._way, self._server, self._model = way, server, model
        messages = [{"role": "user", "content": "The mesh"}]
        request = {"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens}
        self._load = Load(way.url, request, KEY)
        self._stations = way.stations | {SERVER: serving(server)}
        self.forget()

    def longer(self, tokens: int) -> Asked:
        """The same, for so many tokens."""
        return Asked(self._way, self._server, self._model, tokens)

    def forget(self) -> None:
        """Count the costs anew."""
        self._requests = 0
        self._used: defaultdict[str, float] = defaultdict(float)

    def run(self, *, streams: int, requests: int) -> Tally:
        """Make `requests` in `streams` parallel lines. Raises `Unanswered` if one of them fails: it would cost less."""
        before = self._read()
        tally = self._load.lanes(streams, requests=requests)
        if tally.statuses[200] != requests:
            raise Unanswered(f"{requests} requests in {streams} lines: {dict(tally.statuses)}")
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
