"""The last moments of a connection: what comes while it ends, and mistakes of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from libmesh.core.yamux_frames import DATA, FIN, HEADER, RST, SYN, WINDOW_UPDATE, Options
from libmesh.net.base import StreamReset
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.muxer import YamuxConnection
from tests.net.pairs import KEYS, noise_pair, peer_of


class WaitingConn:
    """A secure connection whose peer says something when it is told to."""

    def __init__(self) -> None:
        self.is_initiator = True
        self._said: list[bytes] = []
        self._ready = trio.Event()

    def say(self, data: bytes) -> None:
        self._said.append(data)
        self._ready.set()

    async def read(self, n: int | None = None) -> bytes:
        if not self._said:
            self._ready = trio.Event()
            await self._ready.wait()
        return self._said.pop(0)

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        return


HELLO = HEADER.pack(0, DATA, SYN, 2, 5) + b"hello"
MORE = HEADER.pack(0, DATA, 0, 2, 5) + b"again"


async def test_what_arrives_in_the_moment_in_which_a_connection_ends_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    secured: Any = WaitingConn()
    connection = YamuxConnection(secured, peer_of(KEYS[1]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        secured.say(HELLO)
        stream = await connection.accept_stream()
        await trio.testing.wait_all_tasks_blocked()
        secured.say(MORE)  # the reading task has it, and before its turn comes
        connection._fail("lost by another task")
    assert connection.is_closed
    assert await stream.receive_some() == b"hello"
    with pytest.raises(StreamReset):
        await stream.receive_some()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("end", [YamuxStream.reset_nowait, YamuxStream.close_nowait, YamuxStream.release])
async def test_the_end_of_a_stream_leaves_alone_the_next_one_to_which_the_peer_gives_its_number(
    end: Callable[[YamuxStream], None],
) -> None:
    secured: Any = WaitingConn()
    connection = YamuxConnection(secured, peer_of(KEYS[1]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        secured.say(HELLO)
        former = await connection.accept_stream()
        secured.say(HEADER.pack(0, WINDOW_UPDATE, RST, 2, 0) + HELLO)
        stream = await connection.accept_stream()
        end(former)
        secured.say(MORE)
        assert await stream.receive_some() == b"hello"
        assert await stream.receive_some() == b"again"
        connection.give_up("lost")
        with pytest.raises(StreamReset, match="lost"):
            await stream.receive_some()


async def test_a_stream_that_both_sides_finish_unacknowledged_makes_room_for_the_next_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    secured: Any = WaitingConn()
    connection = YamuxConnection(secured, peer_of(KEYS[1]), Options(max_unacknowledged=1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        stream = await connection.open_stream()
        secured.say(HEADER.pack(0, WINDOW_UPDATE, FIN, stream.stream_id, 0))
        assert await stream.receive_some() == b""
        with trio.fail_after(60):
            async with trio.open_nursery() as openers:
                openers.start_soon(connection.open_stream)
                await trio.testing.wait_all_tasks_blocked()
                ended = trio.current_time()
                await stream.send_eof()
        assert trio.current_time() - ended < 0.1, "it waited for a tick of the keepalive"
        nursery.cancel_scope.cancel()


async def test_a_mistake_beside_a_cancellation_costs_the_connection_and_not_the_host(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured: Any = WaitingConn()
    connection = YamuxConnection(secured, peer_of(KEYS[1]))

    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("a mistake of ours")

    monkeypatch.setattr(connection, "_receive_loop", fail_when_cancelled)
    caplog.set_level(logging.CRITICAL, "libmesh.net.muxer")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert connection.is_closed


async def test_a_send_that_finds_the_connection_lost_says_so(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> bool:
        raise StreamReset("connection lost")

    secured: Any = WaitingConn()
    connection = YamuxConnection(secured, peer_of(KEYS[1]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        stream = await connection.open_stream()
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(connection._channel, "flush_nowait", lost)
        with trio.fail_after(60), pytest.raises(StreamReset):
            await stream.send_all(bytes(1_000_000))


async def test_a_stream_that_came_behind_the_muxers_negotiation_is_served_at_once() -> None:
    near, far = await noise_pair()
    near.channel.put([b"agreed", HEADER.pack(0, DATA, SYN, 1, 5) + b"hello"])
    assert near.channel.flush_nowait()
    assert await far.read(6) == b"agreed"
    served: list[YamuxStream] = []
    connection = YamuxConnection(far, near.get_local_peer(), serve=served.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await trio.testing.wait_all_tasks_blocked()
        assert [stream.receive_nowait() for stream in served] == [b"hello"]
        nursery.cancel_scope.cancel()
    await near.close()
