"""The streams of `MemoryHub`: two bounded buffers, and no socket."""

from __future__ import annotations

from collections import deque

import trio

from libmesh.errors import ServiceRefused
from libmesh.net.base import Sink, Stream, StreamReset
from libmesh.peers import PeerId

WINDOW = 64 * 1024
"""Bytes that a writer may be ahead of its reader."""


class Pipe:
    """One direction of a stream: a bounded buffer with an end of file and a reset."""

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.broken = False
        self.unwanted = False  # the reader closed: bytes are dropped, as the writer learns by an error
        self.changed = trio.Event()
        self.losing: trio.CancelScope | None = None  # of the reader

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self.changed.set()
        self.changed = trio.Event()


class MemoryStream(Stream):
    """One end of a stream of a `MemoryHub`."""

    def __init__(self, peer: PeerId, protocol: str, outgoing: Pipe, incoming: Pipe) -> None:
        self.peer, self.protocol = peer, protocol
        self._outgoing, self._incoming = outgoing, incoming
        self._sending, self._receiving, self._closed = False, False, False
        self.refusal: str | None = None
        self._lost = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream.send_all`."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            rest = bytes(data)
            while rest:
                await self._wait_for_room()
                room = WINDOW - self._outgoing.size
                self._outgoing.chunks.append(rest[:room])
                self._outgoing.size += len(rest[:room])
                self._outgoing.notify()
                rest = rest[room:]
        finally:
            self._sending = False

    def _check_sendable(self) -> None:
        if self._closed or self._outgoing.ended:
            raise trio.ClosedResourceError("this side of the stream was closed")
        if self._outgoing.broken:
            raise StreamReset("the stream was reset")
        if self._outgoing.unwanted:
            raise trio.BrokenResourceError("the peer closed the stream")

    async def _wait_for_room(self) -> None:
        while True:
            self._check_sendable()
            if self._outgoing.size < WINDOW:
                return
            await self._outgoing.changed.wait()

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("the stream is closed")
            while self._outgoing.size >= WINDOW and not (self._outgoing.broken or self._outgoing.unwanted):
                await self._outgoing.changed.wait()
                if self._closed:
                    raise trio.ClosedResourceError("the stream is closed")
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream.send_eof`."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")
        self._outgoing.ended = True
        self._outgoing.notify()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream.receive_some`; raises `ServiceRefused` if the peer has no such protocol."""
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        if max_bytes is not None:
            if not isinstance(max_bytes, int):
                raise TypeError(f"max_bytes must be an int, not {type(max_bytes).__name__}")
            if max_bytes < 1:
                raise ValueError("max_bytes must be at least 1")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            pipe = self._incoming
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("the stream is closed")
                if self.refusal is not None:
                    raise ServiceRefused(f"the peer does not know {self.protocol}", reason=self.refusal)
                if pipe.chunks:
                    return self._take(max_bytes)
                if pipe.broken:
                    raise StreamReset("the stream was reset")
                if pipe.ended:
                    return b""
                await pipe.changed.wait()
        finally:
            self._receiving = False

    async def receive_past(self, sink: Sink) -> bytes:
        """See `Stream.receive_past`."""
        while data := await self.receive_some():
            taken = sink([data])
            if taken < len(data):
                return data[taken:]
        return b""

    def _take(self, max_bytes: int | None) -> bytes:
        pipe = self._incoming
        chunk = pipe.chunks.popleft()
        if max_bytes is not None and len(chunk) > max_bytes:
            pipe.chunks.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        pipe.size -= len(chunk)
        pipe.notify()
        return chunk

    def reset(self) -> None:
        """See `Stream.reset`."""
        self._closed = True
        self._break()

    @property
    def connection_lost(self) -> bool:
        """See `Stream`."""
        return self._lost

    @property
    def over(self) -> bool:
        """Whether neither direction can be used any more, or both ends have finished."""
        return self._closed or self._incoming.broken or (self._outgoing.ended and self._incoming.ended)

    def lose(self) -> None:
        """What the death of the connection does."""
        self._lost = True
        self._break()

    def when_lost(self, scope: trio.CancelScope | None) -> bool:
        """See `Stream`."""
        self._incoming.losing = scope
        if scope is not None and self._incoming.broken:
            scope.cancel()
        return True

    def _break(self) -> None:
        for pipe in (self._outgoing, self._incoming):
            pipe.broken = True
            pipe.notify()
            if pipe.losing is not None:
                pipe.losing.cancel()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource.aclose`."""
        if not self._closed:
            self._closed = True
            self._outgoing.ended = True
            self._incoming.unwanted = True
            self._incoming.chunks.clear()
            self._incoming.size = 0
            self._outgoing.notify()
            self._incoming.notify()
        await trio.lowlevel.checkpoint()
