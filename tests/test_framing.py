"""Frames: a length in front, a limit, and never a byte too many."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from libmesh.framing import frame, receive_frame
from libmesh.wire_pieces import WireError


async def receive(data: bytes, limit: int = 1000) -> bytes:
    """What comes out when `data` comes in and then the end."""
    send, receive = trio.testing.memory_stream_one_way_pair()
    await send.send_all(data)
    send.close()
    return await receive_frame(receive, limit)


@pytest.mark.parametrize(
    ("length", "prefix"),
    [
        (0, "00"),
        (1, "01"),
        (127, "7f"),
        (128, "8001"),
        (300, "ac02"),
        (16383, "ff7f"),
        (16384, "808001"),
        (2**21, "80808001"),
    ],
)
async def test_the_length_is_a_varint(length: int, prefix: str) -> None:
    framed = frame(bytes(length))
    assert framed == bytes.fromhex(prefix) + bytes(length)
    assert await receive(framed, limit=length) == bytes(length)


@given(
    st.lists(st.binary(max_size=300), max_size=5),
    st.lists(st.integers(1, 50), min_size=1),
    st.binary(max_size=20),
)
def test_messages_come_out_whole_however_they_are_cut_and_what_follows_stays(
    messages: list[bytes], cuts: list[int], rest: bytes
) -> None:
    async def check() -> None:
        send, incoming = trio.testing.memory_stream_one_way_pair()
        data = b"".join(map(frame, messages)) + rest

        async def feed() -> None:
            position = 0
            while position < len(data):
                step = cuts[position % len(cuts)]
                await send.send_all(data[position : position + step])
                position += step
            send.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            assert [await receive_frame(incoming, 300) for _ in messages] == messages
            left = b""
            while piece := await incoming.receive_some():
                left += piece
            assert left == rest

    trio.run(check)


async def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
    send, incoming = trio.testing.memory_stream_one_way_pair()
    await send.send_all(b"\xe9\x07")  # 1,001, and nothing after it
    with pytest.raises(WireError, match=r"1001 bytes; at most 1000"):
        await receive_frame(incoming, 1000)


@pytest.mark.parametrize("prefix", ["80808080", "ffffffff", "8080808001"])
async def test_a_length_of_more_than_four_bytes_is_refused(prefix: str) -> None:
    with pytest.raises(WireError, match="4 bytes"):
        await receive(bytes.fromhex(prefix), limit=2**40)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x05", b"\x05abcd"])
async def test_a_stream_that_ends_within_a_message_is_an_error(data: bytes) -> None:
    with pytest.raises(WireError, match="ended within"):
        await receive(data)
