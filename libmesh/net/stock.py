"""A stream of a stock py-libp2p muxer with the calls of ours, as far as it can have them.

For peers and tests only: our hosts offer no muxer but our own. What stock streams get wrong, and this cannot mend, is
told in the contract suite (`testing.contract`): a reset looks like an end of file, a cancelled read may lose data, a
reader that pauses for five seconds loses the stream. What it does mend: a cancelled write would leave half a record on
the connection and so end all its streams, therefore writes are shielded, in pieces of 16 KiB.
"""

from __future__ import annotations

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from libmesh.net.base import StreamReset

_PIECE_BYTES = 16 * 1024


class StockStream:
    """Owns a stock muxed stream."""

    def __init__(self, muxed: IMuxedStream) -> None:
        self._muxed = muxed
        self._posted = b""
        self._arrived: bytes | None = None
        self._closed = False
        self._eof_sent = False
        self._ended = False

    def post(self, data: bytes, *, hurry: bool = True) -> None:
        """Send `data` before anything else; it leaves with the next call that waits, in whatever hurry."""
        self._posted += data

    def peek(self) -> bytes:
        """See `YamuxStream.peek`. Never more than has been fetched."""
        return self._arrived or b""

    @property
    def unread(self) -> int:
        """Bytes that have been fetched and were not read."""
        return len(self._arrived or b"")

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        """What `wait_receivable` has fetched."""
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed here")
        if not self._arrived:  # b"" is the end, and is told once: the next receive asks the muxer again
            arrived, self._arrived = self._arrived, None
            return arrived
        count = len(self._arrived) if max_bytes is None else max_bytes
        data, self._arrived = self._arrived[:count], self._arrived[count:] or None
        return data

    async def wait_receivable(self) -> None:
        """Fetch a byte. One, because more might belong to whoever reads the stream after us."""
        await self._flush()
        self._arrived = await self._read(1)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: at least 1")
        await self._flush()
        await trio.lowlevel.checkpoint()
        data = self.receive_nowait(max_bytes)
        return data if data is not None else await self._read(max_bytes or 65536)

    async def _read(self, count: int) -> bytes:
        if self._ended:
            return b""
        try:
            return await self._muxed.read(count)
        except MuxedStreamEOF:
            self._ended = True
            return b""
        except MuxedStreamError as exc:
            raise StreamReset(str(exc)) from exc

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()
        if self._closed or self._eof_sent:
            raise trio.ClosedResourceError("this side of the stream was closed here")
        await self._flush()
        view = memoryview(data)
        for start in range(0, len(view), _PIECE_BYTES):
            await self._write(bytes(view[start : start + _PIECE_BYTES]))
            await trio.lowlevel.checkpoint()

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Nothing can be sent without waiting."""
        return 0

    async def _flush(self) -> None:
        data, self._posted = self._posted, b""
        if data:
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        try:
            with trio.CancelScope(shield=True):
                await self._muxed.write(data)
        except MuxedStreamError as exc:
            raise StreamReset(str(exc)) from exc

    async def wait_send_all_might_not_block(self) -> None:
        """Unknown here, so it returns."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        await self._flush()
        await trio.lowlevel.checkpoint()
        if not self._eof_sent:
            self._eof_sent = True
            with trio.CancelScope(shield=True):
                await self._muxed.close()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`. Resets the stream unless the peer has finished: `close` would not tell it."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                await self._flush()
                await (self._muxed.close() if self._ended or not self._eof_sent else self._muxed.reset())
            except StreamReset:
                await self._muxed.reset()
        await trio.lowlevel.checkpoint()

    def reset_nowait(self) -> None:
        """Reset, in a task that nobody can cancel."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.spawn_system_task(self._muxed.reset)
