"""Nodes with a relay between them, on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import trio

from libmesh.core.relay_desk import RelayLimits
from libmesh.framing import receive_frame
from libmesh.net import relay_wire as wire
from libmesh.net.base import Stream
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from libmesh.net.relay_server import RelayServer
from libmesh.net.relay_wire import Answer, Connect, Reserve
from libmesh.peers import PathKind
from tests.members import seed
from tests.net.hosts import HOSTS, LOCAL, PROTOCOL, echo, join, networks, until

RELAY = replace(LOCAL, relay=RelayLimits())


@dataclass
class Relayed:
    """A relay, somebody who has a place there, and somebody who reaches it from there."""

    relay: Libp2pNetwork
    target: Libp2pNetwork
    source: Libp2pNetwork

    @property
    def server(self) -> RelayServer:
        assert self.relay.relaying.server is not None
        return self.relay.relaying.server

    async def connect(self) -> None:
        await self.source.dial(self.target.peer, circuit_of(self.target))
        await until(lambda: kind(self.target, self.source))
        self.source.admit(self.target.peer)
        self.target.admit(self.source.peer)


def address_of(network: Libp2pNetwork) -> str:
    return f"{network.addresses()[0]}/p2p/{network.peer}"


def circuit_of(network: Libp2pNetwork) -> str:
    return next(address for address in network.addresses() if "/p2p-circuit" in address)


def kind(near: Libp2pNetwork, far: Libp2pNetwork) -> PathKind | None:
    path = near.path(far.peer)
    return path.kind if path else None


async def take_place(client: Libp2pNetwork, *relays: Libp2pNetwork) -> None:
    """Let `client` be reached through `relays`, which have admitted it."""
    for relay in relays:
        await join(client, relay)
    client.set_relays([address_of(relay) for relay in relays])
    await until(lambda: len(client.relaying.client.relays) == min(2, len(relays)))


@asynccontextmanager
async def relayed(config: Libp2pConfig = RELAY, hosts: tuple[str, ...] = HOSTS) -> AsyncIterator[Relayed]:
    ends = networks(2, replace(LOCAL, hosts=hosts))
    async with open_libp2p_network(seed(77), replace(config, hosts=hosts)) as relay, ends as (target, source):
        target.set_handler(PROTOCOL, echo)
        await take_place(target, relay)
        await join(source, relay)
        yield Relayed(relay, target, source)


@asynccontextmanager
async def networks_of(*seeds: int, config: Libp2pConfig = RELAY) -> AsyncIterator[list[Libp2pNetwork]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_libp2p_network(seed(n), config)) for n in seeds]


async def both_ways(near: Stream, data: bytes) -> bytes:
    got = bytearray()

    async def send() -> None:
        await near.send_all(data)
        await near.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        async for piece in near:
            got += piece
    return bytes(got)


async def asked(nodes: Relayed, request: Reserve | Connect, who: str = "source") -> Answer:
    """What the relay says to `who`."""
    async with await getattr(nodes, who).open_stream(nodes.relay.peer, wire.HOP) as stream:
        await stream.send_all(wire.encode_hop_request(request))
        return wire.decode_hop_answer(await receive_frame(stream, wire.MAX_MESSAGE))
