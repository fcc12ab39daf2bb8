"""Our yamux under py-libp2p: the driver of `core.yamux`, and its installation.

Three tasks a connection: one reads, one sends what could not be sent at once, one keeps time. Nothing else ever waits
for the socket, so cancelling the user of a stream cannot leave a record half sent, and no stream can hold up another.

Sending. Whoever has data calls `send_nowait` or `queue`; if the socket takes it, it goes out in that very call, without
a lock and without another task. If the socket is full, small messages wait in the outbox (bounded) and bulk senders
stand in a queue; the sending task takes from them in turn, control frames first, then the outbox, then a frame of each
bulk sender, and seals straight from the sender's memory. A small message that follows another stream's within
`CORK_TIME` waits one turn of the scheduler, so that many of them leave in one record and one system call.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from multiaddr import Multiaddr

from libmesh.core.yamux import Yamux
from libmesh.core.yamux_frames import (
    Broken,
    Data,
    Event,
    Finished,
    GoneAway,
    OpenAllowed,
    Opened,
    Options,
    Reset,
    Writable,
)
from libmesh.net.base import StreamReset
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.noise import YAMUX_ID, NoiseSession
from libmesh.net.parking import Wakeup
from libmesh.net.records import Channel, PlainChannel

log = logging.getLogger(__name__)

BATCH_BYTES = 4 * 65519
"""Bytes sealed before they are given to the socket: full records, within the second level cache."""

SMALL_BYTES = 16 * 1024
"""A message below this is copied and may go ahead of bulk."""

OUTBOX_BYTES = 128 * 1024
"""Small messages that wait for the socket. When full, their senders queue like bulk."""

CORK_TIME = 0.0003
"""Seconds after another stream's small message within which one waits for company."""

TURN_BYTES = 1024 * 1024
"""Bytes that one task sends or receives before it lets others run."""

CLOSE_TIME = 0.5
"""Seconds that `close` waits for what is queued to leave."""


