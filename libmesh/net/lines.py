"""The lines of multistream-select 1.0: how they are written, and how they are read off a stream.

Source: multiformats/multistream-select. Each line is a varint length, the text and a newline. Both sides say
`/multistream/1.0.0` first; what else is said, and when, is told in `negotiate.py`.
"""

from __future__ import annotations

from functools import lru_cache

from libmesh.net.base import StreamReset
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.stock import StockStream

HEADER = "/multistream/1.0.0"
NOT_AVAILABLE = "na"

MAX_LINE_BYTES = 1024
"""Longest line that is read. go-multistream has the same."""


@lru_cache(maxsize=256)
def encode_line(text: str) -> bytes:
    """One line of the negotiation. `text` must be shorter than 1023 bytes."""
    data = text.encode() + b"\n"
    size = len(data)
    if size > MAX_LINE_BYTES:
        raise ValueError(f"a protocol id of {size - 1} bytes; at most {MAX_LINE_BYTES - 1}")
    prefix = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    return prefix + data


HEADER_LINE = encode_line(HEADER)


@lru_cache(maxsize=256)
def opening_of(protocol: str) -> bytes:
    """What both sides say where they agree at once."""
    return HEADER_LINE + encode_line(protocol)


NOT_AVAILABLE_LINE = encode_line(NOT_AVAILABLE)


class LineReader:
    """Reads one line at a time off a stream, and not a byte more, whatever is cancelled."""

    def __init__(self, inner: YamuxStream | StockStream) -> None:
        self._inner = inner
        self._partial = b""

    def skip_nowait(self, expected: bytes) -> bool:
        """Read over exactly `expected` if that is what has arrived next, in one piece; as it usually is."""
        if self._partial or not self._inner.peek().startswith(expected):
            return False
        self._inner.receive_nowait(len(expected))
        return True

    def behind_nowait(self, expected: bytes) -> str | None:
        """The next line after exactly `expected` if both have arrived, in one piece; as they usually have."""
        arrived, start = self._inner.peek(), len(expected)
        if self._partial or len(arrived) <= start or not arrived.startswith(expected):
            return None
        end = start + 1 + arrived[start]
        if arrived[start] >= 0x80 or arrived[end - 1 : end] != b"\n":
            return None
        self._inner.receive_nowait(end)
        return arrived[start + 1 : end - 1].decode("utf-8", "replace")

    def _wanted(self) -> int:
        """How many bytes are certainly missing from the line; 0 when it is complete."""
        have = self._partial
        if not have:
            return 1
        if have[0] < 0x80:
            return have[0] + 1 - len(have)
        if len(have) < 2:
            return 1
        size = (have[0] & 0x7F) | (have[1] << 7)
        if have[1] >= 0x80 or size > MAX_LINE_BYTES:
            raise StreamReset("the peer sent too long a line in the negotiation of a protocol")
        return size + 2 - len(have)

    def read_nowait(self) -> str | None:
        """The next line if it has arrived."""
        while wanted := self._wanted():
            data = self._inner.receive_nowait(wanted)
            if data is None:
                return None
            if not data:
                raise StreamReset("the peer ended the stream in the negotiation of a protocol")
            self._partial += data
        line, self._partial = self._partial, b""
        body = line[1:] if line[0] < 0x80 else line[2:]
        if body[-1:] != b"\n":
            raise StreamReset("the peer sent no line in the negotiation of a protocol")
        return body[:-1].decode("utf-8", "replace")

    async def read(self) -> str:
        """The next line. If cancelled, nothing was lost."""
        while (line := self.read_nowait()) is None:
            await self._inner.wait_receivable()
        return line
