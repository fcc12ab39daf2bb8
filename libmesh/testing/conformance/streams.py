"""Messages on streams, as the specification frames them, and how a stream ends."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError, Message

from libmesh.net.base import Stream
from libmesh.testing.conformance.rules import RuleBroken

PIECE = 64 * 1024

_M = TypeVar("_M", bound=Message)


class Ending(Enum):
    """What became of the direction that we read."""

    END = "ended"
    RESET = "reset"
    OPEN = "left open"


def prefix(length: int, size: int = 0) -> bytes:
    """`length` as an unsigned varint of at least `size` bytes."""
    out = bytearray()
    while length > 0x7F or len(out) + 1 < size:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)


def frame(message: Message | bytes) -> bytes:
    """A message with its length in front."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return prefix(len(data)) + data


async def receive(stream: Stream, kind: type[_M], limit: int) -> _M:
    """The next message. Raises `RuleBroken` if what comes is none, or is longer than `limit`."""
    return parsed(kind, await receive_frame(stream, kind.__name__, limit))


async def receive_frame(stream: Stream, name: str, limit: int) -> bytes:
    """The next message's bytes."""
    length = shift = 0
    while True:
        (byte,) = await exactly(stream, 1, name)
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift >= 28:
            raise RuleBroken(f"the length of its {name} has more than 4 bytes")
    if length > limit:
        raise RuleBroken(f"its {name} has {length} bytes; at most {limit} are allowed")
    return await exactly(stream, length, name)


def parsed(kind: type[_M], data: bytes) -> _M:
    """`data` as a message. Raises `RuleBroken`."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise RuleBroken(f"its {kind.__name__} does not decode: {exc}") from exc
    return message


async def exactly(stream: Stream, count: int, name: str = "answer") -> bytes:
    """`count` bytes. Raises `RuleBroken` if the stream ends before."""
    data = b""
    try:
        while len(data) < count:
            piece = await stream.receive_some(min(count - len(data), PIECE))
            if not piece:
                raise RuleBroken(f"it ended the stream {'within' if data else 'before'} its {name}")
            data += piece
    except trio.BrokenResourceError as exc:
        raise RuleBroken(f"it reset the stream {'within' if data else 'before'} its {name}") from exc
    return data


async def send(stream: Stream, data: bytes, *, end: bool = False) -> None:
    """Send what the other side may not want to read to its end."""
    try:
        await stream.send_all(data)
        if end:
            await stream.send_eof()
    except trio.BrokenResourceError:
        return  # it shows in how the stream ends


async def ending_of(stream: Stream, within: float, most: int = 1024 * 1024) -> tuple[Ending, bytes]:
    """Read until the stream ends, at most `within` seconds and `most` bytes: how it ended, and what came."""
    data = b""
    with trio.move_on_after(within):
        try:
            while len(data) < most:
                piece = await stream.receive_some(PIECE)
                if not piece:
                    return Ending.END, data
                data += piece
        except trio.BrokenResourceError:
            return Ending.RESET, data
    return Ending.OPEN, data
