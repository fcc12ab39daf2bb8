"""What `MemoryHub` promises beyond the contract that `tests/net/test_contract.py` holds it to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

from libmesh import PeerUnreachable, Stream, StreamReset
from libmesh.net.base import Message, NetworkEvent, PeerConnected, PeerDisconnected
from libmesh.testing.memory import ADMISSION_LIMIT, MemoryHub, MemoryNetwork
from tests.members import peer, seed

PROTOCOL = "/test/1"


@asynccontextmanager
async def networks(count: int) -> AsyncIterator[tuple[MemoryHub, list[MemoryNetwork]]]:
    """That many networks, none connected; each echoes on `PROTOCOL`."""
    hub = MemoryHub()
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(hub.open_network(seed(n + 1))) for n in range(count)]
        for network in opened:
            network.set_handler(PROTOCOL, echo)
        yield hub, opened


async def echo(stream: Stream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def join(one: MemoryNetwork, two: MemoryNetwork, *, admit: bool = True) -> None:
    await one.connect(two.peer, two.addresses())
    if admit:
        one.admit(two.peer)
        two.admit(one.peer)


async def drain(network: MemoryNetwork) -> list[NetworkEvent]:
    await trio.testing.wait_all_tasks_blocked()
    found: list[NetworkEvent] = []
    receive = network.events()
    assert isinstance(receive, trio.MemoryReceiveChannel)
    while True:
        try:
            found.append(receive.receive_nowait())
        except trio.WouldBlock:
            return found


async def test_both_sides_hear_of_a_connection_and_of_its_end() -> None:
    async with networks(2) as (hub, (one, two)):
        await join(one, two)
        hub.cut(one.peer, two.peer)
        for me, other, inbound in ((one, two, False), (two, one, True)):
            connected, gone = await drain(me)
            assert isinstance(connected, PeerConnected)
            assert (connected.peer, connected.inbound) == (other.peer, inbound)
            assert gone == PeerDisconnected(other.peer)
            assert me.path(other.peer) is None


async def test_connecting_twice_is_one_connection() -> None:
    async with networks(2) as (_, (one, two)):
        assert await one.connect(two.peer, two.addresses()) == await one.connect(two.peer, ())
        assert len(await drain(two)) == 1


@pytest.mark.parametrize("addresses", [(), ("/dns/somewhere/tcp/1",)])
async def test_nobody_is_reached_where_nobody_is(addresses: tuple[str, ...]) -> None:
    async with networks(1) as (_, (one,)):
        with pytest.raises(PeerUnreachable) as caught:
            await one.connect(peer(9), addresses)
        assert caught.value.attempts.keys() == set(addresses)


async def test_a_stream_needs_a_connection() -> None:
    async with networks(2) as (_, (one, two)):
        with pytest.raises(PeerUnreachable, match="no connection"):
            await one.open_stream(two.peer, PROTOCOL)


async def test_a_cut_resets_every_stream_on_both_sides() -> None:
    async with networks(2) as (hub, (one, two)):
        await join(one, two)
        stream = await one.open_stream(two.peer, PROTOCOL)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        hub.cut(two.peer, one.peer)
        with pytest.raises(StreamReset):
            await stream.receive_some()
        with pytest.raises(StreamReset):
            await stream.send_all(b"x")


async def test_a_partition_cuts_what_connects_the_parts_until_it_heals() -> None:
    async with networks(3) as (hub, (one, two, three)):
        await join(one, two)
        await join(two, three)
        hub.partition({one.peer, two.peer}, {three.peer})
        assert one.path(two.peer) is not None
        assert two.path(three.peer) is None
        with pytest.raises(PeerUnreachable):
            await three.connect(two.peer, two.addresses())
        hub.partition()
        await three.connect(two.peer, two.addresses())


async def test_whoever_leaves_is_disconnected_from_all_and_may_come_back() -> None:
    hub = MemoryHub()
    async with hub.open_network(seed(1)) as one:
        async with hub.open_network(seed(2)) as two:
            await join(one, two)
        assert one.path(two.peer) is None
        assert [type(event) for event in await drain(one)] == [PeerConnected, PeerDisconnected]
        async with hub.open_network(seed(2)) as again:
            await join(one, again)
            assert one.path(again.peer) is not None


# ── admission ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_strangers_stream_is_held_until_it_is_admitted(autojump_clock: trio.abc.Clock) -> None:
    async with networks(2) as (_, (one, two)):
        await join(one, two, admit=False)
        stream = await one.open_stream(two.peer, PROTOCOL)
        await stream.send_all(b"early")
        await trio.sleep(ADMISSION_LIMIT - 1)
        two.admit(one.peer)
        assert await stream.receive_some() == b"early"


async def test_a_strangers_stream_is_reset_when_nobody_admits_it(autojump_clock: trio.abc.Clock) -> None:
    async with networks(2) as (_, (one, two)):
        await join(one, two, admit=False)
        stream = await one.open_stream(two.peer, PROTOCOL)
        started = trio.current_time()
        with pytest.raises(StreamReset):
            await stream.receive_some()
        assert trio.current_time() - started == pytest.approx(ADMISSION_LIMIT)


async def test_a_stranger_that_leaves_while_it_is_held_harms_nobody(autojump_clock: trio.abc.Clock) -> None:
    async with networks(2) as (hub, (one, two)):
        await join(one, two, admit=False)
        await one.open_stream(two.peer, PROTOCOL)
        await trio.testing.wait_all_tasks_blocked()
        hub.cut(one.peer, two.peer)
        await trio.sleep(2 * ADMISSION_LIMIT)
        await join(one, two)
        stream = await one.open_stream(two.peer, PROTOCOL)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"


async def test_admission_ends_with_the_connection(autojump_clock: trio.abc.Clock) -> None:
    async with networks(2) as (hub, (one, two)):
        await join(one, two)
        hub.cut(one.peer, two.peer)
        await join(one, two, admit=False)
        stream = await one.open_stream(two.peer, PROTOCOL)
        with pytest.raises(StreamReset):
            await stream.receive_some()


async def test_a_handler_for_strangers_serves_them_at_once() -> None:
    async with networks(2) as (_, (one, two)):
        two.set_handler("/open/1", echo, admitted_only=False)
        await join(one, two, admit=False)
        stream = await one.open_stream(two.peer, "/open/1")
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"


# ── topics ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def heard(network: MemoryNetwork) -> list[bytes]:
    return [event.data for event in await drain(network) if isinstance(event, Message)]


async def test_a_message_reaches_all_admitted_subscribers_once_and_not_its_sender() -> None:
    async with networks(4) as (_, (one, two, three, four)):
        for network in (one, two, three, four):
            await network.subscribe("topic")
        await join(one, two)
        await join(two, three)
        await join(three, one)
        await join(three, four)
        await one.publish("topic", b"news")
        await one.publish("other", b"of no interest")
        assert [await heard(network) for network in (one, two, three, four)] == [
            [],
            [b"news"],
            [b"news"],
            [b"news"],
        ]


async def test_a_stranger_neither_hears_nor_is_heard() -> None:
    async with networks(2) as (_, (one, two)):
        for network in (one, two):
            await network.subscribe("topic")
            network.set_handler(PROTOCOL, echo)
        await join(one, two, admit=False)
        for near, far in ((one, two), (two, one)):  # a held stream is no admission
            await near.open_stream(far.peer, PROTOCOL)
        await trio.testing.wait_all_tasks_blocked()
        await one.publish("topic", b"secret")
        await two.publish("topic", b"forged")
        assert await heard(one) == await heard(two) == []
