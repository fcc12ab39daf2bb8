"""The muxer's driver: what a connection owes its streams, and what it owes the rest when a peer misbehaves."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
)

from libmesh.core.yamux_frames import (
    ACK,
    DATA,
    HEADER,
    PING,
    SPEC_WINDOW,
    SYN,
    WINDOW_UPDATE,
    Options,
)
from libmesh.net import outbound
from libmesh.net.base import StreamReset
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.muxer import YamuxConnection
from libmesh.net.noise import NoiseSession
from libmesh.net.records import RecordChannel
from tests.net.hosts import until
from tests.net.memory_conns import memory_muxed_pair
from tests.net.pairs import KEYS, fill, muxed_pair, noise_pair, peer_of, stream_pair
from tests.net.test_muxer_ends import WaitingConn


@asynccontextmanager
async def against(options: Options | None = None) -> AsyncIterator[tuple[YamuxConnection, NoiseSession]]:
    """One of our connections, and a peer of it that speaks whatever the test says."""
    near, far = await noise_pair()
    connection = YamuxConnection(near, far.get_local_peer(), options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        yield connection, far
        await connection.close()
        await far.close()


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream_id, length) + body


# ---- the life of a connection -----------------------------------------------------------------------------------


async def test_closing_fails_streams_and_calls_on_both_sides() -> None:
    async with muxed_pair() as (a, b):
        closed: list[str] = []

        async def note() -> None:
            closed.append("b")

        b.on_close = note
        near, far = await stream_pair(a, b)
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                with pytest.raises(MuxedConnUnavailable):
                    await b.accept_stream()

            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            await a.close()
            await a.close()
        for stream in (near, far):
            with pytest.raises(StreamReset):
                await stream.receive_some()
            with pytest.raises(StreamReset):
                await stream.send_all(b"x")
        await b.event_closed.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert closed == ["b"]
        assert (a.is_closed, b.is_closed, b.is_established) == (True, True, False)
        with pytest.raises(MuxedConnUnavailable):
            await a.open_stream()


async def test_what_was_sent_before_a_close_arrives() -> None:
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        await near.send_all(b"last words")
        await near.send_eof()
        await a.close()
        assert await far.receive_some() == b"last words"
        assert await far.receive_some() == b""


async def test_a_connection_that_never_ran_can_be_closed() -> None:
    near, far = await noise_pair()
    connection = YamuxConnection(near, far.get_local_peer())
    await connection.close()
    assert connection.event_closed.is_set()
    await far.close()


async def test_round_trips_are_measured_at_once() -> None:
    async with muxed_pair() as (a, b):
        assert a.rtt is None
        await until(lambda: a.rtt)
        assert a.rtt is not None
        assert a.rtt > 0
        assert (a.is_initiator, b.is_initiator) == (True, False)


async def test_a_silent_peer_fails_every_stream_within_the_keepalive_bound() -> None:
    options = Options(ping_interval=0.05, ping_timeout=0.05)
    async with against(options) as (connection, _peer):
        stream = await connection.open_stream()
        with pytest.raises(StreamReset, match="no sign of life"):
            await stream.receive_some()
        await connection.event_closed.wait()


async def test_part_of_a_record_is_a_sign_of_life() -> None:
    async with against(Options(ping_interval=3600, ping_timeout=3600)) as (connection, peer):
        await trio.testing.wait_all_tasks_blocked()
        channel = peer.channel
        assert isinstance(channel, RecordChannel)
        channel.put([bytes(65000)])
        assert channel._out is not None
        for start in (0, 1, 2, 3, 1000):
            before = connection.heard_at
            await channel._pipe.send_some(memoryview(channel._out)[start : start + 1])
            await until(lambda before=before: connection.heard_at > before)  # type: ignore[misc]


async def test_a_peer_that_answers_pings_lives_on(autojump_clock: trio.testing.MockClock) -> None:
    async with memory_muxed_pair(Options(ping_interval=10, ping_timeout=5)) as (a, b, _):
        await trio.sleep(100)
        near, far = await stream_pair(a, b)
        await near.send_all(b"alive")
        assert await far.receive_some() == b"alive"


async def test_opening_waits_for_acknowledgements_and_may_be_cancelled() -> None:
    async with muxed_pair(Options(max_unacknowledged=2)) as (a, b):
        streams = [await a.open_stream() for _ in range(2)]
        with trio.move_on_after(0.01) as scope:
            await a.open_stream()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.open_stream)
            await trio.testing.wait_all_tasks_blocked()
            await b.accept_stream()
        with trio.move_on_after(0.01) as scope:
            await a.open_stream()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.open_stream)
            await trio.testing.wait_all_tasks_blocked()
            streams[1].reset_nowait()


# ---- fairness ---------------------------------------------------------------------------------------------------


class Sluice(WaitingConn):
    """Takes a write at a time, each when the one before was let through."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.gate = trio.Semaphore(0)

    async def write(self, data: bytes) -> None:
        self.written.append(data)
        await self.gate.acquire()


