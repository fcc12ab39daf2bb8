"""What leaves a connection when, and in how many frames: the sending half alone, on a channel that only remembers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from libmesh.core.yamux import Yamux
from libmesh.core.yamux_frames import DATA, FIN, HEADER, WINDOW_UPDATE
from libmesh.core.yamux_parser import FrameParser
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.outbound import COMPANY_TIME, POSTED_BYTES, SYN_TIME, Outbound
from libmesh.net.records import Channel, Piece


class Remembering(Channel):
    """Takes everything at once, and knows what came when."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, bytes]] = []

    async def receive(self) -> list[bytes]:
        await trio.sleep_forever()
        return []

    def put(self, pieces: Sequence[Piece]) -> None:
        self.batches.append((trio.current_time(), b"".join(pieces)))

    def flush_nowait(self) -> bool:
        return True

    async def flush(self) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    async def aclose(self) -> None:
        return

    @property
    def data(self) -> list[tuple[int, bytes]]:
        """The DATA frames so far: stream and body."""
        items = FrameParser().feed(b"".join(batch for _, batch in self.batches))
        bodies = iter(item for item in items if not isinstance(item, tuple))
        return [
            (item[3], bytes(next(bodies))) for item in items if isinstance(item, tuple) and item[1] == DATA
        ]


class Sender:
    """An `Outbound` and what it works with."""

    def __init__(self) -> None:
        self.machine = Yamux(initiator=True, now=trio.current_time())
        self.channel = Remembering()
        self.failed: list[str] = []
        self.outbound = Outbound(self.machine, self.channel, self.failed.append)

    def open(self) -> YamuxStream:
        stream_id = self.machine.open(trio.current_time())
        assert stream_id is not None
        nobody: Any = None
        return YamuxStream(nobody, stream_id, self.outbound)


@asynccontextmanager
async def sender() -> AsyncIterator[Sender]:
    made = Sender()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.outbound.run)
        nursery.start_soon(made.outbound.run_late)
        await trio.testing.wait_all_tasks_blocked()
        yield made
        nursery.cancel_scope.cancel()


async def test_what_waits_for_company_leaves_in_time_when_none_comes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with sender() as side:
        start = trio.current_time()
        assert side.outbound.post(side.open(), b"alone", hurry=False)
        await trio.sleep(1)
        ((left, _),) = side.channel.batches
        assert left == pytest.approx(start + COMPANY_TIME)


@pytest.mark.parametrize("pause", [COMPANY_TIME / 10, COMPANY_TIME / 2, COMPANY_TIME * 0.9, COMPANY_TIME * 3])
async def test_the_last_of_many_that_had_company_leaves_in_time_too(
    pause: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with sender() as side:
        for _ in range(30):
            side.outbound.post(side.open(), b"has company", hurry=False)
            side.outbound.pump()
            await trio.sleep(pause)
        assert len(side.channel.batches) == 30
        start = trio.current_time()
        side.outbound.post(side.open(), b"alone", hurry=False)
        await trio.sleep(1)
        assert side.channel.batches[30][0] == pytest.approx(start + COMPANY_TIME)
        assert len(side.channel.batches) == 31


@pytest.mark.parametrize("earlier", [0.0, SYN_TIME / 2, COMPANY_TIME - SYN_TIME / 2])
async def test_what_may_wait_less_does_so_whatever_else_waits(
    earlier: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with sender() as side:
        start = trio.current_time()
        side.outbound.post(side.open(), b"patient", hurry=False)
        await trio.sleep(earlier)
        side.outbound.flush_later(SYN_TIME)
        await trio.sleep(1)
        ((left, _),) = side.channel.batches
        assert left == pytest.approx(min(start + COMPANY_TIME, start + earlier + SYN_TIME))


async def test_what_is_posted_before_the_tasks_run_leaves_when_they_do(
    autojump_clock: trio.testing.MockClock,
) -> None:
    side = Sender()
    side.outbound.post(side.open(), b"early", hurry=False)
    await trio.sleep(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side.outbound.run_late)
        nursery.start_soon(side.outbound.run)
        await trio.testing.wait_all_tasks_blocked()
        assert side.channel.data == [(1, b"early")]
        nursery.cancel_scope.cancel()


async def test_what_is_posted_for_a_stream_without_a_pause_is_one_frame() -> None:
    async with sender() as side:
        stream = side.open()
        before = side.machine.table.states[stream.stream_id].send_window
        for piece in (b"consent", b"answer", b"more"):
            assert side.outbound.post(stream, piece, hurry=False)
        side.outbound.pump()
        assert side.channel.data == [(1, b"consentanswermore")]
        assert side.machine.table.states[stream.stream_id].send_window == before - 17


async def test_frames_of_streams_and_their_ends_keep_their_order() -> None:
    async with sender() as side:
        first, second = side.open(), side.open()
        for stream, piece in ((first, b"a"), (second, b"b"), (first, b"c")):
            side.outbound.post(stream, piece, hurry=False)
        end = side.machine.finish(first.stream_id)
        assert HEADER.unpack(end)[2] == FIN
        side.outbound.append(end)
        side.outbound.post(second, b"d", hurry=False)
        side.outbound.pump()
        assert side.channel.data == [(1, b"a"), (3, b"b"), (1, b"c"), (3, b"d")]


async def test_a_frame_of_what_is_posted_is_bounded() -> None:
    async with sender() as side:
        stream = side.open()
        for size in (POSTED_BYTES - 1, 1, 1):
            side.outbound.post(stream, bytes(size), hurry=False)
        side.outbound.pump()
        assert [len(body) for _, body in side.channel.data] == [POSTED_BYTES, 1]


async def test_nothing_is_posted_behind_an_end_and_what_was_posted_stays_whole() -> None:
    async with sender() as side:
        stream = side.open()
        side.outbound.post(stream, b"whole", hurry=False)
        side.machine.reset(stream.stream_id)
        assert side.outbound.post(stream, b"late", hurry=False)
        side.outbound.pump()
        assert side.channel.data == [(1, b"whole")]


async def test_a_connection_that_is_over_takes_posts_and_forgets_them() -> None:
    async with sender() as side:
        stream = side.open()
        side.outbound.stop()
        for _ in range(3):
            assert side.outbound.post(stream, b"nobody", hurry=False)
        side.outbound.pump()
        assert not side.channel.batches


async def test_consent_answer_and_end_leave_together(autojump_clock: trio.testing.MockClock) -> None:
    async with sender() as side:
        for number in range(1, 11):  # which task has its turn first is a matter of chance
            stream = side.open()
            side.outbound.post(stream, b"consent ", hurry=False)
            stream.peer_finished()
            await stream.send_all(b"answer")
            assert len(side.channel.batches) == number - 1
            side.outbound.append(side.machine.finish(stream.stream_id))
            side.outbound.end(stream)
            assert len(side.channel.batches) == number
            assert side.channel.data[-1] == (stream.stream_id, b"consent answer")
            assert side.channel.batches[-1][1].endswith(
                HEADER.pack(0, WINDOW_UPDATE, FIN, stream.stream_id, 0)
            )
            await trio.testing.wait_all_tasks_blocked()


async def test_an_answer_that_is_followed_by_nothing_leaves_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with sender() as side:
        stream = side.open()
        stream.peer_finished()
        start = trio.current_time()
        await stream.send_all(b"answer")
        await trio.sleep(1)
        assert side.channel.batches[0][0] == start
        assert side.channel.data == [(1, b"answer")]
