"""Several connections to one peer: which one is used, who is told, and which one goes."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from libmesh.core.relay_desk import RelayLimits
from libmesh.errors import NetworkError
from libmesh.net import connections
from libmesh.net.base import Message, NetworkEvent, PathChanged, PeerConnected, PeerDisconnected
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork
from libmesh.net.swarm import path_of
from libmesh.net.tcp import multiaddr_of
from libmesh.peers import PathKind
from tests.members import peer
from tests.net.hosts import HOSTS, PROTOCOL, answers, collect, echo, join, networks, until

RELAYING = Libp2pConfig(hosts=HOSTS, admission_limit=0.3, relay=RelayLimits(), relay_open=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "RETIRE_AFTER", 0.05)


@asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Libp2pNetwork, Libp2pNetwork, Libp2pNetwork]]:
    """Two peers with a relayed connection, each admitted by the other, and their relay."""
    async with networks(3, RELAYING) as (one, two, relay):
        two.set_handler(PROTOCOL, echo)
        (way,) = relay.addresses()
        two.set_relays([f"{way}/p2p/{relay.peer}"])
        await until(lambda: len(two.addresses()) > 1)
        circuit = two.addresses()[-1]
        path = await one.dial(two.peer, circuit)
        assert (path.kind, path.address) == (PathKind.RELAYED, circuit)
        await until(lambda: two.path(one.peer))
        one.admit(two.peer)
        two.admit(one.peer)
        yield one, two, relay


def kinds(near: Libp2pNetwork, far: Libp2pNetwork) -> list[PathKind]:
    return [path_of(connection).kind for connection in near._connections.of(far.peer)]


async def test_a_direct_connection_replaces_the_relayed_one_and_lets_its_streams_end() -> None:
    async with relayed() as (one, two, _):
        old = await one.open_stream(two.peer, PROTOCOL)
        await old.send_all(b"before")
        assert await old.receive_some() == b"before"
        path = await one.dial(two.peer, two.addresses()[0])
        assert path.kind is PathKind.DIRECT
        await until(lambda: len(kinds(two, one)) == 2)
        assert one.path(two.peer) is not None
        assert kinds(one, two) == kinds(two, one) == [PathKind.DIRECT, PathKind.RELAYED]
        await answers(one, two)
        await trio.sleep(0.3)  # several looks at it
        await old.send_all(b"after")
        assert await old.receive_some() == b"after", "the stream lives on where it began"
        await old.aclose()
        await until(lambda: kinds(one, two) == kinds(two, one) == [PathKind.DIRECT])
        await answers(one, two)


async def test_both_sides_are_told_of_the_better_path_and_of_its_loss() -> None:
    async with relayed() as (one, two, _), trio.open_nursery() as nursery:
        seen: dict[int, list[NetworkEvent]] = {0: [], 1: []}
        for number, network in enumerate((one, two)):
            nursery.start_soon(collect, network, seen[number])
        hold = await one.open_stream(two.peer, PROTOCOL)
        await hold.send_all(b"x")
        await one.dial(two.peer, two.addresses()[0])
        await until(lambda: len(kinds(two, one)) == 2)
        for connection in one._connections.of(two.peer, PathKind.DIRECT):
            await connection.close()
        await until(lambda: kinds(one, two) == kinds(two, one) == [PathKind.RELAYED])
        assert await hold.receive_some() == b"x"
        await answers(one, two)
        await one.disconnect(two.peer)
        await until(lambda: all(isinstance(events[-1], PeerDisconnected) for events in seen.values()))
        for number, other in enumerate((two, one)):
            mine = [
                event
                for event in seen[number]
                if isinstance(event, PeerConnected | PathChanged | PeerDisconnected)
                and event.peer == other.peer
            ]
            connected, up, down, gone = mine
            assert isinstance(connected, PeerConnected)
            assert connected.path.kind is PathKind.RELAYED
            assert isinstance(up, PathChanged)
            assert up.path.kind is PathKind.DIRECT
            assert isinstance(down, PathChanged)
            assert down.path.kind is PathKind.RELAYED
            assert gone == PeerDisconnected(other.peer)
        nursery.cancel_scope.cancel()


async def test_admission_holds_for_the_next_connection_and_ends_with_the_last() -> None:
    async with relayed() as (one, two, _):
        await one.dial(two.peer, two.addresses()[0])
        await until(lambda: kinds(one, two) == kinds(two, one) == [PathKind.DIRECT])
        await answers(one, two)
        assert two.admitted(one.peer)
        await one.disconnect(two.peer)
        await until(lambda: two.path(one.peer) is None)
        assert not two.admitted(one.peer)


async def test_gossip_moves_to_the_better_connection() -> None:
    async with relayed() as (one, two, _), trio.open_nursery() as nursery:
        heard: list[NetworkEvent] = []
        nursery.start_soon(collect, two, heard)
        await one.subscribe("t")
        await two.subscribe("t")

        async def told(text: bytes) -> None:
            while not any(isinstance(event, Message) and event.data == text for event in heard):
                await one.publish("t", text)
                await trio.sleep(0.05)

        with trio.fail_after(60):
            await told(b"over the relay")
            await one.dial(two.peer, two.addresses()[0])
            await until(lambda: kinds(one, two) == kinds(two, one) == [PathKind.DIRECT])
            await told(b"directly")
        nursery.cancel_scope.cancel()


async def test_of_two_connections_by_both_sides_both_keep_the_same() -> None:
    for _ in range(10):
        async with networks(2) as (one, two):
            async with trio.open_nursery() as nursery:
                for near, far in ((one, two), (two, one)):
                    near.set_handler(PROTOCOL, echo)
                    nursery.start_soon(near.dial, far.peer, far.addresses()[0])
            await until(lambda: len(kinds(one, two)) == 1 == len(kinds(two, one)))
            one.admit(two.peer)
            two.admit(one.peer)
            await answers(one, two)  # had each kept another one, there would be none
            await answers(two, one)


async def test_connections_to_one_peer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "RETIRE_AFTER", 60)
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        (address,) = two.addresses()
        for _ in range(connections.MAX_PER_PEER - 1):
            await one.dial(two.peer, address)
        with pytest.raises(NetworkError, match="already"):
            await one.dial(two.peer, address)
        await answers(one, two)


async def test_a_dial_says_in_few_words_what_went_wrong() -> None:
    async with networks(2) as (one, two):
        for address, why in (
            (multiaddr_of("127.0.0.1", 1), "refused"),
            ("nonsense", "multiaddr"),
            ("/ip4/127.0.0.1/udp/1/quic-v1", "TCP address"),
            ("/p2p-circuit", "relay"),
        ):
            with pytest.raises(NetworkError, match=why):
                await one.dial(two.peer, address)
        with pytest.raises(NetworkError, match="another peer answered"):
            await one.dial(peer(9), two.addresses()[0])
        with pytest.raises(NetworkError, match="this node itself answered"):
            await one.dial(two.peer, one.addresses()[0])
        assert kinds(one, two) == []


async def test_a_cancelled_dial_leaves_nothing() -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        for ticks in range(40):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.dial, two.peer, two.addresses()[0])
                for _ in range(ticks):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            await one.disconnect(two.peer)
        await until(lambda: not kinds(one, two) and not kinds(two, one))
        await until(lambda: not one._connections.peers and not two._connections.peers)
        await join(one, two)
        await answers(one, two)


async def test_a_socket_that_was_reset_already_is_a_failed_connection_and_is_closed() -> None:
    async with networks(1) as (network,):
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            near = await trio.testing.open_stream_to_socket_listener(listener)
            far = await listener.accept()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.socket.close()
            with pytest.raises(trio.BrokenResourceError):
                await near.receive_some()
            with pytest.raises(NetworkError):
                await network.adopt(
                    near, peer=peer(9), initiator=True, address="/ip4/127.0.0.1/tcp/1", kind=PathKind.PUNCHED
                )
            assert near.socket.fileno() == -1


async def test_a_connection_is_idle_while_it_carries_nothing_but_gossip() -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        assert one.idle(two.peer), "nothing is open to somebody who is not connected"
        await join(one, two)
        for network in (one, two):
            await network.subscribe("topic")
        await until(lambda: one.idle(two.peer) and two.idle(one.peer))
        for near, far in ((one, two), (two, one)):
            near.set_handler(PROTOCOL, echo)
            stream = await near.open_stream(far.peer, PROTOCOL)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            assert not near.idle(far.peer)
            assert not far.idle(near.peer)
            await stream.aclose()
            await until(lambda: one.idle(two.peer) and two.idle(one.peer))
        await one.publish("topic", b"said")
        assert one.idle(two.peer)
