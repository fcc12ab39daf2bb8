"""An admitted peer that sends garbage as gossip harms nobody: a message that cannot be taken in is one message lost."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.pubsub.pb import rpc_pb2

from libmesh.framing import frame
from libmesh.net.base import Message, NetworkEvent, StreamReset
from libmesh.net.gossip import PROTOCOLS
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from tests.members import seed

TOPIC = "topic"


async def _listen(network: Libp2pNetwork, heard: list[NetworkEvent]) -> None:
    async with network.events() as events:
        async for event in events:
            heard.append(event)


@asynccontextmanager
async def _liar_and_listener() -> AsyncIterator[tuple[Libp2pNetwork, Libp2pNetwork, list[NetworkEvent]]]:
    config = Libp2pConfig(hosts=("127.0.0.1",))
    async with (
        open_libp2p_network(seed(1), config) as liar,
        open_libp2p_network(seed(2), config) as listener,
        trio.open_nursery() as nursery,
    ):
        heard: list[NetworkEvent] = []
        nursery.start_soon(_listen, listener, heard)
        for network in (liar, listener):
            await network.subscribe(TOPIC)
        await liar.connect(listener.peer, listener.addresses())
        while listener.path(liar.peer) is None:  # noqa: ASYNC110 - it tells nobody
            await trio.sleep(0.01)
        liar.admit(listener.peer)
        listener.admit(liar.peer)
        yield liar, listener, heard
        nursery.cancel_scope.cancel()


def _message(**fields: bytes) -> bytes:
    message = rpc_pb2.Message(topicIDs=[TOPIC], seqno=b"1", data=b"x", **fields)  # type: ignore[arg-type]
    return rpc_pb2.RPC(publish=[message]).SerializeToString()


def _control(kind: str, **fields: object) -> bytes:
    rpc = rpc_pb2.RPC()
    getattr(rpc.control, kind).add(**fields)
    return rpc.SerializeToString()


GARBAGE: dict[str, bytes] = {
    "a key that is none": _message(from_id=b"nobody", signature=b"s", key=b"\xff\xff"),
    "a key of an unknown kind": _message(from_id=b"nobody", signature=b"s", key=b"\x08\x63\x12\x01x"),
    "a key that is too short": _message(from_id=b"nobody", signature=b"s", key=b"\x08\x01\x12\x01x"),
    "no origin": _message(from_id=b"", signature=b"s", key=b"k"),
    "an identifier that is an expression": _control("ihave", topicID=TOPIC, messageIDs=[b"("]),
    "wanting what never was": _control("iwant", messageIDs=[b"[1]", b"", b"\xff"]),
    "pruning for ever": _control("prune", topicID=TOPIC, backoff=2**63),
    "no protobuf": b"\xff" * 40,
}


async def _send(liar: Libp2pNetwork, listener: Libp2pNetwork, data: bytes, protocol: str) -> None:
    async with await liar.open_stream(listener.peer, protocol) as stream:
        await stream.send_all(frame(data))
        with trio.move_on_after(0.05):
            try:
                await stream.receive_some(1)
            except StreamReset:
                return


async def _still_hears(listener: Libp2pNetwork, heard: list[NetworkEvent]) -> None:
    """A third peer that comes now is heard."""
    async with open_libp2p_network(seed(3), Libp2pConfig(hosts=("127.0.0.1",))) as good:
        await good.subscribe(TOPIC)
        await good.connect(listener.peer, listener.addresses())
        while listener.path(good.peer) is None:  # noqa: ASYNC110 - it tells nobody
            await trio.sleep(0.01)
        good.admit(listener.peer)
        listener.admit(good.peer)
        with trio.fail_after(60):
            while not any(isinstance(event, Message) and event.origin == good.peer for event in heard):
                await good.publish(TOPIC, b"still here")
                await trio.sleep(0.1)


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_of_a_member_ends_nothing(what: str) -> None:
    async with _liar_and_listener() as (liar, listener, heard):
        await _send(liar, listener, GARBAGE[what], PROTOCOLS[0])
        await _still_hears(listener, heard)


async def test_random_garbage_of_a_member_ends_nothing() -> None:
    rng = random.Random(2)
    pieces: tuple[Callable[[], bytes], ...] = (
        lambda: _message(from_id=rng.randbytes(38), signature=rng.randbytes(64), key=rng.randbytes(36)),
        lambda: _control("graft", topicID=rng.choice((TOPIC, "other", ""))),
        lambda: _control("ihave", topicID=TOPIC, messageIDs=[rng.randbytes(9)]),
        lambda: rng.randbytes(rng.randrange(60)),
    )
    async with _liar_and_listener() as (liar, listener, heard):
        for _ in range(60):
            await _send(liar, listener, rng.choice(pieces)(), rng.choice(PROTOCOLS))
        await _still_hears(listener, heard)