@pytest.mark.parametrize("count", [1, 8, 200])
async def test_a_small_message_leaves_next_however_much_bulk_waits(count: int) -> None:
    secured: Any = Sluice()
    options = Options(ping_interval=3600, ping_timeout=3600)
    connection = YamuxConnection(secured, peer_of(KEYS[1]), options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        bulk = [await connection.open_stream() for _ in range(count)]
        stream = await connection.open_stream()
        secured.say(b"".join(frame(WINDOW_UPDATE, ACK, each.stream_id, 2**30) for each in [*bulk, stream]))
        for each in bulk:
            nursery.start_soon(_until_broken, each)
        for turn in range(5):
            await trio.testing.wait_all_tasks_blocked()
            written, message = len(secured.written), bytes([turn]) * 1000
            await stream.send_all(b"message:" + message)
            secured.gate.release()
            await trio.testing.wait_all_tasks_blocked()
            (batch,) = secured.written[written:]
            assert batch.index(b"message:" + message) < outbound.SMALL_BYTES
            assert 65536 < len(batch) < 2 * outbound.BATCH_RECORDS * 65519
        connection.give_up("enough")


@pytest.mark.parametrize(("seconds", "records"), [(0.05, 1), (0.0001, outbound.BATCH_RECORDS)])
async def test_bulk_is_sealed_in_batches_that_leave_soon(
    seconds: float, records: int, autojump_clock: trio.testing.MockClock
) -> None:
    class Slow(WaitingConn):
        async def write(self, data: bytes) -> None:
            sizes.append(len(data))
            await trio.sleep(seconds)
            if len(sizes) == 20:
                connection.give_up("enough")

    sizes: list[int] = []
    secured: Any = Slow()
    options = Options(ping_interval=3600, ping_timeout=3600)
    connection = YamuxConnection(secured, peer_of(KEYS[1]), options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        stream = await connection.open_stream()
        secured.say(frame(WINDOW_UPDATE, ACK, stream.stream_id, 2**30))
        with pytest.raises(StreamReset):
            await stream.send_all(bytes(2**25))
    assert records * 65519 <= sizes[-1] < records * 65519 + 100


async def _until_broken(stream: YamuxStream) -> None:
    with pytest.raises(StreamReset):
        await fill(stream)


async def test_bulk_senders_share_the_connection() -> None:
    async with muxed_pair() as (a, b):
        got = [0] * 4

        async def count(index: int, stream: YamuxStream) -> None:
            while data := await stream.receive_some():
                got[index] += len(data)

        async with trio.open_nursery() as nursery:
            for index in range(4):
                near, far = await stream_pair(a, b)
                nursery.start_soon(fill, near)
                nursery.start_soon(count, index, far)
            while sum(got) < 100_000_000:  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert min(got) > sum(got) / 4 * 0.5


# ---- peers that misbehave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        frame(DATA, SYN, 2, SPEC_WINDOW + 1, bytes(1000)),
        frame(WINDOW_UPDATE, SYN, 1, 0),
        frame(5, 0, 0, 0),
        random.Random(1).randbytes(5000),
        b"".join(frame(WINDOW_UPDATE, SYN, 2 * index, 0) for index in range(1, 4000)),
    ],
)
async def test_a_peer_that_breaks_the_rules_is_cut_off_and_others_are_unharmed(said: bytes) -> None:
    async with against(Options(backlog=8)) as (connection, liar), muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        await liar.write(said)
        await connection.event_closed.wait()
        assert connection.is_closed
        await near.send_all(b"unharmed")
        assert await far.receive_some() == b"unharmed"


