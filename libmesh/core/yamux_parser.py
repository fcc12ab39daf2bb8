"""Yamux frames out of a stream of bytes, cut anywhere."""

from __future__ import annotations

from libmesh.core.yamux_frames import DATA, HEADER

Header = tuple[int, int, int, int, int]
"""Version, type, flags, stream id, length."""


class FrameParser:
    """Cuts received bytes into headers and pieces of bodies.

    A body is handed on as it comes: nobody waits for the rest of a frame, and nothing larger than a header is kept.
    """

    def __init__(self) -> None:
        self._partial = b""
        self._body_left = 0

    def whole(self, data: bytes | memoryview) -> Header | None:
        """The header if `data` is one DATA frame with its body, no more and no less; then it needs no `feed`."""
        if self._body_left or self._partial or len(data) <= HEADER.size:
            return None
        header: Header = HEADER.unpack_from(data)
        return header if header[1] == DATA and len(data) - HEADER.size == header[4] else None

    def feed(self, data: bytes | memoryview) -> list[Header | bytes | memoryview]:
        """Headers, and behind each DATA header the pieces of its body (like `data`, never empty) as far as they came."""
        items: list[Header | bytes | memoryview] = []
        position, end = 0, len(data)
        while position < end:
            if self._body_left:
                take = min(self._body_left, end - position)
                items.append(data if take == end else data[position : position + take])
                position += take
                self._body_left -= take
                continue
            if self._partial or end - position < HEADER.size:
                take = min(HEADER.size - len(self._partial), end - position)
                self._partial += data[position : position + take]
                position += take
                if len(self._partial) < HEADER.size:
                    break
                header: Header = HEADER.unpack(self._partial)
                self._partial = b""
            else:
                header = HEADER.unpack_from(data, position)
                position += HEADER.size
            items.append(header)
            if header[1] == DATA:
                self._body_left = header[4]
        return items