class YamuxConnection(IMuxedConn):
    """A connection to one peer and its streams, for `muxer_opt["/yamux/1.0.0"]`.

    Attributes:
        peer_id: the peer, as authenticated by the secure channel.
        secured_conn: the secure channel. Owned.
        on_close: awaited once, when the connection is over, however that came. Set by the swarm.
    """

    def __init__(self, conn: ISecureConn, peer_id: ID, options: Options | None = None) -> None:
        self.peer_id = peer_id
        self.secured_conn = conn
        self.on_close: Callable[[], Awaitable[Any]] | None = None
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self._machine = Yamux(initiator=conn.is_initiator, now=trio.current_time(), options=options)
        self._channel: Channel = conn.channel if isinstance(conn, NoiseSession) else PlainChannel(conn)
        self._streams: dict[int, YamuxStream] = {}
        self._inbound: deque[YamuxStream] = deque()
        self._acceptable = trio.lowlevel.ParkingLot()
        self._openable = trio.lowlevel.ParkingLot()
        self._over: str | None = None
        self._scope = trio.CancelScope()
        # sending
        self._outbox: list[bytes | memoryview] = []
        self._outbox_size = 0
        self._ready: deque[YamuxStream] = deque()
        self._blocked = False  # the socket is full; only the sending task may find out that it is no more
        self._flusher = Wakeup()
        self._drained = trio.lowlevel.ParkingLot()
        self._last_small: YamuxStream | None = None
        self._last_small_at = 0.0

    # ---- what py-libp2p and the adapter ask -------------------------------------------------------------------

    @property
    def is_initiator(self) -> bool:
        """Whether this side dialled."""
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and self._over is None

    @property
    def is_closed(self) -> bool:
        """Whether the connection is over."""
        return self._over is not None

    @property
    def rtt(self) -> float | None:
        """Smoothed round-trip time in seconds, `None` until measured."""
        return self._machine.rtt

    @property
    def stream_count(self) -> int:
        """Streams that are known here, those included that wait for the peer to finish."""
        return self._machine.streams

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The addresses of the connection itself."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's address, if the connection has one."""
        return self.secured_conn.get_remote_address()

    async def open_stream(self) -> YamuxStream:
        """Open a stream. Costs no round trip; SYN travels with the first data, or alone a moment later.

        Waits while 256 streams are unacknowledged. If cancelled, none was opened. Raises `MuxedConnUnavailable`.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if self._over is not None or self._machine.closing:
                raise MuxedConnUnavailable(self._over or "the peer takes no more streams")
            stream_id = self._machine.open(trio.current_time())
            if stream_id is not None:
                break
            await self._openable.park()
        stream = self._streams[stream_id] = YamuxStream(self, stream_id)
        self._flush_soon()
        return stream

    async def accept_stream(self) -> YamuxStream:
        """The next stream that the peer opened. Raises `MuxedConnUnavailable` when the connection is over."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._inbound:
            if self._over is not None:
                raise MuxedConnUnavailable(self._over)
            await self._acceptable.park()
        stream = self._inbound.popleft()
        self._machine.accept(stream.stream_id)
        self._flush_soon()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return stream

    async def close(self) -> None:
        """Say goodbye and close. Streams that are open see `StreamReset` on both sides. Harmless to repeat."""
        if self.is_established:
            self._machine.shutdown()
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_TIME):
                while self._over is None and not self._pump():
                    await self._drained.park()
        self._fail("the connection was closed here")
        with trio.CancelScope(shield=True):
            await self._close_channel()
            if self.event_started.is_set():
                await self.event_closed.wait()
        self.event_closed.set()

    async def _close_channel(self) -> None:
        try:
            await self._channel.aclose()
        except StreamReset as exc:
            log.debug("closing the connection to %s: %s", self.peer_id, exc)

    # ---- the tasks --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Run the connection until it is over. Never raises for what the network does."""
        if self.event_started.is_set():
            return
        self.event_started.set()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_loop)
                    nursery.start_soon(self._keep_time)
                    nursery.start_soon(self._receive_loop)
        except Exception:
            # Whatever leaves here ends the whole host. A mistake of ours is to cost this connection only.
            log.exception("the connection to %s failed", self.peer_id)
        finally:
            self._fail("the connection was closed here")
            with trio.CancelScope(shield=True):
                await self._close_channel()
            self.event_closed.set()
        if self.on_close is not None:
            await self.on_close()

    async def _receive_loop(self) -> None:
        machine, receive = self._machine, self._channel.receive
        taken = 0
        reason = "the peer closed the connection"
        if isinstance(self.secured_conn, NoiseSession):  # what came behind the muxer's negotiation
            self._handle(machine.receive(self.secured_conn.take_unread(), trio.current_time()))
        try:
            while records := await receive():
                now = trio.current_time()
                for record in records:
                    self._handle(machine.receive(record, now))
                    taken += len(record)
                if machine.broken is not None:
                    return
                if machine.has_control:
                    self._flush_soon()
                if taken >= TURN_BYTES:
                    taken = 0
                    await trio.lowlevel.checkpoint()
        except StreamReset as exc:
            reason = str(exc)
        self._fail(reason)

    async def _send_loop(self) -> None:
        try:
            while True:
                if self._pump():
                    await self._flusher.wait()
                elif self._blocked:
                    await self._channel.flush()
                    self._blocked = False
                    self._machine.alive(trio.current_time())
                else:
                    await trio.lowlevel.checkpoint()
        except StreamReset as exc:
            self._fail(str(exc))

    async def _keep_time(self) -> None:
        while self._over is None:
            await trio.sleep_until(self._machine.deadline())
            self._handle(self._machine.tick(trio.current_time()))
            self._flush_soon()

    # ---- events -----------------------------------------------------------------------------------------------

    def _handle(self, events: list[Event]) -> None:
        streams = self._streams
        for event in events:
            match event:
                case Data(stream_id, data):
                    streams[stream_id].deliver(data)
                case Writable(stream_id):
                    self._window_opened(streams[stream_id])
                case Opened(stream_id):
                    stream = streams[stream_id] = YamuxStream(self, stream_id)
                    self._inbound.append(stream)
                    self._acceptable.unpark()
                case Finished(stream_id):
                    stream = streams[stream_id]
                    stream.peer_finished()
                    if stream.both_finished:
                        del streams[stream_id]
                case Reset(stream_id, reason):
                    self._stream_was_reset(stream_id, reason)
                case OpenAllowed():
                    self._openable.unpark_all()
                case GoneAway(code):
                    log.debug("%s goes away, code %d", self.peer_id, code)
                    self._openable.unpark_all()
                case Broken(reason):
                    self._pump()
                    self._fail(reason)
                    return

    def _window_opened(self, stream: YamuxStream) -> None:
        if stream.view is not None:
            self._ready.append(stream)
            self._flush_soon()
        else:
            stream.sending_possible()

    def _stream_was_reset(self, stream_id: int, reason: str) -> None:
        stream = self._streams.pop(stream_id)
        stream.peer_reset(reason)
        if stream in self._inbound:
            self._inbound.remove(stream)
            self.consumed(stream_id, stream.unread)

    def _fail(self, reason: str) -> None:
        if self._over is not None:
            return
        self._over = reason
        for stream in self._streams.values():
            stream.peer_reset(reason)
        self._streams.clear()
        self._inbound.clear()
        self._ready.clear()
        self._outbox.clear()
        self._acceptable.unpark_all()
        self._openable.unpark_all()
        self._drained.unpark_all()
        self._scope.cancel()

    # ---- what streams ask -------------------------------------------------------------------------------------

    def consumed(self, stream_id: int, count: int) -> None:
        """`count` received bytes were read or dropped."""
        self._machine.consumed(stream_id, count, trio.current_time())
        if self._machine.has_control:
            self._flush_soon()

    def send_nowait(self, stream: YamuxStream, view: memoryview) -> int:
        """Send from `view` what can be sent at once; return how much that was."""
        if len(view) < SMALL_BYTES:
            return self._send_small(stream, view)
        if self._blocked or self._ready or self._over is not None:
            return 0
        stream.view, stream.sent = view, 0
        self._ready.append(stream)
        self._pump()
        if stream.view is None:
            return len(view)
        stream.view = None
        self.unqueue(stream)
        return stream.sent

    def _send_small(self, stream: YamuxStream, view: memoryview) -> int:
        if self._outbox_size >= OUTBOX_BYTES or self._over is not None:
            return 0
        header, count = self._machine.data(stream.stream_id, len(view))
        if not count:
            return 0
        self._post(header, bytes(view[:count]))
        if not self._blocked:
            now = trio.current_time()
            company = self._last_small is not stream and now - self._last_small_at < CORK_TIME
            self._last_small, self._last_small_at = stream, now
            if company:
                self._flush_soon()
            else:
                self._pump()
        return count

    def post(self, stream: YamuxStream, data: bytes) -> None:
        """Send a few bytes of a new stream, soon. The window has room for them."""
        header, count = self._machine.data(stream.stream_id, len(data))
        self._post(header, data[:count])
        self._flush_soon()

    def _post(self, *pieces: bytes) -> None:
        for piece in pieces:
            if piece:
                self._outbox.append(piece)
                self._outbox_size += len(piece)

    def queue(self, stream: YamuxStream) -> None:
        """Send the rest of `stream.view` as the socket and the window allow; then tell the stream."""
        if self._machine.writable(stream.stream_id):
            self._ready.append(stream)
            self._pump()

    def unqueue(self, stream: YamuxStream) -> None:
        """Forget what `queue` was asked."""
        if stream in self._ready:
            self._ready.remove(stream)

    def might_send(self, stream: YamuxStream) -> bool:
        """Whether the window is open. If not, the stream is told when it is."""
        return self._machine.writable(stream.stream_id)

    def finish(self, stream: YamuxStream, *, released: bool = False) -> None:
        """Send FIN behind the stream's data. With `released`, reset the stream if the peer never finishes."""
        linger_from = trio.current_time() if released else None
        self._post(self._machine.finish(stream.stream_id, linger_from=linger_from))
        if stream.both_finished:
            self._streams.pop(stream.stream_id, None)
        self._flush_soon()

    def abandon(self, stream: YamuxStream, unread: int) -> None:
        """The stream was closed here, with `unread` bytes in it."""
        now = trio.current_time()
        self._post(self._machine.abandon(stream.stream_id, unread=unread > 0, now=now))
        self._release(stream, unread)

    def reset_stream(self, stream: YamuxStream, unread: int) -> None:
        """The stream was reset here, with `unread` bytes in it."""
        self._machine.reset(stream.stream_id)
        self._release(stream, unread)

    def _release(self, stream: YamuxStream, unread: int) -> None:
        self.consumed(stream.stream_id, unread)
        self._streams.pop(stream.stream_id, None)
        self._openable.unpark_all()
        self._flush_soon()

    # ---- sending ----------------------------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        self._flusher.wake()

    def _pump(self) -> bool:
        """Send while the socket takes it, up to a turn's worth. True when nothing is left to send."""
        if self._blocked or self._over is not None:
            return False
        channel, sent = self._channel, 0
        try:
            while channel.flush_nowait():
                if sent >= TURN_BYTES:
                    self._flush_soon()
                    return False
                size = self._put_batch()
                if not size:
                    self._drained.unpark_all()
                    return True
                sent += size
        except StreamReset as exc:
            self._fail(str(exc))
            return False
        self._blocked = True
        self._flush_soon()
        return False

    def _put_batch(self) -> int:
        machine, ready = self._machine, self._ready
        batch: list[bytes | memoryview] = []
        size = 0
        if machine.has_control:
            control = machine.take_control()
            batch.append(control)
            size = len(control)
        if self._outbox:
            batch += self._outbox
            size += self._outbox_size
            self._outbox.clear()
            self._outbox_size = 0
        while ready and size < BATCH_BYTES:
            stream = ready.popleft()
            view = stream.view
            if view is None:
                continue
            header, count = machine.data(stream.stream_id, len(view) - stream.sent)
            if not count:
                continue  # the window is shut; `Writable` puts the stream back
            batch += (header, view[stream.sent : stream.sent + count])
            size += count
            stream.sent += count
            if stream.sent == len(view):
                stream.view = None
                stream.sending_possible()
            else:
                ready.append(stream)
        if batch:
            self._channel.put(batch)
        return size


