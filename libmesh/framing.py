"""Messages on streams: each one preceded by its length as an unsigned varint (the multiformats one, at most 4 bytes).

Reads take exactly the bytes of one message from the stream, never any that follow it, so that what comes after a
message may be something else, such as a tunnel's bytes.
"""

from __future__ import annotations

import trio

from libmesh.net.base import Stream
from libmesh.wire_pieces import WireError

_LONGEST_PREFIX = 4
_PIECE_BYTES = 64 * 1024


def frame(data: bytes) -> bytes:
    """`data` with its length in front."""
    prefix, rest = bytearray(), len(data)
    while rest > 0x7F:
        prefix.append(rest & 0x7F | 0x80)
        rest >>= 7
    prefix.append(rest)
    return bytes(prefix) + data


class FrameReader:
    """Reads one message of at most `limit` bytes."""

    def __init__(self, stream: trio.abc.ReceiveStream, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._data = bytearray()

    def _missing(self) -> tuple[int, int]:
        """How long the prefix is, as far as it is known, and how many bytes are certainly still missing."""
        length = 0
        for position, byte in enumerate(self._data[:_LONGEST_PREFIX]):
            length |= (byte & 0x7F) << (7 * position)
            if byte < 0x80:
                if length > self._limit:
                    raise WireError(f"a message of {length} bytes; at most {self._limit} are allowed here")
                return position + 1, position + 1 + length - len(self._data)
        if len(self._data) >= _LONGEST_PREFIX:
            raise WireError(f"a length prefix of more than {_LONGEST_PREFIX} bytes")
        return 0, 1

    async def receive(self) -> bytes:
        """The message.

        Raises `WireError` for one that is too long, or if the stream ends within it. If cancelled, nothing is lost: the
        next call goes on.
        """
        while True:
            prefix, missing = self._missing()
            if not missing:
                return bytes(self._data[prefix:])
            self._add(await self._stream.receive_some(min(missing, _PIECE_BYTES)))

    def receive_nowait(self) -> bytes | None:
        """What `receive` would return at once, `None` if it has to wait. No checkpoint. Raises as `receive`."""
        stream = self._stream
        if not isinstance(stream, Stream):
            return None
        while True:
            prefix, missing = self._missing()
            if not missing:
                return bytes(self._data[prefix:])
            piece = stream.receive_nowait(min(missing, _PIECE_BYTES))
            if piece is None:
                return None
            self._add(piece)

    def _add(self, piece: bytes | bytearray) -> None:
        if not piece:
            raise WireError("the stream ended within a message")
        self._data += piece


async def receive_frame(stream: trio.abc.ReceiveStream, limit: int) -> bytes:
    """One message of at most `limit` bytes.

    Raises `WireError` for a longer one, or if the stream ends within it. If cancelled, part of it may be lost.
    """
    return await FrameReader(stream, limit).receive()
