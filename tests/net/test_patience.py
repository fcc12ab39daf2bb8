"""Minutes, in virtual time: readers that pause, connections that die without a word."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from libmesh.core.yamux_frames import Options
from libmesh.net.base import StreamReset
from libmesh.net.muxed_stream import YamuxStream
from tests.net.memory_conns import memory_muxed_pair
from tests.net.pairs import fill, stream_pair

MINUTES = 60.0


@pytest.mark.parametrize("minutes", [2, 60])
async def test_a_reader_that_pauses_for_minutes_only_pauses_its_writer(
    minutes: int, autojump_clock: trio.testing.MockClock
) -> None:
    data = random.Random(minutes).randbytes(3_000_000)
    async with memory_muxed_pair() as (a, b, _):
        near, far = await stream_pair(a, b)
        other, echo = await stream_pair(a, b)
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                await near.send_all(data)
                await near.send_eof()

            nursery.start_soon(write)
            for _ in range(10):
                await trio.sleep(minutes * MINUTES / 10)
                await other.send_all(b"still there?")
                assert await echo.receive_some() == b"still there?"
            assert far.unread <= Options().max_window
            got = bytearray()
            while piece := await far.receive_some():
                got += piece
        assert bytes(got) == data


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "full"])
@pytest.mark.parametrize("lived", [0.0, 3.0, 60.0])
@pytest.mark.parametrize(("interval", "timeout"), [(10.0, 5.0), (1.0, 0.5), (60.0, 20.0)])
async def test_a_connection_that_dies_fails_every_stream_on_both_sides_within_the_bound(
    interval: float, timeout: float, lived: float, busy: bool, autojump_clock: trio.testing.MockClock
) -> None:
    options = Options(ping_interval=interval, ping_timeout=timeout)
    async with memory_muxed_pair(options) as (a, b, conns):
        pairs = [await stream_pair(a, b) for _ in range(4)]
        await trio.sleep(lived)
        failed: list[float] = []

        async def use(stream: YamuxStream, sends: bool) -> None:
            with pytest.raises(StreamReset):
                await (fill(stream) if sends else stream.receive_some())
            failed.append(trio.current_time())

        died = trio.current_time()
        for conn in conns:
            conn.cut = True
        async with trio.open_nursery() as nursery:
            for near, far in pairs:
                nursery.start_soon(use, near, busy)
                nursery.start_soon(use, far, False)
        assert len(failed) == 8
        assert max(failed) - died <= interval + timeout
        assert a.is_closed
        assert b.is_closed


async def test_a_stream_that_nobody_ever_acknowledged_makes_room_for_the_next_when_it_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    options = Options(max_unacknowledged=1, linger=30)
    async with memory_muxed_pair(options) as (a, _b, _):
        await (await a.open_stream()).aclose()
        with trio.fail_after(2 * options.linger):
            await a.open_stream()


async def test_both_sides_forget_a_stream_that_is_closed_by_either(
    autojump_clock: trio.testing.MockClock,
) -> None:
    options = Options(linger=30)
    async with memory_muxed_pair(options) as (a, b, _):
        for closer in (0, 1):
            pair = await stream_pair(a, b)
            await pair[closer].aclose()
            await trio.sleep(options.linger + 1)
            assert a.stream_count == b.stream_count == 0
        near, _far = await stream_pair(a, b)
        near.reset_nowait()
        await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert a.stream_count == b.stream_count == 0
