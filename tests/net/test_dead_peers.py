"""A peer that is gone without a word: how long until both the connection and its streams know, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from libmesh.core.yamux_frames import ACK, HEADER, PING, SYN, Options
from libmesh.net.base import StreamReset
from libmesh.net.muxer import YamuxConnection
from tests.net.pairs import KEYS, peer_of

BOUND = Options().ping_interval + Options().ping_timeout


class FadingConn:
    """A secure connection whose peer answers pings for a while, and then is not there: what is sent is taken, by nobody."""

    def __init__(self, answers: int) -> None:
        self.is_initiator = True
        self._answers = answers
        self._said, self._hears = trio.open_memory_channel[bytes](100)
        self.last_said = trio.current_time()

    async def read(self, n: int | None = None) -> bytes:
        return await self._hears.receive()

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        for start in range(0, len(data), HEADER.size):
            _, kind, flags, _, opaque = HEADER.unpack_from(data, start)
            if kind == PING and flags & SYN and self._answers:
                self._answers -= 1
                self.last_said = trio.current_time()
                self._said.send_nowait(HEADER.pack(0, PING, ACK, 0, opaque))

    async def close(self) -> None:
        self._said.close()


@pytest.mark.parametrize("answers", [0, 1, 2, 3, 4, 10])
async def test_a_peer_that_is_gone_fails_every_stream_within_the_keepalive_bound(
    answers: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Also where what is sent is taken by somebody between us: that is no sign of the peer's life."""
    secured: Any = FadingConn(answers)
    connection = YamuxConnection(secured, peer_of(KEYS[1]))
    ended: list[float] = []

    async def use() -> None:
        stream = await connection.open_stream()
        with pytest.raises(StreamReset, match="no sign of life"):
            await stream.receive_some()
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        for _ in range(5):
            nursery.start_soon(use)
    assert connection.is_closed
    assert len(ended) == 5
    assert max(ended) - secured.last_said <= BOUND


async def test_a_peer_that_only_makes_room_now_and_then_is_alive(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """As behind a relay and a slow line, where the answers to pings wait behind bulk."""

    class SlowConn(FadingConn):
        gone = False

        async def write(self, data: bytes) -> None:
            await trio.sleep(float("inf") if self.gone else 4)

    secured: Any = SlowConn(0)
    connection = YamuxConnection(secured, peer_of(KEYS[1]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        await connection.event_started.wait()
        for _ in range(20):
            stream = await connection.open_stream()
            await stream.send_all(b"bulk")
            await trio.sleep(3)
        assert not connection.is_closed
        secured.gone = True
        await stream.send_all(b"more")
        await trio.sleep(BOUND + 4)  # the write that is under way
        assert connection.is_closed
