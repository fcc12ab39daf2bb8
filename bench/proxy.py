"""What the API costs: through a node's API against the same llama-server asked directly, interleaved in one run.

    python bench/proxy.py                 through two real nodes: the API of a client node, the models on the other
    python bench/proxy.py --direct-proxy  through the HTTP side of one node only, without a mesh

Beside it, over the same llama-servers: nginx, and LiteLLM's proxy, which is installed into the cache for that. Prints
added time to first token (p50 and p99, one request at a time, the smallest model), and the ratio of requests per second
at 1, 8 and 32 parallel streams, also of a larger model, which keeps its server as busy as one does that is of use. Every
number compares rounds that alternate, so that a noisy machine hits all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from libmesh_node.models.demo import SMALL, TINY, write_model
from proxy_ends import Client, Machine, litellm, llama_server, nginx, only_proxy, quantile


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
            ways = {"API": stack.enter_context(only_proxy(tiny, [direct["tiny"]]))}
        else:
            machine = Machine(folder, stack)
            machine.start("host", "--model", str(tiny), "--model", str(small))
            ways = {"API": machine.start("client", "--client")}
            for name in ("tiny", "small"):
                machine.wait_for_servers("client", name, 1)
            direct = machine.llama_urls("host")
        if "nginx" not in options.without and (url := stack.enter_context(nginx([direct["tiny"]]))):
            ways["nginx"] = url
        if "LiteLLM" not in options.without and (url := stack.enter_context(litellm(direct))):
            ways["LiteLLM"] = url
        asyncio.run(measure(direct, ways, options.rounds, options.tokens))


async def measure(direct: dict[str, str], ways: dict[str, str], rounds: int, tokens: int) -> None:
    """Print every figure of `ways` (base URLs) against `direct` (base URLs by model)."""
    async with AsyncExitStack() as stack:

        async def client(url: str, model: str) -> Lines:
            return Lines(await stack.enter_async_context(Client.open(url)), model, tokens)

        tiny = {"direct": await client(direct["tiny"], "tiny")}
        tiny |= {way: await client(url, "tiny") for way, url in ways.items()}
        for lines in tiny.values():
            await lines.run(streams=4, requests=16)
        first: dict[str, list[float]] = {way: [] for way in tiny}
        for _ in range(rounds):
            for way, lines in tiny.items():
                first[way] += await lines.run(streams=1, requests=30)
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            plain = quantile(first["direct"], share) * 1000
            print(f"time to first token {name}: direct {plain:.2f} ms", end="")
            for way in ways:
                taken = quantile(first[way], share) * 1000
                print(f"; {way} {taken:.2f}, added {taken - plain:.2f}", end="")
            print(flush=True)
        for streams in (1, 8, 32):
            await compare(f"requests/s of the tiny model at {streams:2} streams", tiny, streams, rounds)
        if "small" in direct:
            small = {"direct": await client(direct["small"], "small")}
            # nginx knows one server; what it costs is above
            small |= {way: await client(url, "small") for way, url in ways.items() if way != "nginx"}
            await compare("requests/s of the small model at 32 streams", small, 32, max(2, rounds // 2))


async def compare(what: str, clients: dict[str, Lines], streams: int, rounds: int) -> None:
    """Print the median rate of each."""
    rates: dict[str, list[float]] = {way: [] for way in clients}
    for _ in range(rounds):
        for way, lines in clients.items():
            began, count = time.perf_counter(), max(40, 2 * streams)
            await lines.run(streams=streams, requests=count)
            rates[way].append(count / (time.perf_counter() - began))
    plain = statistics.median(rates["direct"])
    print(f"{what}: direct {plain:.1f}", end="")
    for way in [way for way in clients if way != "direct"]:
        rate = statistics.median(rates[way])
        print(f"; {way} {rate:.1f}, ratio {rate / plain:.2f}", end="")
    print(flush=True)


class Lines:
    """Requests for `tokens` tokens of `model`, some at a time."""

    def __init__(self, client: Client, model: str, tokens: int) -> None:
        self._client = client
        messages = [{"role": "user", "content": "The mesh"}]
        self._request = {"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens}

    async def run(self, *, streams: int, requests: int) -> list[float]:
        """Make `requests` in `streams` parallel lines; return each one's seconds to the first byte of the body."""
        left = iter(range(requests))
        first: list[float] = []

        async def line() -> None:
            for _ in left:
                first.append((await self._client.ask(self._request)).first)

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(line())
        return first


if __name__ == "__main__":
    main()
