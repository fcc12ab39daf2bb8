"""How streams that outlive their connections are closed: in the middle of something, and while they are sought."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from libmesh import Stream, StreamReset
from libmesh.lasting import LastingStream
from libmesh.net import journal as books
from tests.test_lasting import fails, pair, swallow
from tests.test_resuming import nothing_left
from tests.town import town, until


async def cannot_send(stream: Stream, size: int) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(bytes(size))


async def is_reset(stream: Stream) -> None:
    with pytest.raises(StreamReset):
        await swallow(stream)


async def test_what_is_closed_while_it_is_sought_and_sent_on_is_not_found_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
        nursery.start_soon(is_reset, other)
        place.hub.partition({near.peer}, {far.peer})
        nursery.start_soon(cannot_send, one, 100)
        await trio.sleep(2)
        assert one.connection_lost
        await one.aclose()
        place.hub.partition()
        await until(partial(nothing_left, near, far))
        assert one._stream._closed  # type: ignore[attr-defined]


async def test_what_is_reset_in_the_very_turn_in_which_it_is_found_is_found_for_nobody(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
        found = one._lifeline.again

        async def found_and_reset() -> Stream:
            stream = await found()
            one.reset()
            return stream

        one._lifeline.again = found_and_reset  # type: ignore[method-assign]
        nursery.start_soon(fails, one)
        place.hub.cut(near.peer, far.peer)
        with trio.fail_after(5):
            await is_reset(other)
        assert one._stream._closed  # type: ignore[attr-defined]


async def test_half_a_message_is_never_taken_for_the_whole(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "KEPT_BYTES", 100_000)
    async with town() as place, pair(place) as (_, far, (one, other)), trio.open_nursery() as nursery:
        monkeypatch.setattr(far.resumption, "tell", lambda *_: None)  # so that the sender waits for room
        nursery.start_soon(cannot_send, one, 1_000_000)
        nursery.start_soon(is_reset, other)
        await trio.sleep(5)
        await one.aclose()


async def test_closing_after_the_end_was_sent_waits_for_the_stream_that_is_sought(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
        await one.send_all(b"all")
        await one.send_eof()
        place.hub.partition({near.peer}, {far.peer})
        nursery.start_soon(cannot_receive, one)
        await until(lambda: one.connection_lost)
        nursery.start_soon(one.aclose)
        await trio.sleep(1)
        place.hub.partition()
        assert b"".join([bytes(data) async for data in other]) == b"all"
        await until(lambda: one._stream._closed)  # type: ignore[attr-defined]


async def cannot_receive(stream: LastingStream) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()


async def test_an_end_whose_sending_was_cancelled_was_not_sent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place, pair(place) as (near, far, (one, other)), trio.open_nursery() as nursery:
        nursery.start_soon(swallow, one)
        with trio.CancelScope() as scope:
            scope.cancel()
            await one.send_eof()
        place.hub.cut(near.peer, far.peer)
        nursery.start_soon(say_all, one, b"not the end")
        assert b"".join([bytes(data) async for data in other]) == b"not the end"
        await other.aclose()


async def say_all(stream: Stream, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()
