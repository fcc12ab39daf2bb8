"""Messages on streams: each one preceded by its length as an unsigned varint (the multiformats one, at most 4 bytes).

Reads take exactly the bytes of one message from the stream, never any that follow it, so that what comes after a
message may be something else, such as a tunnel's bytes.
"""

from __future__ import annotations

import trio

from libmesh.wire_pieces import WireError

_LONGEST_PREFIX = 4


def frame(data: bytes) -> bytes:
    """`data` with its length in front."""
    prefix, rest = bytearray(), len(data)
    while rest > 0x7F:
        prefix.append(rest & 0x7F | 0x80)
        rest >>= 7
    prefix.append(rest)
    return bytes(prefix) + data


async def receive_frame(stream: trio.abc.ReceiveStream, limit: int) -> bytes:
    """One message of at most `limit` bytes.

    Raises `WireError` for a longer one, or if the stream ends within it. If cancelled, part of it may be lost.
    """
    length = 0
    for position in range(_LONGEST_PREFIX):
        (byte,) = await _exactly(stream, 1)
        length |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            break
    else:
        raise WireError(f"a length prefix of more than {_LONGEST_PREFIX} bytes")
    if length > limit:
        raise WireError(f"a message of {length} bytes; at most {limit} are allowed here")
    return await _exactly(stream, length)


async def _exactly(stream: trio.abc.ReceiveStream, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = await stream.receive_some(min(length - len(data), 64 * 1024))
        if not piece:
            raise WireError("the stream ended within a message")
        data += piece
    return bytes(data)
