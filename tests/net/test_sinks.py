"""What arrives for a pump that waits: all of one read in one call, in order, and nothing of it kept."""

from __future__ import annotations

import os
import sys

import pytest
import trio
import trio.testing

from libmesh.core.yamux_frames import DATA, HEADER
from libmesh.net import records
from libmesh.net.ciphers import AES
from libmesh.net.muxed_stream import Pieces, YamuxStream
from libmesh.net.negotiate import Libp2pStream
from libmesh.net.pipes import BufferPool, SocketPipe
from libmesh.net.records import BUFFER_BYTES, RecordChannel
from libmesh.net.splice import MOST_PIECES, splice
from tests.net.hosts import until
from tests.net.pairs import muxed_pair, socket_pair, stream_pair
from tests.net.test_muxer import against


def data(stream: YamuxStream, body: bytes) -> bytes:
    return HEADER.pack(0, DATA, 0, stream.stream_id, len(body)) + body


class Counted(BufferPool):
    out = 0

    def take(self) -> bytearray:
        self.out += 1
        return super().take()

    def give(self, buffer: bytearray) -> None:
        self.out -= 1
        super().give(buffer)


class Recorder:
    """A sink that takes at most so many bytes at a time."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most = most
        self.calls: list[list[bytes]] = []

    def __call__(self, pieces: Pieces) -> int:
        self.calls.append([bytes(piece) for piece in pieces])
        return min(self.most, sum(map(len, pieces)))


async def test_a_sink_is_given_all_of_its_stream_that_one_read_brought_in_one_call() -> None:
    async with against() as (connection, peer), trio.open_nursery() as nursery:
        one, two = await connection.open_stream(), await connection.open_stream()
        sinks = Recorder(), Recorder()
        nursery.start_soon(one.wait_receivable, sinks[0])
        nursery.start_soon(two.wait_receivable, sinks[1])
        await trio.testing.wait_all_tasks_blocked()
        large = bytes(range(256)) * 400
        frames = [data(one, b"first"), data(two, b"other"), data(one, large), data(one, b"last")]
        peer.channel.put([b"".join(frames)])
        assert peer.channel.flush_nowait()
        await trio.testing.wait_all_tasks_blocked()
        assert len(sinks[0].calls) == 1
        assert b"".join(sinks[0].calls[0]) == b"first" + large + b"last"
        assert sinks[1].calls == [[b"other"]]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("most", [0, 1, 5, 6, 1000, 6000])
async def test_what_a_sink_leaves_waits_for_the_reader_in_order(most: int) -> None:
    pieces = [b"first", bytes(5000), b"last"]
    whole = b"".join(pieces)
    async with against() as (connection, peer):
        stream, sink = await connection.open_stream(), Recorder(most)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.wait_receivable, sink)
            await trio.testing.wait_all_tasks_blocked()
            peer.channel.put([b"".join(data(stream, piece) for piece in pieces)])
            assert peer.channel.flush_nowait()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        rest = b""
        while (piece := stream.receive_nowait(3000)) is not None:
            rest += piece
        assert rest == whole[most:]


async def test_what_nobody_takes_outlives_the_memory_that_it_came_in() -> None:
    parts = [os.urandom(200_000) for _ in range(5)]
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        await near.send_all(parts[0])
        await trio.testing.wait_all_tasks_blocked()
        other_near, other_far = await stream_pair(a, b)
        for part in parts[1:]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other_near.send_all, part)
                got = b""
                while len(got) < len(part):
                    got += await other_far.receive_some()
            assert got == part
        got = b""
        while len(got) < len(parts[0]):
            got += await far.receive_some()
        assert got == parts[0]


async def test_a_peer_of_crumbs_is_understood() -> None:
    near, far = await socket_pair()
    async with against() as (connection, peer), far, trio.open_nursery() as nursery:
        stream = await connection.open_stream()
        nursery.start_soon(splice, Libp2pStream(stream, connection.peer, "/crumbs", agreed=True), near)
        await trio.testing.wait_all_tasks_blocked()
        crumbs = [bytes([number % 256]) for number in range(5 * MOST_PIECES + 3)]
        peer.channel.put([b"".join(data(stream, crumb) for crumb in crumbs)])
        assert peer.channel.flush_nowait()
        got = b""
        while len(got) < len(crumbs):
            got += await far.receive_some()
        assert got == b"".join(crumbs)
        nursery.cancel_scope.cancel()


async def test_crumbs_that_nobody_reads_take_little_more_memory_than_they_have_bytes() -> None:
    async with against() as (connection, peer):
        stream = await connection.open_stream()
        crumbs = [bytes([number % 256, 7, number >> 8]) for number in range(20_000)]
        await peer.write(b"".join(data(stream, crumb) for crumb in crumbs))
        await until(lambda: stream.unread == 3 * len(crumbs))
        assert sum(map(sys.getsizeof, stream._chunks)) < 1.1 * stream.unread
        got = b""
        while (piece := stream.receive_nowait(1000)) is not None:
            got += piece
        assert got == b"".join(crumbs)


async def test_a_connection_that_waits_behind_a_full_read_holds_no_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "_BATCH_BYTES", 2 * 65537)  # what two records fill to the last byte
    near, far = await socket_pair()
    pool = Counted(BUFFER_BYTES)
    sender = RecordChannel(SocketPipe(near), bytes(32), bytes(32), BufferPool(BUFFER_BYTES), AES)
    receiver = RecordChannel(SocketPipe(far), bytes(32), bytes(32), pool, AES)
    got = 0
    for _ in range(3):
        sizes = [65519] * 4
        sender.put([bytes(size) for size in sizes])
        while not sender.flush_nowait():
            await sender.flush()
        await trio.testing.wait_all_tasks_blocked()
        wanted = got + sum(sizes)
        while got < wanted:
            got += sum(map(len, await receiver.receive()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.out == 0
        nursery.cancel_scope.cancel()
    await sender.aclose()
    await receiver.aclose()


async def test_what_little_waits_for_a_full_socket_holds_no_buffer_of_the_pool() -> None:
    near, far = await socket_pair()
    pool = Counted(BUFFER_BYTES)
    sender = RecordChannel(SocketPipe(near), bytes(32), bytes(32), pool, AES)
    receiver = RecordChannel(SocketPipe(far), bytes(32), bytes(32), BufferPool(BUFFER_BYTES), AES)
    count = 0
    full = False
    while not full:
        count += 1
        sender.put([bytes([count % 256]) * 50_000])
        full = not sender.flush_nowait()
    assert pool.out == 0
    sender.put([b"behind it"])
    got = b""
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            while not sender.flush_nowait():
                await sender.flush()

        wanted = b"".join(bytes([number % 256]) * 50_000 for number in range(1, count + 1)) + b"behind it"
        while len(got) < len(wanted):
            got += b"".join(await receiver.receive())
    assert got == wanted
    await sender.aclose()
    await receiver.aclose()
