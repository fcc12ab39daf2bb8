"""Streams of services that outlive their connections."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from libmesh import Mesh, PeerState, PeerUnreachable, Stream, StreamReset
from libmesh.core.membership_io import Leave
from libmesh.lasting import LastingStream
from libmesh.net import journal as books
from libmesh.net.base import Pieces
from libmesh.resuming import GONE_AFTER
from tests.test_resuming import nothing_left
from tests.town import Town, client_invite, settled, state, town, until

Pair = tuple[LastingStream, LastingStream]


@asynccontextmanager
async def two(stack_of: Town) -> AsyncIterator[tuple[Mesh, Mesh]]:
    far = await stack_of.found(1)
    near = await stack_of.join(2, client_invite(far))
    await settled([far, near])
    yield near, far


@asynccontextmanager
async def service(far: Mesh, *, lasting: bool = True) -> AsyncIterator[trio.MemoryReceiveChannel[Stream]]:
    """The streams that are opened to it."""
    arrived, streams = trio.open_memory_channel[Stream](10)
    over = trio.Event()

    async def hand_out(stream: Stream) -> None:
        await arrived.send(stream)
        await over.wait()

    with far.offer("thing", hand_out, lasting=lasting):
        try:
            yield streams
        finally:
            over.set()


@asynccontextmanager
async def pair(place: Town) -> AsyncIterator[tuple[Mesh, Mesh, Pair]]:
    """Both ends of a lasting stream."""
    async with two(place) as (near, far), service(far) as streams:
        one = await near.open_service(far.peer, "thing", lasting=True)
        other = await streams.receive()
        assert isinstance(one, LastingStream)
        assert isinstance(other, LastingStream)
        yield near, far, (one, other)


async def cut_again_and_again(place: Town, near: Mesh, far: Mesh, lots: random.Random) -> None:
    while True:
        await trio.sleep(lots.uniform(0, 0.3))
        place.hub.cut(near.peer, far.peer)


async def talk(stream: Stream, data: bytes, lots: random.Random) -> None:
    """Send in pieces of all sizes, now and then without waiting."""
    at = 0
    while at < len(data):
        piece = data[at : at + lots.choice([1, 100, 10_000, 400_000])]
        sent = stream.send_nowait(piece) if lots.random() < 0.5 else 0
        if sent < len(piece):
            await stream.send_all(piece[sent:])
        at += len(piece)
        if lots.random() < 0.1:
            await trio.sleep(0.05)
    await stream.send_eof()


async def hear(stream: Stream, lots: random.Random) -> bytes:
    """By all ways to receive."""
    heard = bytearray()

    def take_some(pieces: Pieces) -> int:
        whole = b"".join(pieces)
        count = lots.choice((0, len(whole) // 2, len(whole)))
        heard.extend(whole[:count])
        return count

    while True:
        data = stream.receive_nowait()
        if data is None:
            past = lots.random() < 0.5
            data = bytes(await (stream.receive_past(take_some) if past else stream.receive_some()))
        if not data:
            return bytes(heard)
        heard += data


@pytest.mark.parametrize("seed", range(3))
async def test_not_one_byte_is_lost_or_doubled_however_often_the_connection_is_cut(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    lots = random.Random(seed)
    there, back = lots.randbytes(6_000_000), lots.randbytes(3_000_000)
    heard: dict[str, bytes] = {}

    async def hears(name: str, stream: Stream) -> None:
        heard[name] = await hear(stream, lots)

    async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
        nursery.start_soon(cut_again_and_again, place, near, far, lots)
        with trio.fail_after(600):
            async with trio.open_nursery() as talking:
                talking.start_soon(talk, one, there, random.Random(seed + 1))
                talking.start_soon(talk, other, back, random.Random(seed + 2))
                talking.start_soon(hears, "there", other)
                talking.start_soon(hears, "back", one)
        assert heard == {"there": there, "back": back}
        nursery.cancel_scope.cancel()
        await one.aclose()
        await other.aclose()
        await until(lambda: nothing_left(near, far))


async def test_it_keeps_the_contract_of_streams(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place, AsyncExitStack() as stack:
        near, far, _ = await stack.enter_async_context(pair(place))
        streams = await stack.enter_async_context(service_again(far))

        async def make() -> tuple[Stream, Stream]:
            one = await near.open_service(far.peer, "again", lasting=True)
            return one, await streams.receive()

        await trio.testing.check_half_closeable_stream(make, None)


@asynccontextmanager
async def service_again(far: Mesh) -> AsyncIterator[trio.MemoryReceiveChannel[Stream]]:
    arrived, streams = trio.open_memory_channel[Stream](10)

    async def hand_out(stream: Stream) -> None:
        await arrived.send(stream)
        await trio.sleep_forever()

    with far.offer("again", hand_out, lasting=True):
        yield streams


async def test_what_is_said_while_there_is_no_way_arrives_when_there_is_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
        nursery.start_soon(expect, other, b"one two")
        await one.send_all(b"one ")
        place.hub.partition({near.peer}, {far.peer})
        await trio.sleep(10)
        assert other.connection_lost
        await send_while_apart(place, one)


async def expect(stream: Stream, data: bytes) -> None:
    heard = b""
    while len(heard) < len(data):
        heard += bytes(await stream.receive_some())
    assert heard == data


async def send_while_apart(place: Town, stream: LastingStream) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"two")
        await trio.sleep(2)
        assert stream.connection_lost
        assert stream.send_nowait(b"three") == 0
        assert stream.receive_nowait() is None
        place.hub.partition()


async def test_a_peer_that_does_not_come_back_in_time_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place, pair(place) as (near, far, ends):
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(fails, end)
            place.hub.partition({near.peer}, {far.peer})
        assert trio.current_time() - started == near.resumption.limit
        for end in ends:
            assert end.connection_lost
            with pytest.raises(StreamReset):
                await end.send_all(b"x")
        await until(lambda: nothing_left(near, far))


async def test_a_reset_is_told_at_once_and_is_no_loss(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place, pair(place) as (_, _, (one, other)):
        other.reset()
        with pytest.raises(StreamReset):
            await one.receive_some()
        assert not one.connection_lost
        with pytest.raises(trio.ClosedResourceError):
            await other.receive_some()


async def test_a_peer_that_leaves_is_lost_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place, pair(place) as (near, far, (one, _)):
        far._driver.handle(Leave())
        await until(lambda: state(near, far) is PeerState.LEFT)
        place.hub.partition({near.peer}, {far.peer})
        started = trio.current_time()
        with pytest.raises(StreamReset, match="has left"):
            await one.receive_some()
        assert trio.current_time() == started


async def test_a_process_that_has_ended_is_lost_as_soon_as_its_machine_says_so(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(peer: object) -> None:
        raise PeerUnreachable("no", {"/ip4/192.0.2.1/tcp/1": "connection refused"})

    async with town() as place, pair(place) as (near, far, (one, _)):
        monkeypatch.setattr(near.resumption, "connect", refused)
        place.hub.cut(near.peer, far.peer)
        started = trio.current_time()
        with pytest.raises(StreamReset, match="has ended"):
            await one.receive_some()
        assert trio.current_time() - started == pytest.approx(GONE_AFTER)


async def test_a_cancelled_receive_loses_nothing_while_the_stream_is_sought(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place, pair(place) as (near, far, (one, other)):
        await other.send_all(b"abc")
        place.hub.partition({near.peer}, {far.peer})
        heard = b""
        for _ in range(5):
            with trio.move_on_after(0.5):
                heard += bytes(await one.receive_some())
        place.hub.partition()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swallow, other)
            while heard != b"abc":
                heard += bytes(await one.receive_some())
            nursery.cancel_scope.cancel()


async def swallow(stream: Stream) -> None:
    while await stream.receive_some():
        pass


async def test_a_sender_waits_when_as_much_is_kept_as_may_be(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "KEPT_BYTES", 300_000)
    monkeypatch.setattr(books, "TELL_EVERY", 100_000)
    data = random.Random(2).randbytes(3_000_000)
    async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
        nursery.start_soon(cut_again_and_again, place, near, far, random.Random(3))
        nursery.start_soon(talk, one, data, random.Random(4))
        nursery.start_soon(swallow, one)
        with trio.fail_after(600):
            assert await hear(other, random.Random(1)) == data
        nursery.cancel_scope.cancel()


async def test_a_waiting_sender_notices_a_loss_that_nobody_else_does(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "KEPT_BYTES", 1000)
    async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, bytes(1000) + b"x" * 300_000)
        await trio.sleep(0.1)
        place.hub.cut(near.peer, far.peer)
        count = 0
        with trio.fail_after(60):
            while count < 301_000:
                count += len(await other.receive_some())
                other._lifeline.tell_progress()


@pytest.mark.parametrize(("near_lasts", "far_lasts"), [(True, False), (False, True)])
async def test_both_ends_have_to_want_it(
    autojump_clock: trio.testing.MockClock, near_lasts: bool, far_lasts: bool
) -> None:
    async with town() as place, two(place) as (near, far), service(far, lasting=far_lasts) as streams:
        one = await near.open_service(far.peer, "thing", lasting=near_lasts)
        other = await streams.receive()
        assert not isinstance(one, LastingStream)
        assert not isinstance(other, LastingStream)
        place.hub.cut(near.peer, far.peer)
        with pytest.raises(StreamReset):
            await one.receive_some()


async def test_the_first_bytes_may_travel_with_the_question(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place, two(place) as (near, far), service(far) as streams:
        one = await near.open_service(far.peer, "thing", wait=False, lasting=True)
        await one.send_all(b"hello")
        other = await streams.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, one, b"hello back")
            await expect(other, b"hello")
            place.hub.cut(near.peer, far.peer)
            nursery.start_soon(partial(other.send_all, b"hello back"))


async def test_ends_may_close_while_the_stream_is_sought(autojump_clock: trio.testing.MockClock) -> None:
    close: list[Callable[[LastingStream], Awaitable[None]]] = [
        lambda stream: stream.aclose(),
        trio.aclose_forcefully,
    ]
    for way in close:
        async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
            nursery.start_soon(fails, one)
            nursery.start_soon(fails, other)
            place.hub.partition({near.peer}, {far.peer})
            await trio.sleep(1)
            await way(one)
            other.reset()
            await until(partial(nothing_left, near, far))


async def fails(stream: Stream) -> None:
    with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
        await stream.receive_some()


async def test_a_mesh_that_is_left_ends_its_streams(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as other_place:
        async with town() as place, pair(place) as (near, far, (one, _)), trio.open_nursery() as nursery:
            nursery.start_soon(fails, one)
            place.hub.partition({near.peer}, {far.peer})
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert other_place
    with pytest.raises((StreamReset, trio.ClosedResourceError)):
        await one.receive_some()
