"""Real hosts on loopback, for tests of the adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio
import trio.testing

from libmesh.net.base import NetworkEvent, Stream
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from tests.members import seed

PROTOCOL = "/test/1"
HOSTS = ("127.0.0.1",)
LOCAL = Libp2pConfig(hosts=HOSTS, admission_limit=0.3)


@asynccontextmanager
async def networks(count: int, config: Libp2pConfig = LOCAL) -> AsyncIterator[list[Libp2pNetwork]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(open_libp2p_network(seed(n + 1), config)) for n in range(count)
        ]


async def until(condition: Callable[[], object], limit: float = 60) -> None:
    """Wait for what is bound to happen."""
    with trio.fail_after(limit):
        while not condition():  # noqa: ASYNC110 - what is looked at tells nobody when it changes
            await trio.sleep(0.005)


async def join(one: Libp2pNetwork, two: Libp2pNetwork, *, admit: bool = True) -> None:
    await one.connect(two.peer, two.addresses())
    await until(lambda: two.path(one.peer))
    if admit:
        one.admit(two.peer)
        two.admit(one.peer)


async def echo(stream: Stream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def answers(near: Libp2pNetwork, far: Libp2pNetwork, protocol: str = PROTOCOL) -> None:
    """A stream to `far` works."""
    with trio.fail_after(60):
        async with await near.open_stream(far.peer, protocol) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"


async def collect(network: Libp2pNetwork, seen: list[NetworkEvent]) -> None:
    async with network.events() as events:
        async for event in events:
            seen.append(event)
