"""TCP ⇄ stream: what goes in comes out, and so do ends and resets."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from libmesh.errors import ServiceRefused
from libmesh.net import splice as splicing
from libmesh.net.base import Stream
from libmesh.net.lines import encode_line
from libmesh.net.negotiate import Libp2pStream, accept_stream, open_lazy_stream
from libmesh.net.pipes import TAKE_BYTES, BufferPool
from libmesh.net.splice import LEAST_TAKE_BYTES, NOT_READ_BYTES, SpliceResult, splice, write_nowait
from libmesh.peers import PeerId
from tests.net.hosts import until
from tests.net.pairs import drain, fill, muxed_pair, socket_pair

PEER = PeerId("somebody")
RESET = struct.pack("ii", 1, 0)


@dataclass
class Tunnel:
    """A client's socket and a server's, with two splices and a stream between them."""

    client: trio.SocketStream
    server: trio.SocketStream
    results: list[SpliceResult] = field(default_factory=list)
    near_scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@asynccontextmanager
async def tunnel() -> AsyncIterator[Tunnel]:
    async with muxed_pair() as (a, b):
        client, entrance = await socket_pair()
        exit_, server = await socket_pair()
        built = Tunnel(client, server)

        async def run(stream: Stream, sock: trio.SocketStream, scope: trio.CancelScope) -> None:
            with scope:
                built.results.append(await splice(stream, sock))

        async with trio.open_nursery() as nursery:
            stream = await open_lazy_stream(a, PEER, "/tunnel")
            nursery.start_soon(run, stream, entrance, built.near_scope)
            far = await accept_stream(await _after(client, b"!", b), PEER, lambda _: True)
            nursery.start_soon(run, far, exit_, trio.CancelScope())
            assert await server.receive_some(1) == b"!"
            try:
                yield built
            finally:
                await client.aclose()
                await server.aclose()
        await until(lambda: a.stream_count == b.stream_count == 0)


async def _after(client: trio.SocketStream, data: bytes, connection):  # type: ignore[no-untyped-def]
    await client.send_all(data)
    return await connection.accept_stream()


async def read_all(sock: trio.SocketStream) -> bytes:
    pieces = []
    while data := await sock.receive_some():
        pieces.append(data)
    return b"".join(pieces)


async def test_bytes_cross_both_ways_at_once() -> None:
    async with tunnel() as t:
        there, back = random.Random(1).randbytes(20_000_000), random.Random(2).randbytes(15_000_000)

        async def send(sock: trio.SocketStream, data: bytes) -> None:
            await sock.send_all(data)
            await sock.send_eof()

        got: dict[str, bytes] = {}

        async def receive(name: str, sock: trio.SocketStream) -> None:
            got[name] = await read_all(sock)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, t.client, there)
            nursery.start_soon(send, t.server, back)
            nursery.start_soon(receive, "there", t.server)
            nursery.start_soon(receive, "back", t.client)
        assert got == {"there": there, "back": back}
    assert sorted(t.results, key=lambda each: each.bytes_sent) == [
        SpliceResult(len(back), len(there) + 1),
        SpliceResult(len(there) + 1, len(back)),
    ]


@pytest.mark.parametrize("first", ["client", "server"])
async def test_half_close_crosses_and_leaves_the_other_direction(first: str) -> None:
    async with tunnel() as t:
        one, other = (t.client, t.server) if first == "client" else (t.server, t.client)
        await one.send_all(b"question")
        await one.send_eof()
        assert await read_all(other) == b"question"
        await other.send_all(b"answer")
        await other.aclose()
        assert await read_all(one) == b"answer"
    assert [each.reset for each in t.results] == [None, None]


@pytest.mark.parametrize("who", ["client", "server"])
async def test_reset_crosses(who: str) -> None:
    async with tunnel() as t:
        one, other = (t.client, t.server) if who == "client" else (t.server, t.client)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await one.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await drain(other)
    assert sorted(str(each.reset) for each in t.results) == ["socket", "stream"]


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="nothing else tells of it unasked")
@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_reset_crosses_from_a_side_that_had_ended(who: str) -> None:
    async with tunnel() as t:
        one, other = (t.client, t.server) if who == "client" else (t.server, t.client)
        await one.send_all(b"question")
        await one.send_eof()
        assert await read_all(other) == b"question"
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await one.aclose()
        with trio.fail_after(60):
            await until(lambda: len(t.results) == 2)
        with pytest.raises(trio.BrokenResourceError):
            await fill(other)
    assert sorted(str(each.reset) for each in t.results) == ["socket", "stream"]


async def test_an_answer_that_came_whole_reaches_a_slow_client_whatever_becomes_of_its_server() -> None:
    async with tunnel() as t:
        await t.client.send_all(b"question")
        answer = random.Random(6).randbytes(1_000_000)
        with trio.fail_after(60):
            await t.server.send_all(answer)
            await t.server.send_eof()
            await trio.testing.wait_all_tasks_blocked(0.05)  # all of it is on its way, and nobody has read it
            t.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            await t.server.aclose()
            await until(lambda: len(t.results) == 2)
            assert await t.client.receive_some(10) == answer[:10]
            assert await read_all(t.client) == answer[10:]


async def test_a_client_that_closes_while_data_comes_resets_the_other_end() -> None:
    async with tunnel() as t, trio.open_nursery() as nursery:

        async def serve() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await fill(t.server)

        nursery.start_soon(serve)
        await t.client.receive_some()
        await t.client.aclose()


async def test_cancelling_one_end_resets_both_sockets() -> None:
    async with tunnel() as t:
        t.near_scope.cancel()
        for sock in (t.client, t.server):
            with pytest.raises(trio.BrokenResourceError):
                await sock.receive_some()
    assert len(t.results) == 1


async def test_a_server_that_does_not_read_stops_only_the_client() -> None:
    async with tunnel() as t:
        data = random.Random(5).randbytes(30_000_000)
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await t.client.send_all(data)
                await t.client.send_eof()

            nursery.start_soon(send)
            await trio.sleep(0.2)
            await t.server.send_all(b"still alive")
            assert await t.client.receive_some() == b"still alive"
            assert await read_all(t.server) == data


@pytest.mark.parametrize("possible", [True, False])
async def test_a_pump_reads_much_only_where_it_can_be_sent_at_once(
    possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[int] = []
    send_nowait = Libp2pStream.send_nowait

    def send(self: Libp2pStream, view: memoryview) -> int:
        offered.append(len(view))
        return send_nowait(self, view) if possible else 0

    async with tunnel() as built, trio.open_nursery() as nursery:
        monkeypatch.setattr(Libp2pStream, "send_nowait", send)
        nursery.start_soon(fill, built.client)
        nursery.start_soon(drain, built.server)
        await until(lambda: len(offered) > 50 or max(offered, default=0) > LEAST_TAKE_BYTES)
        nursery.cancel_scope.cancel()
    assert (max(offered) > LEAST_TAKE_BYTES) == possible


async def test_a_pump_that_waits_with_little_holds_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(BufferPool):
        out = 0

        def take(self) -> bytearray:
            self.out += 1
            return super().take()

        def give(self, buffer: bytearray) -> None:
            self.out -= len(buffer) == self.size
            super().give(buffer)

    held: list[int] = []
    seen = trio.Event()

    async def wait(self: Libp2pStream, view: memoryview) -> None:
        held.append(len(view))
        await seen.wait()

    pool = Counted(TAKE_BYTES)
    async with tunnel() as built, trio.open_nursery() as nursery:
        monkeypatch.setattr(splicing, "_POOL", pool)
        monkeypatch.setattr(Libp2pStream, "send_nowait", lambda self, view: 1)
        monkeypatch.setattr(Libp2pStream, "send_all", wait)
        nursery.start_soon(fill, built.client)
        await until(lambda: bool(held))
        assert 0 < held[0] < LEAST_TAKE_BYTES
        assert pool.out == 0
        seen.set()
        nursery.cancel_scope.cancel()


async def test_what_was_written_in_advance_is_counted_and_not_written_again() -> None:
    async with muxed_pair() as (a, _b):
        server, exit_ = await socket_pair()
        rest = write_nowait(exit_.socket, b"question")
        assert not rest
        scope, counted = trio.CancelScope(), list[tuple[int, int]]()
        async with server, trio.open_nursery() as nursery:

            async def run() -> None:
                with scope:
                    stream = await open_lazy_stream(a, PEER, "/tunnel")
                    await splice(stream, exit_, None, None, b"question", rest, lambda *n: counted.append(n))

            nursery.start_soon(run)
            assert await server.receive_some() == b"question"
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(BlockingIOError):
                os.read(server.socket.fileno(), 100)
            scope.cancel()
        assert counted == [(0, len(b"question"))]


@pytest.mark.parametrize("end", ["full", "broken"])
async def test_what_cannot_be_written_in_advance_is_left(end: str) -> None:
    exit_, server = await socket_pair()
    data = b"x" * 1_000_000
    async with exit_, server:
        if end == "full":
            while (rest := write_nowait(exit_.socket, data)) != data:
                assert data.endswith(rest)
        else:
            await exit_.send_eof()
        assert write_nowait(exit_.socket, data) == data


async def test_a_refused_service_resets_the_socket_and_is_told() -> None:
    async with muxed_pair() as (a, b):
        client, entrance = await socket_pair()
        stream = await open_lazy_stream(a, PEER, "/tunnel")

        async def refuse() -> None:
            far = await b.accept_stream()
            await far.send_all(encode_line("/multistream/1.0.0") + encode_line("na"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            with pytest.raises(ServiceRefused):
                await splice(stream, entrance)
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        await client.aclose()


async def test_the_socket_is_told_what_it_is_for() -> None:
    async with muxed_pair() as (a, _b):
        client, entrance = await socket_pair()
        stream = await open_lazy_stream(a, PEER, "/tunnel")
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(splice, stream, entrance)
            await until(lambda: entrance.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            assert entrance.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                assert entrance.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == NOT_READ_BYTES
            nursery.cancel_scope.cancel()


async def test_a_lost_connection_resets_the_sockets() -> None:
    async with muxed_pair() as (a, b):
        client, entrance = await socket_pair()
        stream = await open_lazy_stream(a, PEER, "/tunnel")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(splice, stream, entrance)
            await client.send_all(b"hello")
            await b.accept_stream()
            await b.close()
            with pytest.raises(trio.BrokenResourceError):
                await client.receive_some()
        await client.aclose()


async def test_bytes_cross_where_there_is_no_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)
    await test_any_pattern_of_writes_arrives_unchanged(5)


@pytest.mark.parametrize("seed", range(5))
async def test_any_pattern_of_writes_arrives_unchanged(seed: int) -> None:
    lots = random.Random(seed)
    data = lots.randbytes(300_000)
    async with tunnel() as t:

        async def send() -> None:
            position = 0
            while position < len(data):
                size = lots.choice((1, 10, 1000, 20_000, 66_000))
                await t.client.send_all(data[position : position + size])
                position += size
                for _ in range(lots.randrange(3)):
                    await trio.lowlevel.checkpoint()
            await t.client.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await read_all(t.server) == data
