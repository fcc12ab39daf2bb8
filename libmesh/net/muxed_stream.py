"""One stream of a yamux connection: what py-libp2p expects of it, and the calls that libmesh is fast with."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from libmesh.net.base import Pieces, Sink, StreamReset
from libmesh.net.parking import Wakeup
from libmesh.net.stock_face import StockFace

if TYPE_CHECKING:
    from libmesh.net.muxer import YamuxConnection
    from libmesh.net.outbound import Outbound

_JOIN_BELOW = 16 * 1024  # a chunk smaller than this is returned together with those behind it
_JOIN_UP_TO = 64 * 1024
_CRUMB_BYTES = 1024  # what waits is joined up to this: by itself, a byte takes fifty


class YamuxStream(StockFace):
    """A stream in both of its faces.

    The native face follows `trio.abc.HalfCloseableStream` (`receive_some`, `send_all`, `send_eof`, `aclose`), plus
    `reset_nowait` and the calls that never wait. It raises `StreamReset` and trio's own errors. A cancelled
    `receive_some` has taken nothing; a cancelled `send_all` has sent some prefix; neither harms any other stream.

    The face of `IMuxedStream`, for py-libp2p's own protocols, is in `StockFace`.

    Attributes:
        muxed_conn: the connection.
        stream_id: the yamux id.
        protocol: what was agreed on with the peer, where somebody else is to serve it.
    """

    __slots__ = (
        "_broken",
        "_chunks",
        "_closed",
        "_deadline",
        "_eof_sent",
        "_finished",
        "_losing",
        "_offset",
        "_outbound",
        "_receivable",
        "_receiving",
        "_sendable",
        "_sending",
        "_sink",
        "_write_lock",
        "muxed_conn",
        "protocol",
        "sent",
        "stream_id",
        "view",
    )

    def __init__(self, connection: YamuxConnection, stream_id: int, outbound: Outbound) -> None:
        self.muxed_conn: YamuxConnection = connection
        self.stream_id = stream_id
        self.protocol = ""
        self._outbound = outbound
        self._chunks: deque[bytes] = deque()
        self._offset = 0  # of the first chunk, what has been read
        self._finished = False  # the peer sent FIN
        self._broken: str | None = None  # why both directions ended
        self._closed = False
        self._eof_sent = False
        self._receiving = False
        self._sending = False
        self._receivable = Wakeup()
        self._sendable = Wakeup()
        self._sink: Sink | None = None
        self._write_lock: trio.Lock | None = None
        self._deadline = float("inf")
        self._losing: trio.CancelScope | None = None
        # What `send_all` waits to get rid of; the connection takes from it when the socket and the window allow.
        self.view: memoryview | None = None
        self.sent = 0

    # ---- receiving --------------------------------------------------------------------------------------------

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        """What has arrived, up to `max_bytes`; `None` if nothing has; `b""` at the end.

        Raises `StreamReset` once all that had arrived before a reset has been returned.
        """
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed here")
        if self._chunks:
            return self._take(max_bytes)
        if self._finished:
            return b""
        if self._broken is not None:
            raise StreamReset(self._broken)
        return None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream.receive_some`. Without `max_bytes`, at most 64 KiB."""
        if max_bytes is not None:
            if not isinstance(max_bytes, int):
                raise TypeError(f"max_bytes must be an int, not {type(max_bytes).__name__}")
            if max_bytes < 1:
                raise ValueError(f"max_bytes={max_bytes}: at least 1")
        return await self._receive(max_bytes, None)

    async def receive_past(self, sink: Sink) -> bytes:
        """See `net.base.Stream.receive_past`."""
        return await self._receive(None, sink)

    async def _receive(self, max_bytes: int | None, sink: Sink | None) -> bytes:
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        data = self.receive_nowait(max_bytes)
        if data is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return data
        while data is None:
            await self.wait_receivable(sink)
            data = self.receive_nowait(max_bytes)
        return data

    async def wait_receivable(self, sink: Sink | None = None) -> None:
        """Wait until `receive_nowait` would not answer `None`. To be called only right after it did.

        While this waits, what arrives is offered to `sink` first, in the very call that received it; only what it
        does not take ends the wait. If cancelled, what the sink has taken is gone, and nothing else.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True
        self._sink = sink
        try:
            await self._receivable.wait()
        finally:
            self._receiving = False
            self._sink = None

    def _take(self, max_bytes: int | None) -> bytes:
        chunks, offset = self._chunks, self._offset
        first = chunks[0]
        size = len(first) - offset
        if max_bytes is not None and size > max_bytes:
            data = first[offset : offset + max_bytes]
            self._offset = offset + max_bytes
        else:
            chunks.popleft()
            data = first[offset:] if offset else first
            self._offset = 0
            if chunks and size < _JOIN_BELOW:
                data = self._join(data, min(max_bytes or _JOIN_UP_TO, _JOIN_UP_TO))
        self.muxed_conn.consumed(self.stream_id, len(data))
        return data

    def _join(self, first: bytes, limit: int) -> bytes:
        pieces, size = [first], len(first)
        chunks = self._chunks
        while chunks and size + len(chunks[0]) <= limit:
            piece = chunks.popleft()
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    # ---- sending ----------------------------------------------------------------------------------------------

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Send what can be sent at once; return how many bytes that was, possibly 0.

        Raises like `send_all`. The memory is free again when this returns.
        """
        if self._closed or self._eof_sent or self._broken is not None:
            self._check_sendable()
        view = _bytes_of(data)
        return self._outbound.send_nowait(self, view) if len(view) else 0

    def post(self, data: bytes, *, hurry: bool = True) -> bool:
        """Send at most 1 KiB without waiting, together with what follows in this turn of the scheduler.

        Without `hurry`, together with what follows within `outbound.COMPANY_TIME`. For the lines that open a stream: the
        first window has room for them. False, and nothing was sent, when it is used up. Nothing happens on a stream that
        is closed or broken.
        """
        if self._broken is None and not self._closed:
            return self._outbound.post(self, data, hurry=hurry)
        return True

    async def send_all(self, data: bytes | bytearray | memoryview, *, soon: bool = False) -> None:
        """See `trio.abc.SendStream.send_all`. `soon`: at most 1 KiB, leaves with what the caller does next."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_sendable()
        view = _bytes_of(data)
        # A short answer to a peer that has ended leaves with our end, too, unless there is much to send anyway.
        soon = soon or (self._finished and len(view) < _CRUMB_BYTES and self._outbound.is_free)
        if soon and self._outbound.post(self, bytes(view), hurry=False):
            await trio.lowlevel.cancel_shielded_checkpoint()
            self._outbound.flush_soon()
            return
        sent = self._outbound.send_nowait(self, view) if len(view) else 0
        if sent == len(view):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        self._sending = True
        self.view, self.sent = view, sent
        try:
            self._check_sendable()  # what was sent at once may have found the connection lost
            self._outbound.queue(self)
            while self.view is not None:
                await self._sendable.wait()
                self._check_sendable()
        finally:
            self._sending = False
            if self.view is not None:
                self.view = None
                self._outbound.unqueue(self)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block`."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._sending = True
        try:
            if self._broken is not None or self._closed or self._outbound.might_send(self):
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                await self._sendable.wait()
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed here")
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream.send_eof`. Harmless to repeat."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed here")
        self.send_eof_nowait()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def send_eof_nowait(self) -> None:
        """End the sending direction, after all that was sent. Never waits; harmless to repeat."""
        if self.view is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        if not self._eof_sent:
            self._eof_sent = True
            self.muxed_conn.finish(self)

    def _check_sendable(self) -> None:
        if self._closed or self._eof_sent:
            raise trio.ClosedResourceError("this side of the stream was closed here")
        if self._broken is not None:
            raise StreamReset(self._broken)

    # ---- the end ----------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close both directions: an end of file if none was sent, and nothing more is read. Never waits long.

        A `send_all` that is under way in another task raises `ClosedResourceError`, and the stream is reset instead:
        the peer must not take half a message for the whole.
        """
        self.close_nowait()
        await trio.lowlevel.checkpoint()

    def close_nowait(self) -> None:
        """What `aclose` does."""
        if not self._closed:
            if self.view is not None:
                self.reset_nowait()
            else:
                self._closed = True
                self.muxed_conn.abandon(self, self._drop())
                self._wake()

    def release(self) -> None:
        """Send an end of file, and have the stream reset if the peer does not end its own direction in time.

        Reading goes on being possible. For users who do not come back to close: the stream must not depend on the
        peer to be freed.
        """
        if self.view is not None:
            self.reset_nowait()  # as in `aclose`
        elif not self._closed:
            self._eof_sent = True
            self.muxed_conn.finish(self, released=True)

    def reset_nowait(self) -> None:
        """End both directions abruptly, now. What was not sent or not read is dropped. Never raises."""
        if not self._closed:
            self._closed = True
            self.muxed_conn.reset_stream(self, self._drop())
            self._wake()

    @property
    def peer_has_finished(self) -> bool:
        """The peer will send no more."""
        return self._finished

    def peek(self) -> bytes:
        """The bytes that the next receive begins with, as far as they are in one piece."""
        if not self._chunks:
            return b""
        return self._chunks[0][self._offset :] if self._offset else self._chunks[0]

    @property
    def unread(self) -> int:
        """Bytes that have arrived and were not read."""
        return sum(map(len, self._chunks)) - self._offset

    def get_remote_address(self) -> tuple[str, int] | None:
        """The address of the peer's end of the connection."""
        return self.muxed_conn.get_remote_address()

    def when_lost(self, scope: trio.CancelScope | None) -> None:
        """Cancel `scope` once the peer has reset the stream or the connection is over. One at a time."""
        self._losing = scope
        if scope is not None and self._broken is not None:
            scope.cancel()

    def _drop(self) -> int:
        unread = self.unread
        self._chunks.clear()
        self._offset = 0
        return unread

    def _wake(self) -> None:
        self._receivable.wake()
        self._sendable.wake()

    # ---- told by the connection -------------------------------------------------------------------------------

    def arrive(self, data: bytes | memoryview, held: dict[YamuxStream, Pieces] | None) -> None:
        """Bytes arrived. A sink gets them at once, or where more is to follow, from `held` with `deliver_all`."""
        if self._sink is None or self._chunks:
            self._deliver(data)
        elif held is None:
            self.deliver_all([data])
        else:
            held.setdefault(self, []).append(data)

    def _deliver(self, data: bytes | memoryview) -> None:
        """Have bytes wait for their reader. A view is copied."""
        chunks = self._chunks
        if chunks and len(data) < _CRUMB_BYTES and len(chunks[-1]) < _CRUMB_BYTES:
            chunks[-1] += data
        else:
            chunks.append(bytes(data))
        self._receivable.wake()

    def deliver_all(self, pieces: Pieces) -> None:
        """What `arrive` held back. What the sink leaves waits for the reader."""
        taken = self._sink(pieces) if self._sink is not None else 0
        if taken:
            self.muxed_conn.consumed(self.stream_id, taken)
        for piece in pieces:
            if taken >= len(piece):
                taken -= len(piece)
            else:
                self._deliver(piece[taken:])
                taken = 0

    def peer_finished(self) -> None:
        """The peer will send no more."""
        self._finished = True
        self._receivable.wake()

    @property
    def is_closed(self) -> bool:
        """True when neither direction can be used any more."""
        return self._closed or self._broken is not None or (self._finished and self._eof_sent)

    @property
    def both_finished(self) -> bool:
        """Both sides have sent FIN: the connection has no more to do with this stream."""
        return self._finished and self._eof_sent

    def peer_reset(self, reason: str) -> None:
        """Both directions ended; what had arrived can still be read."""
        if self._broken is None:
            self._broken = reason
        if self._losing is not None:
            self._losing.cancel()
        self._wake()

    def sending_possible(self) -> None:
        """All of `view` was sent, or the window opened."""
        self._sendable.wake()


def _bytes_of(data: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(data)
    return view if view.itemsize == 1 and view.ndim == 1 else view.cast("B")
