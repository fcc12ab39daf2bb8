"""What a node does when it is asked for ten times as much as its mesh can answer.

    python bench/overload.py              for a minute, by a client node, over the mesh, with the model on another node

First with as many requests as the server has slots: that is what it can do. Then ten times as many per second, whoever
waits or not. Prints what came of them by status, the rate of answers against that of before, how the first token's time of
those let in grew, and the memory of both nodes. Only 200, 429 and 503 are right. There is no peer program here: the peer is
the same mesh without the crowd.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import psutil
from libmesh_node.models.demo import SMALL, write_model
from proxy_ends import Client, Incomplete, Machine, quantile

CROWD = 10


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
        asyncio.run(measure(machine, url, options))


async def measure(machine: Machine, url: str, options: argparse.Namespace) -> None:
    """Print what came of both."""
    messages = [{"role": "user", "content": "Hello"}]
    request = {"model": "small", "messages": messages, "max_tokens": options.tokens}
    async with Client.open(url) as client:
        await client.ask(request)
        usual, _ = await closed(client, request, min(10.0, options.seconds))
        before = memory(machine)
        rate = CROWD * usual
        statuses, first, crowded = await opened(client, request, rate, options.seconds)
        after = memory(machine)
    counts = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items(), key=str))
    print(f"alone {usual:.1f} answers/s; asked {rate:.0f} times a second for {options.seconds:g} s: {counts}")
    print(
        f"answers/s among the crowd {crowded:.1f}, ratio {crowded / usual:.2f}; first token p50 {quantile(first, 0.5):.1f} s"
    )
    grown = ", ".join(f"{name} {before[name]:.0f} to {after[name]:.0f} MB" for name in before)
    wrong = sum(count for status, count in statuses.items() if status not in (200, 429, 503))
    print(f"memory: {grown}; wrong answers: {wrong}", flush=True)


async def closed(client: Client, request: dict[str, object], seconds: float) -> tuple[float, list[float]]:
    """Answers per second with four requests under way at any time, and their seconds to the first token."""
    first: list[float] = []
    began = time.perf_counter()

    async def lane() -> None:
        while time.perf_counter() - began < seconds:
            first.append((await client.ask(request)).first)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(lane())
    return len(first) / (time.perf_counter() - began), first


async def opened(
    client: Client, request: dict[str, object], rate: float, seconds: float
) -> tuple[Counter[object], list[float], float]:
    """`rate` requests a second, whatever becomes of them: statuses, seconds to first tokens, and answers per second."""
    statuses: Counter[object] = Counter()
    first: list[float] = []
    in_time = 0
    began = time.perf_counter()

    async def one() -> None:
        nonlocal in_time
        try:
            first.append((await client.ask(request)).first)
            statuses[200] += 1
            in_time += time.perf_counter() - began < seconds
        except aiohttp.ClientResponseError as exc:
            statuses[exc.status] += 1
        except (aiohttp.ClientError, Incomplete, TimeoutError) as exc:
            statuses[type(exc).__name__] += 1

    async with asyncio.TaskGroup() as group:
        sent = 0
        while (now := time.perf_counter() - began) < seconds:
            while sent < now * rate:
                sent += 1
                group.create_task(one())
            await asyncio.sleep(0.01)
    return statuses, first, in_time / seconds


def memory(machine: Machine) -> dict[str, float]:
    """Resident MB of each node's own process."""
    return {name: psutil.Process(one.pid).memory_info().rss / 1e6 for name, one in machine.processes.items()}


if __name__ == "__main__":
    main()