async def test_a_peer_that_never_reads_holds_up_only_its_own_senders() -> None:
    options = Options(ping_interval=0.1, ping_timeout=0.1)
    async with against(options) as (connection, mute):
        stream = await connection.open_stream()
        await mute.write(frame(WINDOW_UPDATE, ACK, stream.stream_id, 2**31))
        with pytest.raises(StreamReset):
            await fill(stream)
        await connection.event_closed.wait()


async def test_answers_that_nobody_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "OVERFULL_BYTES", 200_000)
    async with against() as (connection, peer), trio.open_nursery() as nursery:
        bulk, stream = await connection.open_stream(), await connection.open_stream()
        grants = [frame(WINDOW_UPDATE, 0, one.stream_id, 2**30) for one in (bulk, stream)]
        peer.channel.put([b"".join(grants)])
        assert peer.channel.flush_nowait()

        async def send() -> None:
            with pytest.raises(StreamReset, match="does not read"):
                await bulk.send_all(bytes(64 << 20))

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(190):
            stream.post(bytes(1000))
        assert not connection.is_closed
        for _ in range(20):
            stream.post(bytes(1000))
        assert connection.is_closed


async def test_pings_without_end_make_no_answers_without_end() -> None:
    async with against() as (connection, flood):
        flooded = b"".join(frame(PING, SYN, 0, index) for index in range(5000))
        with trio.move_on_after(1):
            for _ in range(100):
                await flood.write(flooded)
        assert not connection.is_closed


async def test_unread_data_is_bounded_for_the_connection() -> None:
    options = Options(initial_window=SPEC_WINDOW, max_unread=1_000_000)
    async with muxed_pair(options) as (a, b):
        pairs = [await stream_pair(a, b) for _ in range(6)]
        async with trio.open_nursery() as nursery:
            for near, _ in pairs:
                nursery.start_soon(_send_quietly, near, bytes(SPEC_WINDOW))
        await trio.testing.wait_all_tasks_blocked(0.02)
        unread = [far.unread for _, far in pairs]
        assert sum(unread) <= options.max_unread
        broken = 0
        for _, far in pairs:
            try:
                for _ in range(4):
                    await far.receive_some(SPEC_WINDOW // 4)
            except StreamReset:
                broken += 1
        assert 1 <= broken < 6


async def _send_quietly(stream: YamuxStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except StreamReset:
        return


# ---- windows ----------------------------------------------------------------------------------------------------


async def test_windows_grow_to_what_a_long_path_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    async with muxed_pair() as (a, b):
        keepalive = b._machine.keepalive
        monkeypatch.setattr(keepalive, "answered", lambda *_: None)
        keepalive.least_rtt = 1.0  # as if the path were so long
        near, far = await stream_pair(a, b)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill, near)
            got = 0
            while got < 60_000_000:
                got += len(await far.receive_some())
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert far.unread > 4 * 1024 * 1024  # it started at 256 KiB
            assert far.unread <= 16 * 1024 * 1024
            nursery.cancel_scope.cancel()


# ---- the face of IMuxedStream -----------------------------------------------------------------------------------
