"""What clients notice when servers die: the longest gap between two tokens, and answers that never came to their end.

    python bench/failover.py              three nodes that serve one model; one is killed (-9) every 8 s, for a minute
    python bench/failover.py --streams 32 --every 4     as the chaos test, and longer

Half of the streams come by a client node's API. The other half come by nginx over the APIs of the three serving nodes,
which passes a request on when a server cannot be reached, and knows nothing of tokens: the peer program. Both are asked
for the same, in the same run, while the same nodes die. Before that, both are asked for a while without deaths.

Each lane asks its own question again and again, at temperature 0, and its text is compared with that of the question asked
alone. llama.cpp rounds otherwise when it computes several answers together, so some differ in peace, too: an answer that
went on elsewhere is as good as others if no more of them differ among deaths.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from proxy_ends import Client, Incomplete, Machine, nginx, quantile

SERVERS = ("server0", "server1", "server2")


@dataclass
class Tally:
    """What came of the streams that went one way. Gaps in seconds, one for each whole answer."""

    whole: int = 0
    same: int = 0  # of them, those whose text is that of the question asked alone
    cut: int = 0
    refused: Counter[int] = field(default_factory=Counter)  # by status
    gaps: list[float] = field(default_factory=list)

    def line(self) -> str:
        """For people."""
        gaps = (
            [f"{quantile(self.gaps, share) * 1000:.0f}" for share in (0.5, 0.99, 1.0)]
            if self.gaps
            else ["-"] * 3
        )
        statuses = f" ({', '.join(map(str, sorted(self.refused)))})" if self.refused else ""
        return (
            f"{self.whole} whole ({self.same} as alone), {self.cut} cut off, {self.refused.total()} refused{statuses}; "
            f"longest gap between tokens p50 {gaps[0]} ms, p99 {gaps[1]} ms, worst {gaps[2]} ms"
        )


def main() -> None:
    """Set up the nodes, and kill them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=8, help="streams at a time each way (default 8)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per answer (default 200)")
    parser.add_argument("--seconds", type=float, default=60, help="of killing (default 60)")
    parser.add_argument("--every", type=float, default=8, help="seconds between two deaths (default 8)")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="libmesh-bench-")))
        machine = Machine(folder, stack)
        for name in SERVERS:
            machine.start(name, "--model", "demo")
        ways = {"mesh": machine.start("client", "--client")}
        machine.wait_for_servers("client", "demo", len(SERVERS))
        if url := stack.enter_context(nginx([machine.apis[name] for name in SERVERS])):
            ways["nginx"] = url
        asyncio.run(measure(machine, ways, options))


async def measure(machine: Machine, ways: dict[str, str], options: argparse.Namespace) -> None:
    """Print what came of the streams, without deaths and with."""
    async with Client.open(ways["mesh"]) as client:
        alone = [(await client.ask(question(lane, options))).text for lane in range(options.streams)]
    calm = await stream(ways, options, asyncio.sleep(10), alone)
    deaths = await stream(ways, options, kill(machine, options.seconds, options.every), alone)
    for way in ways:
        print(f"{way:5} in peace:      {calm[way].line()}")
        print(f"{way:5} among deaths:  {deaths[way].line()}", flush=True)
    asked = {way: tally.whole + tally.cut + tally.refused.total() for way, tally in deaths.items()}
    lost = {way: (tally.cut + tally.refused.total()) / max(asked[way], 1) for way, tally in deaths.items()}
    print("answers lost among deaths: " + ", ".join(f"{way} {share:.1%}" for way, share in lost.items()))


def question(lane: int, options: argparse.Namespace) -> dict[str, object]:
    """What a lane asks."""
    text = f"Question {lane}: what is {lane} times {lane}?"
    messages = [{"role": "user", "content": text}]
    return {"model": "demo", "max_tokens": options.tokens, "temperature": 0, "messages": messages}


async def stream(
    ways: dict[str, str], options: argparse.Namespace, until: Awaitable[None], alone: list[str]
) -> dict[str, Tally]:
    """Keep streams going each way until the awaitable `until` is done, and let the last ones end.

    `alone` are the texts of the lanes' questions.
    """
    tallies = {way: Tally() for way in ways}
    stop = asyncio.Event()

    async def line(client: Client, tally: Tally, lane: int) -> None:
        while not stop.is_set():
            try:
                answer = await client.ask(question(lane, options))
                tally.gaps.append(answer.gap)
                tally.whole += 1
                tally.same += answer.text == alone[lane]
            except aiohttp.ClientResponseError as exc:
                tally.refused[exc.status] += 1
                await asyncio.sleep(0.1)
            except (aiohttp.ClientError, Incomplete, TimeoutError):
                tally.cut += 1

    async with AsyncExitStack() as stack:
        clients = {way: await stack.enter_async_context(Client.open(url)) for way, url in ways.items()}
        async with asyncio.TaskGroup() as group:
            for way, client in clients.items():
                for lane in range(options.streams):
                    group.create_task(line(client, tallies[way], lane))
            await until
            stop.set()
    return tallies


async def kill(machine: Machine, seconds: float, every: float) -> None:
    """Kill one serving node after the other and start it again."""
    for number in range(int(seconds / every)):
        await asyncio.sleep(every)
        name = SERVERS[number % len(SERVERS)]
        await asyncio.to_thread(machine.kill, name)
        await asyncio.to_thread(machine.start, name, "--model", "demo")
    await asyncio.sleep(every)


if __name__ == "__main__":
    main()
