"""Gossip on real sockets: it reaches members, all of them, and nobody else."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb.rpc_pb2 import RPC
from libp2p.pubsub.rpc_queue import RpcQueue

from libmesh.net.base import Message, NetworkEvent
from libmesh.net.libp2p import Libp2pNetwork, open_libp2p_network
from tests.members import seed
from tests.net.hosts import LOCAL, collect, join, networks


def heard(events: list[NetworkEvent]) -> list[bytes]:
    return [event.data for event in events if isinstance(event, Message)]


@asynccontextmanager
async def gossiping(count: int) -> AsyncIterator[tuple[list[Libp2pNetwork], list[list[NetworkEvent]]]]:
    """That many networks in a line, subscribed, with the events of each."""
    async with networks(count) as opened, trio.open_nursery() as nursery:
        events: list[list[NetworkEvent]] = [[] for _ in opened]
        for network, seen in zip(opened, events, strict=True):
            await network.subscribe("topic")
            nursery.start_soon(collect, network, seen)
        for one, two in itertools.pairwise(opened):
            await join(one, two)
        yield opened, events
        nursery.cancel_scope.cancel()


async def publish_until(network: Libp2pNetwork, text: bytes, done: Callable[[], bool]) -> None:
    """Gossip is best effort: say it until it got through."""
    with trio.fail_after(60):
        number = 0
        while not done():
            await network.publish("topic", text + b" %d" % number)
            number += 1
            await trio.sleep(0.2)


async def test_gossip_reaches_all_with_its_origin_and_not_its_sender() -> None:
    async with gossiping(4) as (opened, events):
        await publish_until(opened[0], b"news", lambda: all(map(heard, events[1:])))
        assert heard(events[0]) == []
        origins = {event.origin for seen in events for event in seen if isinstance(event, Message)}
        assert origins == {opened[0].peer}
        for seen in events[1:]:
            assert len(set(heard(seen))) == len(heard(seen))


async def test_what_is_said_before_peers_are_linked_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_heartbeat(self: GossipSub) -> None:
        await trio.sleep_forever()

    async def come_too_early(self: GossipSub, peer_id: ID, topic: str) -> None:
        """As when the subscription arrives before our own stream to its peer is open."""

    monkeypatch.setattr(GossipSub, "heartbeat", no_heartbeat)
    monkeypatch.setattr(GossipSub, "on_peer_subscribed", come_too_early)
    async with gossiping(3) as (opened, events):
        # Twice, since py-libp2p keeps the very first messages for peers whose subscriptions it has not read yet.
        for text in (b"first", b"second"):

            def all_heard(text: bytes = text) -> bool:
                return all(any(line.startswith(text) for line in heard(seen)) for seen in events[1:])

            await publish_until(opened[0], text, all_heard)


async def test_a_stranger_hears_no_gossip_and_is_not_heard() -> None:
    async with networks(2) as (one, two), trio.open_nursery() as nursery:
        events: list[list[NetworkEvent]] = [[], []]
        for network, seen in zip((one, two), events, strict=True):
            await network.subscribe("topic")
            nursery.start_soon(collect, network, seen)
        await join(one, two, admit=False)
        two.admit(one.peer)  # the stranger trusts us; we do not trust it
        for _ in range(5):
            await one.publish("topic", b"secret")
            await two.publish("topic", b"forged")
            await trio.sleep(0.2)
        assert heard(events[0]) == heard(events[1]) == []
        nursery.cancel_scope.cancel()


async def test_messages_after_a_restart_are_not_taken_for_old_ones() -> None:
    async with networks(1) as (one,), trio.open_nursery() as nursery:
        events: list[NetworkEvent] = []
        await one.subscribe("topic")
        nursery.start_soon(collect, one, events)
        for run in (b"first", b"second", b"third"):
            async with open_libp2p_network(seed(2), LOCAL) as two:
                await two.subscribe("topic")
                await join(two, one)
                await publish_until(
                    two, run, lambda run=run: any(text.startswith(run) for text in heard(events))
                )
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("size", "declined"), [(500, False), (4000, True)])
async def test_a_message_brings_nothing_beside_it_but_word_of_a_large_one(
    monkeypatch: pytest.MonkeyPatch, size: int, declined: bool
) -> None:
    said: list[RPC] = []
    push = RpcQueue.push

    def record(self: RpcQueue, rpc: RPC, priority: bool = False) -> bool:
        said.append(rpc)
        return push(self, rpc, priority)

    monkeypatch.setattr(RpcQueue, "push", record)

    def told() -> bool:
        """The first may arrive before those are linked who would be told of it."""
        return any(rpc.control.idontwant for rpc in said) >= declined

    async with gossiping(3) as (opened, events):
        text = bytes(size)
        await publish_until(opened[0], text, lambda: all(map(heard, events[1:])) and told())
    assert any(rpc.publish for rpc in said)
    assert not any(rpc.HasField("senderRecord") for rpc in said)
    assert any(rpc.control.idontwant for rpc in said) is declined
