"""How one node's requests spread over two servers, and how much of what both can do comes out.

    python bench/spread.py                64 parallel requests over two equal servers, then with one 4 times slower

The servers are real, with one thread each. The slow one is stopped (SIGSTOP) three quarters of the time. What is ideal is
what both answer when each is asked directly, at the same time. The peer program is nginx, over the same servers. All take turns
several times, so that what else the machine does meets each of them alike.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path

from libmesh_node.models.demo import SMALL, write_model
from proxy_ends import Client, llama_server, nginx, only_proxy

LANES = 64
STEP = 0.02


def main() -> None:
    """Measure with equal servers, and with one of them slower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="turns of each way (default 4)")
    parser.add_argument("--seconds", type=float, default=10, help="of each turn (default 10)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per answer (default 32)")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="libmesh-bench-")))
        write_model(folder / "small.gguf", SMALL, 2)
        servers = [stack.enter_context(llama_server(folder / "small.gguf")) for _ in range(2)]
        urls = [url for url, _ in servers]
        fronts = {"mesh": stack.enter_context(only_proxy(folder / "small.gguf", urls))}
        if other := stack.enter_context(nginx(urls)):
            fronts["nginx"] = other
        for what in ("equal servers", "one 4 times slower"):
            with ExitStack() as slowing:
                if what != "equal servers":
                    slowing.enter_context(slowed(servers[1][1]))
                asyncio.run(measure(what, urls, fronts, options))


async def measure(what: str, urls: list[str], fronts: dict[str, str], options: argparse.Namespace) -> None:
    """Print each front's rate against that of its servers, and the share of the first one."""
    done = {way: Counter[str]() for way in ("direct", *fronts)}
    for _ in range(options.rounds):
        for way in done:
            done[way] += await answered(urls if way == "direct" else [fronts[way]], options)
    seconds = options.rounds * options.seconds
    ideal = done.pop("direct").total() / seconds
    for way, nodes in done.items():
        got = nodes.total() / seconds
        share = f"; the larger share {max(nodes.values()) / nodes.total():.0%}" if "" not in nodes else ""
        print(
            f"{what}: {way} {got:.2f} requests/s of {ideal:.2f}, ratio {got / ideal:.2f}{share}", flush=True
        )


async def answered(urls: list[str], options: argparse.Namespace) -> Counter[str]:
    """Answers with 64 requests under way, spread evenly over `urls`, by the name of who gave them, which is empty if it is not told."""
    done: Counter[str] = Counter()
    began = time.perf_counter()

    async def lane(client: Client, number: int) -> None:
        messages = [{"role": "user", "content": f"Lane {number}"}]
        request = {"model": "small", "messages": messages, "max_tokens": options.tokens}
        while time.perf_counter() - began < options.seconds:
            answer = await client.ask(request)
            if time.perf_counter() - began < options.seconds:
                done[answer.node] += 1

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client.open(url)) for url in urls]
        async with asyncio.TaskGroup() as group:
            for number in range(LANES):
                group.create_task(lane(clients[number % len(clients)], number))
    return done


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Let a process run for a quarter of the time."""
    over = threading.Event()

    def pulse() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(3 * STEP)
            os.kill(pid, signal.SIGCONT)
            over.wait(STEP)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main()
