"""The calls of a stream: py-libp2p's own and ours, alone and many at once."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from libp2p.stream_muxer.exceptions import (
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)

from libmesh.core.yamux_frames import (
    Options,
)
from libmesh.net.base import StreamReset
from tests.net.hosts import until
from tests.net.pairs import drain, muxed_pair, stream_pair


async def test_py_libp2ps_calls_mean_what_they_mean_on_the_stock_muxer() -> None:
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        await near.write(b"hello")
        assert await far.read(2) == b"he"
        assert await far.read() == b"llo"
        assert await far.read(0) == b""
        await near.close()
        with pytest.raises(MuxedStreamEOF):
            await far.read(1)
        with pytest.raises(MuxedStreamClosed):
            await near.write(b"x")
        await far.write(b"reading goes on after close")
        assert await near.read(7) == b"reading"
        await far.reset()
        assert await near.read(-1) == b" goes on after close"
        with pytest.raises(MuxedStreamReset):
            await near.read(1)
        assert near.is_closed
        assert near.get_remote_address() is not None


async def test_writers_of_one_stream_do_not_interleave() -> None:
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        async with trio.open_nursery() as nursery:
            for letter in b"abcd":
                nursery.start_soon(near.write, bytes([letter]) * 300_000)
            got = b""
            while len(got) < 1_200_000:
                got += await far.read()
        assert sorted(got[start] for start in range(0, 1_200_000, 300_000)) == sorted(b"abcd")
        assert all(len(set(got[start : start + 300_000])) == 1 for start in range(0, 1_200_000, 300_000))


async def test_a_message_that_leaves_alone_is_seen_to_have_left() -> None:
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        for _ in range(3):
            before = a.batches
            await near.send_all(b"small")
            assert a.batches > before, "who looks after the connection would take it for unused"
            assert await far.receive_some() == b"small"
            await trio.testing.wait_all_tasks_blocked()


async def test_deadlines_end_reads_and_writes() -> None:
    async with muxed_pair() as (a, b):
        near, _ = await stream_pair(a, b)
        with pytest.raises(ValueError, match="ttl"):
            near.set_deadline(-1)
        near.set_deadline(0)
        with pytest.raises(MuxedStreamError, match="deadline"):
            await near.read(1)
        with pytest.raises(MuxedStreamError, match="deadline"):
            await near.write(bytes(10_000_000))


async def test_leaving_the_context_ends_the_sending_direction() -> None:
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        async with near:
            await near.write(b"x")
        assert await far.read(1) == b"x"
        with pytest.raises(MuxedStreamEOF):
            await far.read(1)


async def test_a_stream_closed_by_py_libp2p_is_freed_though_the_peer_never_finishes() -> None:
    options = Options(linger=0.05, ping_interval=0.02, ping_timeout=1.0)
    async with muxed_pair(options) as (a, b):
        near, _far = await stream_pair(a, b)
        await near.close()
        await until(lambda: a.stream_count == 0)
        with pytest.raises(MuxedStreamReset):
            await near.read(1)


async def test_calls_that_never_wait() -> None:
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        assert far.receive_nowait() is None
        assert near.send_nowait(b"") == 0
        assert near.send_nowait(b"abc") == 3
        assert near.send_nowait(memoryview(bytes(100)).cast("I")) == 100
        sent = near.send_nowait(bytes(10_000_000))
        assert 16_384 <= sent < 10_000_000
        got = 0
        while got < 103 + sent:
            got += len(await far.receive_some())
        near.send_eof_nowait()
        assert await far.receive_some() == b""
        assert far.receive_nowait() == b""


async def test_closing_a_stream_while_another_task_sends_resets_it() -> None:
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await near.send_all(bytes(50_000_000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked(0.02)
            with pytest.raises(trio.BusyResourceError):
                near.send_eof_nowait()
            await near.aclose()
        with pytest.raises(StreamReset):
            await drain(far)


# ---- many -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_ten_thousand_idle_streams_on_one_connection() -> None:
    async with muxed_pair() as (a, b):
        pairs = [await stream_pair(a, b) for _ in range(10_000)]
        for near, far in pairs[::97]:
            await near.send_all(b"x")
            assert await far.receive_some() == b"x"
        for near, far in pairs:
            await near.aclose()
            await far.aclose()
        await until(lambda: a.stream_count == b.stream_count == 0)
