"""multistream-select on streams: with itself, with raw lines, with garbage."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from libmesh.errors import PeerUnreachable, ServiceRefused
from libmesh.net import negotiate
from libmesh.net.base import Stream, StreamReset
from libmesh.net.lines import encode_line
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.muxer import YamuxConnection
from libmesh.net.negotiate import Libp2pStream, accept_stream, open_lazy_stream
from libmesh.peers import PeerId
from tests.net.hosts import join, networks
from tests.net.pairs import drain, fill, muxed_pair, stream_pair

PEER = PeerId("somebody")
HEADER = encode_line("/multistream/1.0.0")


def known(protocol: str) -> bool:
    return protocol.startswith("/known")


@asynccontextmanager
async def raw_pair() -> AsyncIterator[tuple[YamuxStream, YamuxStream]]:
    async with muxed_pair() as (a, b):
        yield await stream_pair(a, b)


async def read_exactly(stream: YamuxStream | Stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await stream.receive_some(count - len(data))
        assert piece, "the end came too soon"
        data += piece
    return data


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("na", b"\x03na\n"),
        ("/multistream/1.0.0", b"\x13/multistream/1.0.0\n"),
        ("x" * 126, b"\x7f" + b"x" * 126 + b"\n"),
        ("x" * 127, b"\x80\x01" + b"x" * 127 + b"\n"),
        ("x" * 1023, b"\x80\x08" + b"x" * 1023 + b"\n"),
    ],
)
def test_lines_are_varint_text_and_newline(text: str, line: bytes) -> None:
    assert encode_line(text) == line


def test_a_line_too_long_to_be_read_is_not_sent() -> None:
    with pytest.raises(ValueError, match="1024 bytes"):
        encode_line("x" * 1024)


# ---- the side that answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_a_proposal_cut_anywhere_is_answered_and_what_follows_is_left(size: int) -> None:
    async with raw_pair() as (near, far):
        said = HEADER + encode_line("/unknown") + encode_line("/known/1") + b"request"

        async def say() -> None:
            for start in range(0, len(said), size):
                await near.send_all(said[start : start + size])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say)
            stream = await accept_stream(far, PEER, known)
            assert (stream.protocol, stream.peer) == ("/known/1", PEER)
            answer = HEADER + encode_line("na") + encode_line("/known/1")
            assert await read_exactly(near, len(answer)) == answer
            assert await read_exactly(stream, 7) == b"request"


async def test_a_careful_opener_hears_the_header_before_it_proposes() -> None:
    async with raw_pair() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(accept_stream, far, PEER, known)
        await near.send_all(HEADER)
        assert await read_exactly(near, len(HEADER)) == HEADER
        await near.send_all(encode_line("/known/1"))
        assert await read_exactly(near, 10) == encode_line("/known/1")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"GET / HTTP/1.1\r\n" * 10, "no line|multistream|too long"),
        (b"\x05abcde", "no line"),
        (encode_line("/multistream/2.0.0"), "does not speak"),
        (b"\xff\xff\xff\xff\x0f" + bytes(100), "too long"),
        (b"\x80\x10" + bytes(100), "too long"),
        (b"\x00", "no line"),
        (HEADER + encode_line("/unknown") * 64, "none of 64"),
    ],
)
async def test_garbage_resets_the_stream(said: bytes, why: str) -> None:
    async with raw_pair() as (near, far):
        await near.send_all(said)
        with pytest.raises(StreamReset, match=why):
            await accept_stream(far, PEER, known)
        with pytest.raises(StreamReset):
            await drain(near)


async def test_an_end_in_place_of_a_proposal_resets_the_stream() -> None:
    async with raw_pair() as (near, far):
        await near.send_all(HEADER[:5])
        await near.send_eof()
        with pytest.raises(StreamReset, match="ended"):
            await accept_stream(far, PEER, known)


async def test_a_peer_that_names_nothing_in_time_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negotiate, "NEGOTIATION_TIME", 0.05)
    async with raw_pair() as (near, far):
        await near.send_all(HEADER)
        with pytest.raises(StreamReset, match="within"):
            await accept_stream(far, PEER, known)
        await read_exactly(near, len(HEADER))
        with pytest.raises(StreamReset):
            await near.receive_some()


async def test_a_cancelled_accept_resets_the_stream() -> None:
    async with raw_pair() as (near, far):
        with trio.move_on_after(0.01):
            await accept_stream(far, PEER, known)
        with pytest.raises(StreamReset):
            await near.receive_some()


# ---- the side that opens ----------------------------------------------------------------------------------------


@asynccontextmanager
async def answered(answer: bytes) -> AsyncIterator[tuple[Stream, YamuxStream]]:
    """A lazily opened stream, and its far end, which has said `answer` already."""
    async with muxed_pair() as (a, b):
        stream = await open_lazy_stream(a, PEER, "/known/1")
        far = await b.accept_stream()
        if answer:
            await far.send_all(answer)
        yield stream, far


async def test_header_proposal_and_request_leave_together() -> None:
    async with answered(b"") as (stream, far):
        await stream.send_all(b"request")
        expected = HEADER + encode_line("/known/1") + b"request"
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert far.receive_nowait(1000) == expected
        await far.send_all(HEADER + encode_line("/known/1") + b"response")
        assert await stream.receive_some(3) == b"res"
        assert await stream.receive_some() == b"ponse"


async def test_request_and_end_leave_together() -> None:
    async with answered(b"") as (stream, far):
        await stream.send_all(b"request")
        await stream.send_eof()
        await read_exactly(far, len(HEADER + encode_line("/known/1") + b"request"))
        assert far.receive_nowait() == b""


async def test_answer_and_end_leave_together() -> None:
    async with raw_pair() as (stream, far):
        await stream.send_eof()
        assert await far.receive_some() == b""
        await far.send_all(b"answer")
        await far.send_eof()
        assert await stream.receive_some() == b"answer"
        assert stream.receive_nowait() == b""


async def test_a_cancelled_first_send_proposes_nothing_and_the_next_one_does() -> None:
    async with answered(b"") as (stream, far):
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.send_all(b"lost")
        assert scope.cancelled_caught
        await stream.send_all(b"request")
        expected = HEADER + encode_line("/known/1") + b"request"
        assert await read_exactly(far, len(expected)) == expected


async def test_a_first_send_while_another_task_waits_to_send_leaves_the_stream_as_it_was() -> None:
    async with muxed_pair() as (a, b):
        near, far = await stream_pair(a, b)
        stream = Libp2pStream(near, PEER, "/known/1", agreed=False)
        near._sending = True  # what another task does that waits
        with pytest.raises(trio.BusyResourceError):
            await stream.send_all(b"lost")
        near._sending = False
        await stream.send_all(b"request")
        expected = HEADER + encode_line("/known/1") + b"request"
        assert await read_exactly(far, len(expected)) == expected


async def test_a_receive_alone_proposes_too() -> None:
    async with answered(HEADER + encode_line("/known/1") + b"greeting") as (stream, far):
        assert await stream.receive_some() == b"greeting"
        proposal = HEADER + encode_line("/known/1")
        assert await read_exactly(far, len(proposal)) == proposal


async def test_an_end_of_file_alone_proposes_too() -> None:
    async with answered(b"") as (stream, far):
        await stream.send_eof()
        accepted = await accept_stream(far, PEER, known)
        assert await accepted.receive_some() == b""


async def test_an_answer_in_pieces_survives_cancelled_receives() -> None:
    async with answered(b"") as (stream, far):
        for byte in HEADER + encode_line("/known/1") + b"!":
            with trio.move_on_after(0.001):
                assert await stream.receive_some() == b"!"
                break
            await far.send_all(bytes([byte]))
        assert await stream.receive_some() == b"!"


async def test_a_refusal_comes_out_of_receive_and_then_of_everything() -> None:
    async with answered(HEADER + encode_line("na")) as (stream, far):
        await stream.send_all(b"request")
        for _ in range(2):
            with pytest.raises(ServiceRefused) as caught:
                await stream.receive_some()
            assert caught.value.reason == "unknown_protocol"
        with pytest.raises(ServiceRefused):
            await stream.send_all(b"more")
        with pytest.raises(StreamReset):
            await drain(far)


async def test_a_refusal_comes_out_of_a_send_that_fails_because_of_it() -> None:
    async with answered(HEADER + encode_line("na")) as (stream, far):
        far.reset_nowait()
        with pytest.raises(ServiceRefused):
            await fill(stream)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\n" * 9, HEADER + encode_line("/other"), encode_line("/known/1"), encode_line("na")],
)
async def test_nonsense_for_an_answer_resets_the_stream(answer: bytes) -> None:
    async with answered(answer) as (stream, far):
        with pytest.raises(StreamReset):
            await stream.receive_some()
        with pytest.raises(StreamReset):
            await drain(far)


async def test_a_reset_in_place_of_an_answer_is_a_reset() -> None:
    async with answered(b"") as (stream, far):
        far.reset_nowait()
        with pytest.raises(StreamReset):
            await stream.receive_some()


async def open_without_end(connection: YamuxConnection) -> None:
    while True:
        await open_lazy_stream(connection, PEER, "/known/1")


async def test_opening_on_a_dead_connection_says_unreachable() -> None:
    async with muxed_pair() as (a, b):
        await b.close()
        with pytest.raises(PeerUnreachable):
            await open_without_end(a)


async def test_both_sides_together_and_half_closed() -> None:
    async with muxed_pair() as (a, b):

        async def serve(connection: YamuxConnection) -> None:
            stream = await accept_stream(await connection.accept_stream(), PEER, known)
            data = b""
            while piece := await stream.receive_some():
                data += piece
            await stream.send_all(data[::-1])
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, b)
            stream = await open_lazy_stream(a, PEER, "/known/1")
            await stream.send_all(b"abc")
            await stream.send_eof()
            assert await stream.receive_some() == b"cba"
            assert await stream.receive_some() == b""
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert a.stream_count == b.stream_count == 0


@pytest.mark.parametrize("size", [1, 100, 5000])
async def test_a_request_that_came_with_a_refused_proposal_does_not_hide_the_refusal(size: int) -> None:
    async with networks(2) as (near, far):
        await join(near, far)
        stream = await near.open_stream(far.peer, "/nobody/serves/this")
        await stream.send_all(bytes(size))
        with pytest.raises(ServiceRefused):
            await stream.receive_some()
