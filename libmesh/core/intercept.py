"""Filters over the bytes of one direction of a tunnel: what comes in goes out, some of it rewritten.

Whatever the pieces in which the input comes, the joined output is the same. A filter holds back only what it may have to
rewrite, never a whole stream. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Interceptor(Protocol):
    """One direction."""

    def feed(self, data: bytes) -> bytes:
        """What may be sent on now that `data` has come. Raises `ValueError` for what must not pass."""

    def close(self) -> bytes:
        """What is left at the end of the stream."""


class PassThrough:
    """Changes nothing."""

    def feed(self, data: bytes) -> bytes:
        """`data`."""
        return data

    def close(self) -> bytes:
        """Nothing."""
        return b""


class FrameRewriter:
    """Rewrites single frames of a stream of frames: a head of fixed size that tells the length of what follows.

    Only frames for which `wanted` are held back until they are whole, at most `limit` bytes of payload; all others are
    passed on as they come.

    Args:
        head: bytes of a frame's head.
        size: the payload's bytes, from the head. Raises `ValueError` for one that must not pass.
        wanted: whether a frame with this head and payload size is to be rewritten.
        rewrite: the frame to send instead, from head and payload.
        limit: a larger payload that is `wanted` is an error.
    """

    def __init__(
        self,
        head: int,
        size: Callable[[bytes], int],
        wanted: Callable[[bytes, int], bool],
        rewrite: Callable[[bytes, bytes], bytes],
        *,
        limit: int = 4096,
    ) -> None:
        self._head, self._size, self._wanted, self._rewrite = head, size, wanted, rewrite
        self._limit = limit
        self._held = b""
        self._passing = 0  # bytes to come of a frame that passes

    def feed(self, data: bytes) -> bytes:
        """See `Interceptor`."""
        data, self._held = self._held + data, b""
        out: list[bytes] = []
        position = 0
        while position < len(data):
            if self._passing:
                piece = data[position : position + self._passing]
                self._passing -= len(piece)
                position += len(piece)
                out.append(piece)
                continue
            head = data[position : position + self._head]
            if len(head) < self._head:
                break
            size = self._size(head)
            if not self._wanted(head, size):
                self._passing = size
                position += self._head
                out.append(head)
                continue
            if size > self._limit:
                raise ValueError(f"a frame of {size} bytes that would have to be rewritten")
            end = position + self._head + size
            if len(data) < end:
                break
            out.append(self._rewrite(head, data[position + self._head : end]))
            position = end
        self._held = data[position:]
        return b"".join(out)

    def close(self) -> bytes:
        """See `Interceptor`: a frame that was cut off is passed on as far as it came."""
        held, self._held = self._held, b""
        return held
