"""Connects to one peer and disconnects again, thousands of times, and tells what that peer still holds: tasks, files, memory.

    python bench/churn.py [COUNT]            two thousand unless told

Twenty peers do it at once, each anew under another identity after every fiftieth time. What is held at the end is compared
with what was held after the first tenth, when caches are full. The last line is their ratio: 1.00 is no growth.
"""

from __future__ import annotations

import argparse
import gc
import sys
from functools import partial
from itertools import count

import psutil
import trio

from libmesh.net.base import Stream
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network

AT_ONCE = 20
EACH = 50
HOSTS = Libp2pConfig(hosts=("127.0.0.1",))
ECHO = "/churn/echo/1.0.0"


async def echo(stream: Stream) -> None:
    """Give back what comes."""
    async for data in stream:
        await stream.send_all(data)


async def come_and_go(hub: Libp2pNetwork, identity: int, times: int) -> None:
    """Connect, say a word, and leave."""
    async with open_libp2p_network(identity.to_bytes(32, "big"), HOSTS) as network:
        for _ in range(times):
            with trio.fail_after(60):
                await network.connect(hub.peer, hub.addresses())
                stream = await network.open_stream(hub.peer, ECHO)
                await stream.send_all(b"x")
                if await stream.receive_some() != b"x":
                    raise AssertionError("not the byte that was sent")
                await stream.aclose()
                await network.disconnect(hub.peer)


async def held(hub: Libp2pNetwork) -> tuple[int, int, float]:
    """Tasks, files and MiB of this process, when all are gone."""
    with trio.fail_after(60):
        while hub._connections.peers:  # noqa: ASYNC110 - nobody tells when the last one is out of the books
            await trio.sleep(0.05)
    await trio.sleep(1)
    gc.collect()
    process = psutil.Process()
    return (
        trio.lowlevel.current_statistics().tasks_living,
        process.num_fds(),
        process.memory_info().rss / (1 << 20),
    )


async def main(total: int) -> None:
    """Do it in ten parts, and say what is held after each."""
    identities = count(1000)
    async with open_libp2p_network(bytes(31) + b"\x01", HOSTS) as hub:
        hub.set_handler(ECHO, echo, admitted_only=False)
        found: list[tuple[int, int, float]] = []
        for part in range(1, 11):
            begun = trio.current_time()
            places = trio.CapacityLimiter(AT_ONCE)

            async def one(identity: int, places: trio.CapacityLimiter = places) -> None:
                async with places:
                    await come_and_go(hub, identity, EACH)

            async with trio.open_nursery() as nursery:
                for _ in range(total // 10 // EACH):
                    nursery.start_soon(partial(one, next(identities)))
            took = trio.current_time() - begun
            found.append(await held(hub))
            tasks, files, memory = found[-1]
            sys.stdout.write(
                f"{part * total // 10:>6} connects: {tasks} tasks, {files} files, {memory:.0f} MiB, {1000 * took / (total / 10):.1f} ms each\n"
            )
            sys.stdout.flush()
    ratios = " ".join(f"{last / first:.2f}" for first, last in zip(found[0], found[-1], strict=True))
    sys.stdout.write(f"held at the end against after the first tenth (tasks, files, memory): {ratios}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "count", type=int, nargs="?", default=2_000, help="connects, from 500 (default: 2000)"
    )
    if (connects := parser.parse_args().count) < 10 * EACH:
        parser.error(f"it takes at least {10 * EACH}, so that each tenth is one peer's turn")
    trio.run(main, connects)
