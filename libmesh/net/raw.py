"""A stream of ours in the shape of py-libp2p's raw connections: what a circuit brings is upgraded like a socket."""

from __future__ import annotations

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IOException

from libmesh.errors import MeshError
from libmesh.net.base import Stream, StreamReset
from libmesh.net.negotiate import Libp2pStream
from libmesh.net.pipes import Pipe

PIECE_BYTES = 65536
"""Most bytes that one wait sends."""

_LOST = (MeshError, trio.BrokenResourceError, trio.ClosedResourceError)


class StreamPipe(Pipe):
    """A `Stream` as the bytes beneath a secure channel. Owns it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._arrived: bytes | bytearray | None = None  # taken off the stream and not yet received

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`."""
        stream = self._stream
        try:
            while self._arrived is None:
                self._arrived = stream.receive_nowait(PIECE_BYTES)
                if self._arrived is None and isinstance(stream, Libp2pStream):
                    await stream.wait_receivable()
                elif self._arrived is None:
                    self._arrived = await stream.receive_some(PIECE_BYTES)
        except _LOST as exc:
            raise StreamReset(f"connection lost: {exc}") from exc

    async def receive_into(self, view: memoryview) -> int:
        """See `Pipe.receive_into`."""
        await self.wait_readable()
        arrived = self._arrived or b""
        count = min(len(arrived), len(view))
        view[:count] = arrived[:count]
        self._arrived = arrived[count:] or None
        return count

    def send_nowait(self, view: memoryview) -> int:
        """See `Pipe.send_nowait`."""
        try:
            return self._stream.send_nowait(view)
        except _LOST as exc:
            raise StreamReset(f"connection lost: {exc}") from exc

    async def send_some(self, view: memoryview) -> int:
        """See `Pipe.send_some`."""
        piece = bytes(
            view[:PIECE_BYTES]
        )  # a copy: while this waits, the buffer may be given to somebody else
        try:
            await self._stream.send_all(piece)
        except _LOST as exc:
            raise StreamReset(f"connection lost: {exc}") from exc
        return len(piece)

    async def aclose(self) -> None:
        """See `Pipe.aclose`."""
        await self._stream.aclose()


class StreamFace(ReadWriteCloser):
    """`read`, `write` and `close` of a `Stream`. Owns it.

    Attributes:
        carrier: the stream.
    """

    def __init__(self, stream: Stream) -> None:
        self.carrier = stream

    def pipe(self) -> Pipe:
        """What our own Noise reads and writes by; `read` and `write` must not be used any more."""
        return StreamPipe(self.carrier)

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes; `b""` at the end. If cancelled, nothing was taken."""
        try:
            return bytes(await self.carrier.receive_some(n if n is None or n > 0 else None))
        except _LOST as exc:
            raise IOException(str(exc) or "the carrying stream is closed") from exc

    async def write(self, data: bytes) -> None:
        """Send all of `data`. If cancelled, the stream can only be closed."""
        try:
            await self.carrier.send_all(data)
        except _LOST as exc:
            raise IOException(str(exc) or "the carrying stream is closed") from exc

    async def close(self) -> None:
        """Close the stream."""
        await self.carrier.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: what is at the other end of a circuit has no address of its own."""
        return None
