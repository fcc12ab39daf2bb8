"""Inbound streams on their way to a handler: named at once, late, wrongly, or never."""

from __future__ import annotations

import pytest
import trio

from libmesh.net import serving
from libmesh.net.base import Stream, StreamReset
from libmesh.net.libp2p import Libp2pNetwork
from libmesh.net.lines import encode_line
from libmesh.net.muxed_stream import YamuxStream
from tests.net.hosts import PROTOCOL, answers, echo, join, networks, until

HEADER = encode_line("/multistream/1.0.0")
PROPOSAL = encode_line(PROTOCOL)


async def raw_stream(near: Libp2pNetwork, far: Libp2pNetwork) -> YamuxStream:
    """A stream on which nothing has been said."""
    (connection,) = near._connections.of(far.peer)
    stream = await connection.muxed_conn.open_stream()
    assert isinstance(stream, YamuxStream)
    return stream


async def read_all(stream: YamuxStream | Stream) -> None:
    with trio.fail_after(60):
        while await stream.receive_some():
            pass


async def read(stream: YamuxStream | Stream, count: int) -> bytes:
    data = b""
    with trio.fail_after(60):
        while len(data) < count:
            data += await stream.receive_some(count - len(data)) or b"!"
    return data


@pytest.mark.parametrize("size", [1, 2, 19, 20, 21, 1000])
async def test_a_stream_is_served_however_its_proposal_is_cut(size: int) -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        stream = await raw_stream(one, two)
        said = HEADER + PROPOSAL + b"hello"
        for start in range(0, len(said), size):
            await stream.send_all(said[start : start + size])
            await trio.sleep(0.002)
        assert await read(stream, len(said)) == said


async def test_an_opener_that_waits_for_the_answer_gets_it() -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        stream = await raw_stream(one, two)
        await stream.send_all(HEADER)
        assert await read(stream, len(HEADER)) == HEADER
        await stream.send_all(PROPOSAL)
        assert await read(stream, len(PROPOSAL)) == PROPOSAL


async def test_an_answer_goes_alone_where_a_handler_takes_its_time() -> None:
    async def slow(stream: Stream) -> None:
        await trio.sleep_forever()

    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, slow)
        await join(one, two)
        stream = await raw_stream(one, two)
        await stream.send_all(HEADER + PROPOSAL + b"request")
        assert await read(stream, len(HEADER + PROPOSAL)) == HEADER + PROPOSAL


@pytest.mark.parametrize("said", [b"\x00", b"GET / HTTP/1.1\r\n\r\n", HEADER + b"\xff\xff\xff", b"\x03no\n"])
async def test_garbage_costs_its_own_stream_only(said: bytes) -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        stream = await raw_stream(one, two)
        await stream.send_all(said)
        with pytest.raises(StreamReset):
            await read_all(stream)
        await answers(one, two)


async def test_streams_that_name_no_protocol_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_NAMELESS", 4)
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        silent = []
        for _ in range(8):
            silent.append(await raw_stream(one, two))
            await silent[-1].send_all(HEADER[:5])
        await until(lambda: sum(stream.is_closed for stream in silent) >= 4)  # py-libp2p's own count, too
        await answers(one, two)  # one that names its protocol at once needs no place
        kept = next(stream for stream in silent if not stream.is_closed)
        await kept.send_all(HEADER[5:] + PROPOSAL + b"late")
        assert await read(kept, len(HEADER + PROPOSAL) + 4) == HEADER + PROPOSAL + b"late"


async def test_a_stream_that_names_no_protocol_in_time_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "NEGOTIATION_TIME", 0.5)
    async with networks(2) as (one, two):
        await join(one, two)
        stream = await raw_stream(one, two)
        await stream.send_all(HEADER)
        assert await read(stream, len(HEADER)) == HEADER
        with trio.fail_after(60), pytest.raises(StreamReset):
            await stream.receive_some()


async def test_a_handler_that_fails_resets_its_stream_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(stream: Stream) -> None:
        raise RuntimeError("a mistake")

    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, broken)
        two.set_handler("/other/1", echo)
        await join(one, two)
        stream = await one.open_stream(two.peer, PROTOCOL)
        await stream.send_all(b"x")
        with pytest.raises(StreamReset):
            await read_all(stream)
        await answers(one, two, "/other/1")
    assert "a mistake" in caplog.text


async def test_streams_that_come_while_a_network_closes_are_reset() -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        two._server.tasks = None
        stream = await one.open_stream(two.peer, PROTOCOL)
        await stream.send_all(b"x")
        with trio.fail_after(60), pytest.raises(StreamReset):
            await stream.receive_some()


async def test_a_stream_that_names_its_protocol_while_a_network_closes_is_reset() -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        stream = await raw_stream(one, two)
        await stream.send_all(HEADER)
        assert await read(stream, len(HEADER)) == HEADER
        two._server.tasks = None
        await stream.send_all(PROPOSAL)
        with trio.fail_after(60), pytest.raises(StreamReset):
            await read_all(stream)