class _MuxerSelector(MuxerMultistream):
    """Chooses the muxer of a connection: ours, without a negotiation where Noise has agreed on it already."""

    def __init__(self, stock: MuxerMultistream, options: Options | None) -> None:
        super().__init__(stock.transports, stock.negotiate_timeout)
        self._options = options

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        early = conn.early_muxer if isinstance(conn, NoiseSession) else None
        if early is not None and TProtocol(early) in self.transports:
            protocol = TProtocol(early)
        else:
            protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        if protocol == YAMUX_ID:
            muxed: IMuxedConn = YamuxConnection(conn, peer_id, self._options)
        else:
            muxed = self.transports[protocol](conn, peer_id)
        return self._annotate_connection(muxed, conn, protocol)


def install_muxer(upgrader: Any, options: Options | None = None) -> None:
    """Make a py-libp2p host use `YamuxConnection` for `/yamux/1.0.0`. To be called before any connection.

    `muxer_opt` should suffice and does not: `MuxerMultistream.new_conn` of 0.8.1 builds the stock muxer for that id,
    whatever class was registered.

    Args:
        upgrader: the host's `TransportUpgrader` (`swarm.upgrader`), or the swarm itself.
        options: of every connection's muxer.
    """
    upgrader = getattr(upgrader, "upgrader", upgrader)
    upgrader.muxer_multistream = _MuxerSelector(upgrader.muxer_multistream, options)
