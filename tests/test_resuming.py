"""Tunnels whose connection is lost: they go on over the next one, with not one byte lost or doubled."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from libmesh import Mesh, PathKind, ServiceRefused, expose, serve_tunnel
from libmesh.framing import frame, receive_frame
from libmesh.net import journal as books
from libmesh.net.journal import Journal
from libmesh.resume_wire import Progress, decode_resumed, encode_progress
from libmesh.resuming import ACKS_PROTOCOL, MAX_TUNNELS, RESUME_PROTOCOL, FarTunnel, _Teller
from tests.test_pathing import kind
from tests.town import Town, client_invite, settled, town

Serve = Callable[[trio.SocketStream], Awaitable[None]]


async def echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):  # how a tunnel that is given up ends
        async for data in stream:
            await stream.send_all(data)
        await stream.send_eof()


@asynccontextmanager
async def tunnel(
    place: Town, serve: Serve = echo, *, hidden: bool = False
) -> AsyncIterator[tuple[Mesh, Mesh, int]]:
    """Two members, the second of which exposes a server; the port of a tunnel to it at the first one."""
    relay = await place.found(1)
    token = client_invite(relay)
    near, far = await place.join(2, token), await place.join(3, token)
    for mesh, number in ((near, 2), (far, 3)):
        if hidden:
            place.hub.hide(mesh.peer)
        place.networks[number].set_relays([f"{relay.addresses[0]}/p2p/{relay.peer}"])
    await settled([relay, near, far])
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        await nursery.start(expose, far, "web", "127.0.0.1", port)
        yield near, far, await nursery.start(serve_tunnel, near, far.peer, "web")
        nursery.cancel_scope.cancel()


async def exchange(port: int, data: bytes) -> bytes:
    """What comes back of `data` through the tunnel to an echo."""
    back = bytearray()
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            for start in range(0, len(data), 50_000):
                await stream.send_all(data[start : start + 50_000])
            await stream.send_eof()

        nursery.start_soon(send)
        async for piece in stream:
            back += piece
    return bytes(back)


async def cut_again_and_again(place: Town, near: Mesh, far: Mesh, lots: random.Random) -> None:
    while True:
        await trio.sleep(lots.uniform(0, 0.1))
        place.hub.cut(near.peer, far.peer)


def nothing_left(*meshes: Mesh) -> bool:
    return all(not mesh.resumption.tunnels and not mesh.resumption._tellers for mesh in meshes)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - what is looked at tells nobody when it changes
            await trio.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
async def test_not_one_byte_is_lost_or_doubled_however_often_the_connection_is_cut(seed: int) -> None:
    lots = random.Random(seed)
    data = lots.randbytes(8_000_000)
    async with town() as place, tunnel(place) as (near, far, port), trio.open_nursery() as nursery:
        nursery.start_soon(cut_again_and_again, place, near, far, lots)
        with trio.fail_after(60):
            assert await exchange(port, data) == data
        nursery.cancel_scope.cancel()
        await until(lambda: nothing_left(near, far))


async def test_a_tunnel_goes_from_the_relay_to_a_direct_path_and_back() -> None:
    data = random.Random(1).randbytes(1_000_000)
    async with town() as place, tunnel(place, hidden=True) as (near, far, port):
        for mesh in (near, far):
            place.hub.hide(mesh.peer, punchable=False)
        place.hub.cut(near.peer, far.peer)
        await until(lambda: kind(near, far) is PathKind.RELAYED)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            got = bytearray()

            async def pass_through(start: int, end: int) -> None:
                await stream.send_all(data[start:end])
                with trio.fail_after(60):
                    while len(got) < end:
                        got.extend(await stream.receive_some())

            await pass_through(0, 100_000)
            place.hub.show(far.peer)
            near._driver.pathing.here_changed()
            await until(lambda: kind(near, far) is PathKind.DIRECT)
            await pass_through(100_000, 300_000)
            place.hub.cut(near.peer, far.peer, PathKind.RELAYED)
            await pass_through(300_000, 500_000)
            place.hub.hide(far.peer, punchable=False)
            place.hub.cut(near.peer, far.peer)
            await pass_through(500_000, len(data))
            assert kind(near, far) is PathKind.RELAYED
            assert bytes(got) == data


async def test_the_last_bytes_arrive_though_the_connection_is_lost_with_them() -> None:
    received = bytearray()
    ended = trio.Event()

    async def swallow(stream: trio.SocketStream) -> None:
        await stream.send_eof()
        async for piece in stream:
            received.extend(piece)
        ended.set()

    async with town() as place, tunnel(place, swallow) as (near, far, port):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            assert await stream.receive_some() == b""
            await until(lambda: near.resumption.tunnels)
            await stream.send_all(b"the end")
            place.hub.cut(near.peer, far.peer)
            await stream.send_eof()
        with trio.fail_after(60):
            await ended.wait()
        assert received == b"the end"
        await until(lambda: nothing_left(near, far))


async def test_a_reset_ends_a_tunnel_for_good() -> None:
    async with town() as place, tunnel(place) as (near, far, port):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            for lifeline in list(far.resumption.tunnels.values()):
                assert isinstance(lifeline, FarTunnel)
                assert lifeline._stream is not None
                lifeline._stream.reset()
            with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await until(lambda: nothing_left(near, far))


async def test_a_tunnel_whose_peer_does_not_come_back_is_reset() -> None:
    async with town() as place, tunnel(place) as (near, far, port):
        for mesh in (near, far):
            mesh.resumption.limit = 0.3
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            place.hub.partition({near.peer}, {far.peer})
            with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await until(lambda: nothing_left(near, far))


async def test_strangers_to_a_tunnel_cannot_take_it() -> None:
    async with town() as place:
        thief = await place.found(4)
        await taken_by(thief, place)


async def taken_by(thief: Mesh, place: Town) -> None:
    async with tunnel(place) as (_, far, port):
        thief.add_contacts([(far.peer, far.addresses)])
        await until(lambda: kind(thief, far) is not None)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            ((_, session),) = far.resumption.tunnels
            for session_tried in (session, bytes(16)):
                async with await thief._driver.network.open_stream(far.peer, RESUME_PROTOCOL) as asked:
                    await asked.send_all(frame(encode_progress(Progress(session_tried, 0, False))))
                    assert decode_resumed(await receive_frame(asked, 1024))[0] == "unknown"
            await stream.send_all(b"y")
            assert await stream.receive_some() == b"y"


@pytest.mark.parametrize("received", [10**9, 0])
async def test_a_peer_that_lies_about_what_it_has_is_refused(received: int) -> None:
    async with (
        town() as place,
        tunnel(place) as (near, far, port),
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        await stream.send_all(bytes(3_000_000))
        with trio.fail_after(60):
            count = 0
            while count < 3_000_000:
                count += len(await stream.receive_some())
        ((_, session),) = far.resumption.tunnels
        await until(lambda: all(t.journal.has > 0 for t in far.resumption.tunnels.values()))
        async with await near._driver.network.open_stream(far.peer, RESUME_PROTOCOL) as asked:
            await asked.send_all(frame(encode_progress(Progress(session, received, False))))
            assert decode_resumed(await receive_frame(asked, 1024))[0] == "unknown"


@pytest.mark.parametrize(
    "said", [b"\x00", frame(b"nonsense"), frame(encode_progress(Progress(bytes(16), 1, True)))]
)
async def test_nonsense_harms_no_tunnel(said: bytes) -> None:
    async with (
        town() as place,
        tunnel(place) as (near, far, port),
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        for protocol in (RESUME_PROTOCOL, ACKS_PROTOCOL):
            async with await near._driver.network.open_stream(far.peer, protocol) as asked:
                await asked.send_all(said)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"


async def test_beyond_the_bound_tunnels_are_carried_without_a_lifeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("libmesh.resuming.MAX_TUNNELS", 1)
    assert MAX_TUNNELS > 1
    async with town() as place, tunnel(place) as (near, _, port):
        streams = []
        for _ in range(3):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            streams.append(stream)
        assert len(near.resumption.tunnels) == 1
        for stream in streams:
            await stream.aclose()


async def test_the_bound_holds_for_tunnels_that_are_opened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libmesh.resuming.MAX_TUNNELS", 2)
    async with town() as place, tunnel(place) as (near, far, _):
        opened = []

        async def open_one() -> None:
            opened.append(await near.open_tunnel(far.peer, "web"))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(open_one)
        lifelines = [lifeline for _, lifeline in opened if lifeline is not None]
        assert len(lifelines) == len(near.resumption.tunnels) == 2
        for stream, _ in opened:
            stream.reset()
        for lifeline in lifelines:
            lifeline.end()


async def test_who_gives_up_opening_a_tunnel_gives_its_place_back() -> None:
    async with town() as place, tunnel(place) as (near, far, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await near.open_tunnel(far.peer, "web")
        with pytest.raises(ServiceRefused):
            await near.open_tunnel(far.peer, "nothing", wait=True)
        with pytest.raises(ServiceRefused):
            await near.open_service(far.peer, "nothing", lasting=True)
        assert near.resumption.tunnels == {}


async def test_what_was_being_told_when_a_stream_ended_is_told_on_the_next() -> None:
    async with town() as place, tunnel(place) as (near, far, _), trio.open_nursery() as nursery:
        ours, theirs = trio.testing.lockstep_stream_pair()
        last = Progress(bytes(16), 5, True)  # of a tunnel that is over here: nobody else knows of it
        teller = _Teller({last.session: last})
        stream: Any = ours
        nursery.start_soon(near.resumption._tell_over, far.peer, teller, stream)
        await trio.testing.wait_all_tasks_blocked()
        assert not teller.owed
        await theirs.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert teller.owed == {last.session: last}


async def test_news_leave_at_once_where_nothing_is_being_told_and_the_connection_is_there() -> None:
    class Posting:
        def __init__(self) -> None:
            self.connection_lost = False
            self.posted: list[bytes] = []

        def post(self, data: bytes) -> bool:
            self.posted.append(data)
            return len(self.posted) < 2

    async with town() as place, tunnel(place) as (near, far, _):
        stream: Any = Posting()
        teller = near.resumption._tellers[far.peer] = _Teller(stream=stream)
        news = [Progress(bytes([number]) * 16, number, False) for number in range(4)]
        near.resumption.tell(far.peer, news[0])
        assert not teller.owed
        near.resumption.tell(far.peer, news[1])  # there is no room for it
        near.resumption.tell(far.peer, news[2])  # not before that
        assert stream.posted == [frame(encode_progress(one)) for one in news[:2]]
        teller.owed.clear()
        stream.connection_lost = True
        near.resumption.tell(far.peer, news[3])
        assert [*teller.owed.values()] == news[3:]
        assert len(stream.posted) == 2
        del near.resumption._tellers[far.peer]


async def test_an_end_is_told_of_when_both_directions_have_ended() -> None:
    heard, asked = trio.Event(), trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        async for _ in stream:
            pass
        heard.set()
        await asked.wait()
        await stream.send_all(b"answer")

    async with town() as place, tunnel(place, serve) as (near, far, port):
        with trio.fail_after(60):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"question")
                await stream.send_eof()
                await heard.wait()
                await trio.testing.wait_all_tasks_blocked(0.05)
                (lifeline,) = near.resumption.tunnels.values()
                assert lifeline.journal.sent_end
                assert not lifeline.journal.has_end
                asked.set()
                assert await stream.receive_some() == b"answer"
            while not lifeline.journal.complete:
                await trio.lowlevel.checkpoint()
            await until(lambda: nothing_left(near, far))


async def test_a_sender_waits_when_as_much_is_kept_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "KEPT_BYTES", 300_000)
    monkeypatch.setattr(books, "TELL_EVERY", 100_000)
    data = random.Random(2).randbytes(5_000_000)
    async with town() as place, tunnel(place) as (_, _, port):
        with trio.fail_after(60):
            assert await exchange(port, data) == data


async def test_books_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "PIECE_BYTES", 4)
    journal = Journal()
    assert journal.piece_at(0) is None
    for piece in (b"abc", b"def", b"gh"):
        journal.append(memoryview(piece))
    assert journal.piece_at(4) == b"ef"
    journal.acknowledge(4, ended=False)
    assert journal.piece_at(4) == b"ef"
    with pytest.raises(LookupError):
        journal.piece_at(2)
    for received, ended in ((9, False), (8, True)):
        with pytest.raises(ValueError, match="claims"):
            journal.acknowledge(received, ended=ended)
    assert not journal.complete
    journal.sent_end = True
    journal.acknowledge(8, ended=True)
    assert journal.complete
    journal.give_up()
    assert not journal.full
